//! The Network Block Device protocol as a server speaks it, as far as QEMU needs it (NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle
//! handshake, simple replies; reads, writes, zeroes and flushes.

use super::log::MOST_WRITE_BYTES;
use std::io::{self, Read, Write};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// Fixed newstyle, and no 124 zeroes behind an export.
const HANDSHAKE_FLAGS: u16 = 1 | 2;
/// There are flags; FLUSH and WRITE_ZEROES are understood.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 6;
/// The one flag of a request that is understood: no hole where there are zeroes.
const NO_HOLE: u16 = 1 << 1;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 1 << 31 | 1;
const REP_INVALID: u32 = 1 << 31 | 3;
const REP_UNKNOWN: u32 = 1 << 31 | 6;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// Longest option: a name may have 4,096 bytes, and there is little else.
const MOST_OPTION_BYTES: u32 = 8192;
/// Options that one client may ask about before it says which export it wants.
const MOST_OPTIONS: usize = 64;
/// Bytes of a request without what it writes.
pub const REQUEST_BYTES: usize = 28;
/// Blocks: the least and the best size of a request.
const BLOCKS: [u32; 3] = [512, 4096, MOST_WRITE_BYTES];

/// What is done to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Read,
    Write,
    /// The client is gone after this.
    Disconnect,
    Flush,
    WriteZeroes,
    /// One that is not understood, or has flags that are not.
    Other,
}

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub command: Command,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

/// A failure as the protocol tells it: numbers of Linux.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Failure {
    NotPermitted = 1,
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    NotSupported = 95,
}

/// What ends a connection: the client does not speak this protocol, or is gone.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    #[error("the client speaks something else: {0}")]
    Odd(&'static str),
    #[error("the client wants the export `{0}`")]
    Export(String),
    #[error("the client left")]
    Left,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Request {
    /// Reads the head of a request.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, NbdError> {
        let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if u32_at(0) != REQUEST_MAGIC {
            return Err(NbdError::Odd("a request without its magic number"));
        }
        let command = match (u16_at(6), u16_at(4)) {
            (0, 0) => Command::Read,
            (1, 0) => Command::Write,
            (2, _) => Command::Disconnect,
            (3, 0) => Command::Flush,
            (6, flags) if flags & !NO_HOLE == 0 => Command::WriteZeroes,
            // What it would write cannot be told from the next request.
            (1, _) => return Err(NbdError::Odd("a write with flags that were not offered")),
            _ => Command::Other,
        };
        Ok(Self { command, cookie: u64_at(8), offset: u64_at(16), len: u32_at(24) })
    }

    /// Why it cannot be done to a disk of so many bytes, if it cannot. A write that is too long ends the connection instead.
    pub fn refused(&self, disk_bytes: u64) -> Option<Failure> {
        let end = self.offset.checked_add(u64::from(self.len));
        let within = self.len > 0 && end.is_some_and(|end| end <= disk_bytes);
        match self.command {
            Command::Read if self.len > MOST_WRITE_BYTES => Some(Failure::Invalid),
            Command::Read | Command::WriteZeroes if !within => Some(Failure::Invalid),
            Command::Write if !within => Some(Failure::NoSpace),
            Command::Other => Some(Failure::NotSupported),
            _ => None,
        }
    }
}

