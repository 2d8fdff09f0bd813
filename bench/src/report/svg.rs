//! A figure's frame in SVG: axes, ticks, lines, labels beside what they name. Colours and type come from the page's style sheet.

use super::{Axis, Role};
use std::fmt::Write;

pub const WIDTH: f64 = 860.0;
pub const HEIGHT: f64 = 340.0;
const LEFT: f64 = 62.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 48.0;
/// About so wide is a letter of the labels, which are 11 px high.
const LETTER: f64 = 6.1;
/// Between the baselines of two labels.
const LINE: f64 = 13.5;
/// Colours that the style sheet has for our own lines; the next one begins anew.
const COLOURS: usize = 6;

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// One axis, with the span it shows.
pub struct Scale {
    axis: Axis,
    from: f64,
    to: f64,
    ticks: Vec<(f64, String)>,
}

impl Scale {
    /// Over `values`, of which there may be none; a linear one begins at zero unless they are far from it.
    pub fn over(axis: &Axis, values: impl Iterator<Item = f64>) -> Self {
        let usable = values.filter(|value| value.is_finite() && (!axis.log || *value > 0.0));
        let (mut from, mut to) =
            usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(from, to), value| (from.min(value), to.max(value)));
        if from > to {
            (from, to) = (1.0, 10.0);
        }
        match axis.log {
            true => {
                (from, to) = (from / 1.12, to * 1.12);
                if to / from < 4.0 {
                    (from, to) = (from / 1.6, to * 1.6);
                }
            }
            false => {
                if from >= 0.0 && from < to * 0.7 {
                    from = 0.0;
                }
                if to - from < to.abs() * 1e-6 + 1e-12 {
                    (from, to) = (from - 0.5, to + 0.5);
                }
                to += (to - from) * 0.06;
            }
        }
        let ticks = if axis.log { log_ticks(from, to) } else { linear_ticks(from, to) };
        Self { axis: axis.clone(), from, to, ticks }
    }

    /// With ticks where the points are, if there are few.
    pub fn at(mut self, values: &[f64]) -> Self {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        values.dedup();
        let places: Vec<f64> = values.iter().map(|value| self.share(*value)).collect();
        let apart = places.windows(2).all(|pair| pair[1] - pair[0] > 0.045);
        if !values.is_empty() && values.len() <= 12 && apart {
            self.ticks = values.into_iter().map(|value| (value, number(value))).collect();
        }
        self
    }

    /// With ticks and words of the caller's.
    pub fn with_ticks(mut self, ticks: Vec<(f64, String)>) -> Self {
        self.ticks = ticks;
        self
    }

    /// Where `value` lies: 0 at the beginning, 1 at the end.
    fn share(&self, value: f64) -> f64 {
        match self.axis.log {
            true => (value.max(self.from) / self.from).ln() / (self.to / self.from).ln(),
            false => (value - self.from) / (self.to - self.from),
        }
    }

    fn title(&self) -> String {
        match self.axis.unit.is_empty() {
            true => self.axis.name.clone(),
            false => format!("{} [{}]", self.axis.name, self.axis.unit),
        }
    }
}

/// 1, 2, 5 and tens: at most seven.
fn linear_ticks(from: f64, to: f64) -> Vec<(f64, String)> {
    let rough = (to - from) / 6.5;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|step| *step >= rough).unwrap_or(rough);
    let first = (from / step).ceil() as i64;
    (first..)
        .map(|at| at as f64 * step)
        .take_while(|value| *value <= to)
        .take(12)
        .map(|value| (value, number(value)))
        .collect()
}

/// Decades; with 2 and 5 between where there are few of them.
fn log_ticks(from: f64, to: f64) -> Vec<(f64, String)> {
    let decades = (to / from).log10();
    let steps: &[f64] = if decades <= 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let (first, last) = (from.log10().floor() as i32, to.log10().ceil() as i32);
    let all = (first..=last).flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)));
    all.filter(|value| (from..=to).contains(value)).map(|value| (value, number(value))).collect()
}

