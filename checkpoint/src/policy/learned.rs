//! What a cost that grows with pages is likely to be, learned from what it was.

use std::time::Duration;

/// What an older observation counts for beside the next: some twenty decide.
const FADING: f64 = 0.95;
/// How quickly the deviation follows (as a retransmission timer's does, RFC 6298).
const DEVIATION_GAIN: f64 = 1.0 / 4.0;
/// So many deviations above the line nearly everything is.
const DEVIATIONS: f64 = 2.0;

/// A straight line through what was seen, by least squares, the newest counting most. Times are in ns.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
    deviation: f64,
}

impl Line {
    /// So many pages took so long.
    pub fn saw(&mut self, pages: u64, took: Duration) {
        let (x, y) = (pages as f64, took.as_nanos() as f64);
        if self.weight > 0.0 {
            self.deviation += ((y - self.mean_at(x)).abs() - self.deviation) * DEVIATION_GAIN;
        }
        let fade = |sum: &mut f64, more| *sum = *sum * FADING + more;
        fade(&mut self.weight, 1.0);
        fade(&mut self.x, x);
        fade(&mut self.y, y);
        fade(&mut self.xx, x * x);
        fade(&mut self.xy, x * y);
    }

    /// What so many pages hardly ever take longer than; nothing, before anything was seen.
    pub fn likely_at_most(&self, pages: u64) -> Duration {
        if self.weight == 0.0 {
            return Duration::ZERO;
        }
        Duration::from_nanos((self.mean_at(pages as f64) + DEVIATIONS * self.deviation).max(0.0) as u64)
    }

    fn mean_at(&self, x: f64) -> f64 {
        let (mean_x, mean_y) = (self.x / self.weight, self.y / self.weight);
        let (variance, covariance) = (self.xx / self.weight - mean_x * mean_x, self.xy / self.weight - mean_x * mean_y);
        // Where all were about as large, nothing tells how it grows: in proportion at worst.
        if variance <= (mean_x * 0.05).powi(2) + 1.0 {
            return mean_y * (x / mean_x.max(1.0)).max(1.0);
        }
        let slope = (covariance / variance).max(0.0);
        (mean_y + slope * (x - mean_x)).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn a_line_is_found_again_and_a_new_one_replaces_it() {
        let mut line = Line::default();
        assert_eq!(line.likely_at_most(1000), Duration::ZERO);
        for pages in (0..40).map(|n| n * 100 % 1700) {
            line.saw(pages, us(300 + pages));
        }
        for pages in [0, 500, 5000] {
            let found = line.likely_at_most(pages);
            assert!((found.as_secs_f64() / us(300 + pages).as_secs_f64() - 1.0).abs() < 0.02, "{pages}: {found:?}");
        }
        for pages in (0..120).map(|n| n * 100 % 1700) {
            line.saw(pages, us(1000));
        }
        let found = line.likely_at_most(1500);
        assert!((us(990)..us(1100)).contains(&found), "{found:?}");
    }

    #[test]
    fn what_was_always_as_large_is_taken_to_grow_in_proportion_and_what_varies_has_a_margin() {
        let mut line = Line::default();
        for _ in 0..10 {
            line.saw(100, us(200));
        }
        assert_eq!(line.likely_at_most(50), us(200));
        assert_eq!(line.likely_at_most(1000), us(2000));
        for n in 0..40 {
            line.saw(100, us(if n % 2 == 0 { 100 } else { 300 }));
        }
        assert!(line.likely_at_most(100) > us(300));
    }
}