/// The head of the answer to a request; what was read follows it.
pub fn reply(cookie: u64, failure: Option<Failure>) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&failure.map_or(0, |failure| failure as u32).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Greets a client and comes to an agreement on the export `name` of so many bytes.
pub fn shake_hands(stream: &mut (impl Read + Write), name: &str, disk_bytes: u64) -> Result<(), NbdError> {
    let greeting = [b"NBDMAGIC", &OPTION_MAGIC.to_be_bytes()[..], &HANDSHAKE_FLAGS.to_be_bytes()].concat();
    stream.write_all(&greeting)?;
    let flags = u32::from_be_bytes(take(stream)?);
    if flags & !u32::from(HANDSHAKE_FLAGS) != 0 || flags & 1 == 0 {
        return Err(NbdError::Odd("flags that were not offered, or no fixed newstyle handshake"));
    }
    for _ in 0..MOST_OPTIONS {
        if u64::from_be_bytes(take(stream)?) != OPTION_MAGIC {
            return Err(NbdError::Odd("an option without its magic number"));
        }
        let (option, len) = (u32::from_be_bytes(take(stream)?), u32::from_be_bytes(take(stream)?));
        if len > MOST_OPTION_BYTES {
            return Err(NbdError::Odd("an option that is too long"));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        match option {
            OPT_EXPORT_NAME if data == name.as_bytes() => {
                let mut answer = [&disk_bytes.to_be_bytes()[..], &TRANSMISSION_FLAGS.to_be_bytes()].concat();
                if flags & 2 == 0 {
                    answer.resize(answer.len() + 124, 0);
                }
                stream.write_all(&answer)?;
                return Ok(());
            }
            // This option has no other way to say no.
            OPT_EXPORT_NAME => return Err(NbdError::Export(printable(&data))),
            OPT_ABORT => {
                answer(stream, option, REP_ACK, &[])?;
                return Err(NbdError::Left);
            }
            OPT_LIST => {
                let server = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat();
                answer(stream, option, REP_SERVER, &server)?;
                answer(stream, option, REP_ACK, &[])?;
            }
            OPT_INFO | OPT_GO => match wanted(&data) {
                Some(wanted) if wanted == name.as_bytes() => {
                    let export =
                        [&INFO_EXPORT.to_be_bytes()[..], &disk_bytes.to_be_bytes(), &TRANSMISSION_FLAGS.to_be_bytes()];
                    answer(stream, option, REP_INFO, &export.concat())?;
                    let mut sizes = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
                    BLOCKS.iter().for_each(|size| sizes.extend(size.to_be_bytes()));
                    answer(stream, option, REP_INFO, &sizes)?;
                    answer(stream, option, REP_ACK, &[])?;
                    if option == OPT_GO {
                        return Ok(());
                    }
                }
                Some(other) => {
                    answer(stream, option, REP_UNKNOWN, format!("the export here is `{name}`").as_bytes())?;
                    if option == OPT_GO {
                        return Err(NbdError::Export(printable(other)));
                    }
                }
                None => answer(stream, option, REP_INVALID, &[])?,
            },
            _ => answer(stream, option, REP_UNSUPPORTED, &[])?,
        }
    }
    Err(NbdError::Odd("option after option"))
}

/// The name in the data of INFO and GO: length, name, number of informations wanted, and which.
fn wanted(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    (rest.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some(name)
}

fn printable(name: &[u8]) -> String {
    String::from_utf8_lossy(name).replace(char::is_control, "?")
}

fn take<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn answer(stream: &mut impl Write, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for word in [option, kind, data.len() as u32] {
        bytes.extend(word.to_be_bytes());
    }
    bytes.extend_from_slice(data);
    stream.write_all(&bytes)
}

/// A client that says these bytes, and its own end then: the handshake ends, and so does every request after it.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    struct Client<'b>(&'b [u8], usize);
    impl Read for Client<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.0.read(into)
        }
    }
    impl Write for Client<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut client = Client(bytes, 0);
    let agreed = shake_hands(&mut client, "disk", 1 << 20).is_ok();
    assert!(client.1 <= 18 + MOST_OPTIONS * 200, "{} bytes were answered", client.1);
    let requests = if agreed { client.0 } else { bytes };
    for request in requests.as_chunks::<REQUEST_BYTES>().0 {
        let Ok(request) = Request::decode(request) else { continue };
        if request.refused(1 << 20).is_none() && matches!(request.command, Command::Read | Command::Write) {
            assert!(request.len > 0 && request.offset + u64::from(request.len) <= 1 << 20);
        }
    }
}
