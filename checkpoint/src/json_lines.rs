//! A file of JSON, a value a line: written as it comes, read within bounds. What is wrong with one is told by its line.

use belay_transport::harmless;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, Read, Write};

/// Why such a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LinesError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("line {line}: {what}")]
    Line { line: usize, what: String },
    /// It ends where the first of these should stand.
    #[error("it has no {what} in it")]
    Empty { what: &'static str },
}

/// Writes a line for each value.
#[derive(Debug)]
pub struct LineWriter<W: Write> {
    into: W,
    bytes: u64,
}

impl<W: Write> LineWriter<W> {
    pub fn new(into: W) -> Self {
        Self { into, bytes: 0 }
    }

    pub fn line(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        self.bytes += text.len() as u64;
        self.into.write_all(&text)
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Hands on what is still in buffers.
    pub fn flush(&mut self) -> io::Result<()> {
        self.into.flush()
    }
}

/// Reads a value from each line.
#[derive(Debug)]
pub struct LineReader<R: BufRead> {
    from: R,
    text: Vec<u8>,
    /// The number of the line that was read last, from 1 on.
    line: usize,
}

impl<R: BufRead> LineReader<R> {
    pub fn new(from: R) -> Self {
        Self { from, text: Vec::new(), line: 0 }
    }

    /// The next line's value, of at most `longest` bytes; none at the end. A line must be whole: what was cut off is no file's end.
    pub fn next<T: DeserializeOwned>(&mut self, longest: u64) -> Result<Option<T>, LinesError> {
        let value = self.line(longest)?.map(serde_json::from_slice).transpose();
        value.map_err(|error| self.wrong(error.to_string()))
    }

    /// As [`Self::next`], for lines that are no JSON: the next one without its end.
    pub fn line(&mut self, longest: u64) -> Result<Option<&[u8]>, LinesError> {
        self.text.clear();
        self.line += 1;
        let length = self.from.by_ref().take(longest + 1).read_until(b'\n', &mut self.text)? as u64;
        match self.text.split_last() {
            None => Ok(None),
            Some((b'\n', _)) => Ok(Some(&self.text[..self.text.len() - 1])),
            Some(_) if length > longest => Err(self.wrong(format!("it is longer than {longest} bytes"))),
            Some(_) => Err(self.wrong("it ends in the middle; the recording was cut off".to_owned())),
        }
    }

    /// What is wrong with the line that was read last. It may repeat the line's own words.
    pub fn wrong(&self, what: String) -> LinesError {
        LinesError::Line { line: self.line, what: harmless(&what) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_back_and_a_line_that_is_wrong_too_long_or_cut_off_is_told_by_its_number() {
        let (mut file, read) = (Vec::new(), |text: &[u8], longest| {
            let (mut reader, mut values) = (LineReader::new(text), Vec::new());
            loop {
                match reader.next::<u64>(longest) {
                    Ok(Some(value)) => values.push(value),
                    Ok(None) => return (values, String::new()),
                    Err(error) => return (values, error.to_string()),
                }
            }
        });
        let mut writer = LineWriter::new(&mut file);
        [7_u64, 1234].iter().for_each(|value| writer.line(value).unwrap());
        writer.flush().unwrap();
        assert_eq!(writer.bytes(), 7);
        assert_eq!(file, b"7\n1234\n");
        assert_eq!(read(&file, 5), (vec![7, 1234], String::new()));
        assert_eq!(read(&file, 4), (vec![7, 1234], String::new()), "as without the end of the line");
        assert_eq!(read(&file, 3), (vec![7], "line 2: it is longer than 3 bytes".to_owned()));
        assert_eq!(
            read(&file[..6], 5),
            (vec![7], "line 2: it ends in the middle; the recording was cut off".to_owned())
        );
        let (values, error) = read(b"7\n-1\n8\n", 5);
        assert_eq!(values, [7]);
        assert!(error.starts_with("line 2: invalid value"), "{error}");
    }
}
