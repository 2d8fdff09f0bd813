//! As much of HTTP/1.1 (RFC 9112) as one request and its answer need: bounded in bytes, and in time by one deadline for all of it.

use belay_transport::Deadline;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Longest answer, its head included.
pub const LONGEST: usize = 64 << 10;
/// Longest line that says a chunk's size.
const LONGEST_SIZE: usize = 256;
/// Most lines in its head.
const MOST_HEADERS: usize = 100;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("no connection")]
    Connect(#[source] io::Error),
    #[error("the connection failed")]
    Io(#[source] io::Error),
    #[error("no answer in time")]
    TimedOut,
    #[error("the connection ended after {got} bytes, before the answer did")]
    Short { got: usize },
    #[error("an answer of more than {LONGEST} bytes")]
    TooLong,
    #[error("no answer of HTTP/1: {0}")]
    NotHttp(&'static str),
}

impl HttpError {
    /// Whether the request cannot have been heard.
    pub fn was_not_sent(&self) -> bool {
        matches!(self, Self::Connect(_))
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

/// Posts `body` to `path` of the server at `host` (`HOST:PORT`), over a connection of its own. Resolving a name keeps the system's own limit.
pub fn post(host: &str, path: &str, body: &[u8], deadline: Deadline) -> Result<Answer, HttpError> {
    let mut stream = connect(host, deadline)?;
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let request = [head.as_bytes(), body].concat();
    let mut sent = 0;
    while sent < request.len() {
        stream.set_write_timeout(Some(left(deadline)?)).map_err(HttpError::Io)?;
        match stream.write(&request[sent..]) {
            Ok(0) => return Err(HttpError::Short { got: 0 }),
            Ok(count) => sent += count,
            Err(error) => again(error)?,
        }
    }
    let mut heard = Vec::new();
    let mut room = [0; 4096];
    loop {
        if let Some(answer) = parse(&heard, false)? {
            return Ok(answer);
        }
        stream.set_read_timeout(Some(left(deadline)?)).map_err(HttpError::Io)?;
        match stream.read(&mut room) {
            Ok(0) => return parse(&heard, true)?.ok_or(HttpError::Short { got: heard.len() }),
            Ok(count) => heard.extend_from_slice(&room[..count]),
            Err(error) => again(error)?,
        }
    }
}

fn connect(host: &str, deadline: Deadline) -> Result<TcpStream, HttpError> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in host.to_socket_addrs().map_err(HttpError::Connect)? {
        let left = deadline.left();
        if left.is_zero() {
            last = ErrorKind::TimedOut.into();
            break;
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(HttpError::Connect(last))
}

fn left(deadline: Deadline) -> Result<Duration, HttpError> {
    match deadline.left() {
        Duration::ZERO => Err(HttpError::TimedOut),
        left => Ok(left),
    }
}

/// Whether a read or write that failed so is tried again: the deadline is looked at before.
fn again(error: io::Error) -> Result<(), HttpError> {
    match error.kind() {
        ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(()),
        _ => Err(HttpError::Io(error)),
    }
}

/// The answer in what was `heard` so far, if it is all there. `ended`: nothing more will come.
pub fn parse(heard: &[u8], ended: bool) -> Result<Option<Answer>, HttpError> {
    if heard.len() > LONGEST {
        return Err(HttpError::TooLong);
    }
    let Some(head_bytes) = heard.windows(4).position(|end| end == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&heard[..head_bytes]).map_err(|_| HttpError::NotHttp("a head that is no text"))?;
    let rest = &heard[head_bytes + 4..];
    let mut lines = head.split("\r\n");
    let status = status(lines.next().unwrap_or_default())?;
    let (mut length, mut chunked) = (None, false);
    for (line, number) in lines.zip(0..) {
        let (name, value) = line.split_once(':').ok_or(HttpError::NotHttp("a header without a colon"))?;
        if number == MOST_HEADERS {
            return Err(HttpError::NotHttp("too many headers"));
        }
        let value = value.trim_matches([' ', '\t']);
        if name.eq_ignore_ascii_case("content-length") {
            let digits = !value.is_empty() && value.len() < 12 && value.bytes().all(|byte| byte.is_ascii_digit());
            let told = digits.then(|| value.parse::<usize>().ok()).flatten();
            let told = told.ok_or(HttpError::NotHttp("a length that is no number"))?;
            if length.replace(told).is_some_and(|before| before != told) {
                return Err(HttpError::NotHttp("two lengths"));
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err(HttpError::NotHttp("an encoding that is not chunked"));
            }
            chunked = true;
        }
    }
    let body = match (chunked, length) {
        (true, Some(_)) => return Err(HttpError::NotHttp("a length beside chunks")),
        (true, None) => chunks(rest)?,
        (false, Some(length)) if length > LONGEST => return Err(HttpError::TooLong),
        (false, Some(length)) => rest.get(..length).map(<[u8]>::to_vec),
        // Until the end; what was cut off is then for the reader of the body to notice.
        (false, None) => ended.then(|| rest.to_vec()),
    };
    Ok(body.map(|body| Answer { status, body }))
}

/// `HTTP/1.1 200 OK`
fn status(line: &str) -> Result<u16, HttpError> {
    let not_http = HttpError::NotHttp("its first line is none of HTTP/1");
    let Some(rest) = line.strip_prefix("HTTP/1.1 ").or_else(|| line.strip_prefix("HTTP/1.0 ")) else {
        return Err(not_http);
    };
    let digits = rest.split(' ').next().unwrap_or_default();
    match digits.parse::<u16>() {
        Ok(status) if digits.len() == 3 && (200..600).contains(&status) => Ok(status),
        _ => Err(not_http),
    }
}

/// The body that comes in chunks, if the last one is there.
fn chunks(mut rest: &[u8]) -> Result<Option<Vec<u8>>, HttpError> {
    let mut body = Vec::new();
    loop {
        // A size and its extensions, which nobody here asks for.
        let end = match rest.windows(2).position(|end| end == b"\r\n") {
            Some(end) if end < LONGEST_SIZE => end,
            None if rest.len() <= LONGEST_SIZE => return Ok(None),
            _ => return Err(HttpError::NotHttp("a chunk without a size")),
        };
        let line = std::str::from_utf8(&rest[..end]).map_err(|_| HttpError::NotHttp("a chunk's size is no text"))?;
        let digits = line.split(';').next().unwrap_or_default().trim_end();
        let is_size = !digits.is_empty() && digits.len() <= 8 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let size = is_size.then(|| usize::from_str_radix(digits, 16).ok()).flatten();
        let size = size.ok_or(HttpError::NotHttp("a chunk's size is no number"))?;
        if size > LONGEST {
            return Err(HttpError::TooLong);
        }
        rest = &rest[end + 2..];
        if size == 0 {
            // What follows the last chunk says nothing that matters here.
            return Ok(Some(body));
        }
        let Some(chunk) = rest.get(..size + 2) else { return Ok(None) };
        if &chunk[size..] != b"\r\n" {
            return Err(HttpError::NotHttp("a chunk that does not end where it says"));
        }
        body.extend_from_slice(&chunk[..size]);
        rest = &rest[size + 2..];
    }
}
