//! How an error, and what somebody else has said, is put into a line for an operator.

/// Longest text that is shown, in characters.
const SHOWN_CHARS: usize = 300;

/// A text that the other side wrote, short and without what would steer a terminal or break a line of a log.
pub fn harmless(text: &str) -> String {
    let one_line = |c: char| if c.is_control() { ' ' } else { c };
    let mut shown: String = text.chars().take(SHOWN_CHARS).map(one_line).collect();
    if text.chars().nth(SHOWN_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

/// An error with everything that caused it, on one line.
pub fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let said = next.to_string();
        // Transparent errors repeat what they wrap.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_somebody_elses_is_shown_short_and_harmless() {
        let shown = harmless(&format!("\u{1b}[2J\r\nall is well{}", "!".repeat(10_000)));
        assert!(shown.chars().all(|c| !c.is_control()) && shown.contains("all is well"), "{shown:?}");
        assert_eq!(shown.chars().count(), SHOWN_CHARS + 1);
        assert_eq!(harmless("plain, with ümläuts"), "plain, with ümläuts");
    }
}