/// Without a tail of zeroes; thousands from ten thousand on with k or M.
pub fn number(value: f64) -> String {
    let (value, unit) = match value.abs() {
        size if size >= 1e9 => (value / 1e9, "G"),
        size if size >= 1e6 => (value / 1e6, "M"),
        size if size >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let digits = if value.abs() >= 100.0 {
        0
    } else if value.abs() >= 1.0 {
        2
    } else {
        4
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{}{unit}", if text == "-0" { "0" } else { text })
}

/// What a line looks like: a class of the style sheet.
pub fn class(role: Role, at: usize) -> String {
    match role {
        Role::Ours => format!("c{}", at % COLOURS),
        Role::Floor => format!("floor f{}", at % 3),
        Role::Peer => format!("peer c{}", at % COLOURS),
    }
}

/// A figure in the making.
pub struct Figure {
    body: String,
    title: String,
    x: Scale,
    y: Scale,
    right: f64,
    /// Of lines: where it ends, its class and its words.
    labels: Vec<(f64, String, String)>,
}

impl Figure {
    /// `names` are those of the lines, for the room that they need.
    pub fn new<'a>(title: &str, x: Scale, y: Scale, names: impl Iterator<Item = &'a str>) -> Self {
        let longest = names.map(|name| name.trim().chars().count()).max().unwrap_or(0);
        let right = (longest as f64 * LETTER + 22.0).clamp(24.0, WIDTH * 0.38);
        let mut figure = Self { body: String::new(), title: title.to_owned(), x, y, right, labels: Vec::new() };
        figure.frame();
        figure
    }

    fn px(&self, value: f64) -> f64 {
        LEFT + self.x.share(value).clamp(0.0, 1.0) * (WIDTH - LEFT - self.right)
    }

    fn py(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - self.y.share(value).clamp(0.0, 1.0) * (HEIGHT - BOTTOM - TOP)
    }

    fn frame(&mut self) {
        let (left, right, top, bottom) = (LEFT, WIDTH - self.right, TOP, HEIGHT - BOTTOM);
        let mut text = String::new();
        for (value, word) in &self.y.ticks {
            let y = self.py(*value);
            let _ =
                write!(text, "<line class=\"grid\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
            let _ = write!(
                text,
                "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 7.0,
                y + 3.8,
                escape(word)
            );
        }
        for (value, word) in &self.x.ticks {
            let x = self.px(*value);
            let _ = write!(
                text,
                "<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{bottom:.1}\" y2=\"{:.1}\"/>",
                bottom + 4.0
            );
            let _ = write!(
                text,
                "<text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 17.0,
                escape(word)
            );
        }
        let _ = write!(
            text,
            "<line class=\"axis\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{bottom:.1}\" y2=\"{bottom:.1}\"/>"
        );
        let _ = write!(
            text,
            "<text class=\"axis-title\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (left + right) / 2.0,
            HEIGHT - 9.0,
            escape(&self.x.title())
        );
        // A paper's own place for it: above the axis, level, so that nobody has to turn his head.
        let _ = write!(
            text,
            "<text class=\"axis-title\" x=\"4\" y=\"{:.1}\">{}</text>",
            top - 14.0,
            escape(&self.y.title())
        );
        self.body.push_str(&text);
    }

    /// Through `points`; those that cannot be told apart are left out.
    pub fn line(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>, steps: bool) {
        let mut path = String::new();
        let mut last: Option<(f64, f64)> = None;
        for (x, y) in points.map(|(x, y)| (self.px(x), self.py(y))) {
            let apart =
                last.is_none_or(|(before_x, before_y)| (x - before_x).abs() >= 0.6 || (y - before_y).abs() >= 0.6);
            if !apart {
                continue;
            }
            let _ = match (last, steps) {
                (None, _) => write!(path, "M{x:.1} {y:.1}"),
                (Some(_), true) => write!(path, "H{x:.1}V{y:.1}"),
                (Some(_), false) => write!(path, "L{x:.1} {y:.1}"),
            };
            last = Some((x, y));
        }
        let _ = write!(self.body, "<path class=\"{class}\" d=\"{path}\"/>");
    }

    /// A dot at the median, a bar over what the rounds spread over.
    pub fn point(&mut self, class: &str, x: f64, y: f64, low: f64, high: f64) {
        let (x, y, low, high) = (self.px(x), self.py(y), self.py(low), self.py(high));
        let (from, to) = (x - 3.5, x + 3.5);
        let _ = write!(
            self.body,
            "<path class=\"bar {class}\" d=\"M{x:.1} {low:.1}V{high:.1}M{from:.1} {low:.1}H{to:.1}M{from:.1} {high:.1}H{to:.1}\"/><circle class=\"dot {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>"
        );
    }

    /// A level across.
    pub fn level(&mut self, name: &str, y: f64) {
        let (from, to, at) = (LEFT, WIDTH - self.right, self.py(y));
        let _ = write!(
            self.body,
            "<line class=\"reference\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"
        );
        self.labels.push((at, "floor".to_owned(), name.to_owned()));
    }

    /// An instant: a line from top to bottom with its name at the top, in the first of four rows that has room.
    pub fn marks<'a>(&mut self, marks: impl Iterator<Item = (f64, &'a str)>) {
        let mut marks: Vec<(f64, &str)> = marks.map(|(at, name)| (self.px(at), name)).collect();
        marks.sort_by(|one, other| one.0.total_cmp(&other.0));
        let mut ends = [f64::NEG_INFINITY; 4];
        // Names lie over all lines, or the next mark's would cross them.
        let (end, mut names) = (WIDTH - 6.0, String::new());
        for (x, name) in marks {
            let width = name.chars().count() as f64 * LETTER;
            // Near the right edge the name stands before its line.
            let (from, anchor, at) =
                if x + width + 6.0 > end { (x - width - 4.0, "end", x - 4.0) } else { (x, "start", x + 4.0) };
            let row = ends.iter().position(|end| *end < from).unwrap_or(ends.len() - 1);
            ends[row] = from + width + 12.0;
            let y = TOP + 10.0 + row as f64 * LINE;
            let _ = write!(
                self.body,
                "<line class=\"mark\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP:.1}\" y2=\"{:.1}\"/>",
                HEIGHT - BOTTOM
            );
            let _ = write!(
                names,
                "<text class=\"mark\" x=\"{at:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
                escape(name)
            );
        }
        self.body.push_str(&names);
    }

    /// Names the line that ends at this level.
    pub fn name(&mut self, class: &str, y: f64, name: &str) {
        let at = self.py(y);
        self.labels.push((at, class.to_owned(), name.trim().to_owned()));
    }

    /// Done. Labels that would lie on each other are moved apart, the lower ones down, and all of them up again where that leaves the figure.
    pub fn svg(mut self) -> String {
        self.labels.sort_by(|one, other| one.0.total_cmp(&other.0));
        let ends: Vec<f64> = self.labels.iter().map(|label| label.0).collect();
        let places = apart(&ends, LINE, HEIGHT - BOTTOM + 8.0);
        let x = WIDTH - self.right;
        let room = ((self.right - 18.0) / LETTER) as usize;
        for ((end, class, name), y) in self.labels.iter().zip(places) {
            let short: String = match name.chars().count() > room {
                true => name.chars().take(room.saturating_sub(1)).chain(['…']).collect(),
                false => name.clone(),
            };
            if (y - end).abs() > 2.0 {
                let _ =
                    write!(self.body, "<path class=\"leader\" d=\"M{:.1} {end:.1}L{:.1} {y:.1}\"/>", x + 1.0, x + 11.0);
            }
            let _ = write!(
                self.body,
                "<text class=\"label {class}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                x + 13.0,
                y + 3.8,
                escape(&short)
            );
        }
        let title = escape(&self.title);
        format!(
            "<figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">{}</svg><figcaption>{title}</figcaption></figure>",
            self.body
        )
    }
}

