//! Reports as JSON: objects over lines, lists of numbers on one, so that a person can read it and `diff` can compare it.

use super::{FORM, Report};
use crate::error::BenchError;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::io::{self, Write};
use std::path::Path;

/// Objects as [`PrettyFormatter`] has them, arrays on the line that they begin on.
#[derive(Default)]
struct Lines<'a>(PrettyFormatter<'a>);

impl Formatter for Lines<'_> {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }
}

/// As text, with a line's end.
pub fn text(report: &Report) -> Result<Vec<u8>, serde_json::Error> {
    let mut text = Vec::new();
    report.serialize(&mut Serializer::with_formatter(&mut text, Lines::default()))?;
    text.push(b'\n');
    Ok(text)
}

/// What `--out-json` once wrote to `path`.
pub fn read(path: &Path) -> Result<Report, BenchError> {
    let refused = |why: String| BenchError::Refused { why: format!("{}: {why}", path.display()) };
    let text = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let report: Report = serde_json::from_slice(&text)
        .map_err(|error| refused(format!("not a report of belay-bench as this version writes them: {error}")))?;
    if report.form != FORM {
        return Err(refused(format!("a report of form {}, this version reads {FORM}", report.form)));
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn a_report_is_read_as_it_was_written_and_one_of_another_form_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        let mut written = report("fault", &[1.0, 1.5, 2.25]);
        std::fs::write(&path, text(&written).unwrap()).unwrap();
        assert_eq!(read(&path).unwrap(), written);
        let lines = String::from_utf8(text(&written).unwrap()).unwrap();
        assert!(lines.contains("\"rounds\": [1.0, 1.5, 2.25]"), "{lines}");

        written.form = FORM + 1;
        std::fs::write(&path, text(&written).unwrap()).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("form"));
        std::fs::write(&path, "[]").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("not a report"));
    }
}