/// Places in order, at least `gap` apart, none below `bottom`, each as near to where it wants to be as that allows.
fn apart(wanted: &[f64], gap: f64, bottom: f64) -> Vec<f64> {
    let mut places = wanted.to_vec();
    for at in 1..places.len() {
        places[at] = places[at].max(places[at - 1] + gap);
    }
    let mut limit = bottom;
    for place in places.iter_mut().rev() {
        *place = place.min(limit);
        limit = *place - gap;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_never_lie_on_each_other_and_stay_in_the_figure() {
        let places = apart(&[10.0, 11.0, 12.0, 290.0, 299.0, 300.0], 13.0, 300.0);
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= 13.0 - 1e-9), "{places:?}");
        assert!(places.iter().all(|place| (0.0..=300.0).contains(place)), "{places:?}");
        assert_eq!(apart(&[10.0, 100.0], 13.0, 300.0), [10.0, 100.0]);
    }

    #[test]
    fn ticks_are_round_numbers_inside_the_axis() {
        let words = |ticks: Vec<(f64, String)>| ticks.into_iter().map(|(_, word)| word).collect::<Vec<_>>();
        assert_eq!(words(linear_ticks(0.0, 4.3)), ["0", "1", "2", "3", "4"]);
        assert_eq!(words(log_ticks(0.9, 150.0)), ["1", "2", "5", "10", "20", "50", "100"]);
        assert_eq!(words(log_ticks(1.0, 1e6)), ["1", "10", "100", "1000", "10k", "100k", "1M"]);
        assert!(words(linear_ticks(0.0, 0.7)).contains(&"0.2".to_owned()));
    }

    #[test]
    fn no_value_leaves_its_axis() {
        for axis in [Axis::log("latency", "us"), Axis::linear("latency", "us")] {
            for values in [vec![], vec![0.0], vec![5.0], vec![5.0, 5.0], vec![f64::NAN, 1.0, 1e9], vec![-3.0, 4.0]] {
                let scale = Scale::over(&axis, values.iter().copied());
                assert!(scale.from.is_finite() && scale.from < scale.to, "{values:?}");
                for value in values.into_iter().filter(|value| value.is_finite() && (!axis.log || *value > 0.0)) {
                    assert!((-1e-9..=1.0 + 1e-9).contains(&scale.share(value)), "{value}");
                }
            }
        }
    }
}
