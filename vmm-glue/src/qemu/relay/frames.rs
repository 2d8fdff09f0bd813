//! Frames over a byte stream, as QEMU's `-netdev stream` has them: four bytes of length, most significant first, then the frame
//! (QEMU net/net.c, `net_fill_rstate`). Sockets here never block.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

/// Longest frame that QEMU takes or sends (`NET_BUFSIZE`: 64 KiB of segment and 4 KiB around it), and one byte for [`super::messages`].
pub const MAX_FRAME_BYTES: usize = (4096 + 65536) + 1;
/// How much a read asks for at once.
const CHUNK_BYTES: usize = 64 << 10;

/// A stream that is not one of frames. Nothing after this can be understood: the connection is given up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {bytes} bytes was announced; frames have 1 to {MAX_FRAME_BYTES}")]
pub struct FramesError {
    pub bytes: usize,
}

/// Takes frames out of what comes, however it was cut.
#[derive(Debug, Default)]
pub struct Frames {
    buffer: Vec<u8>,
    /// Up to where `buffer` was taken.
    taken: usize,
}

/// What one read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    Bytes(usize),
    Nothing,
    End,
}

impl Frames {
    /// Reads once.
    pub(super) fn fill(&mut self, from: &mut impl Read) -> io::Result<Came> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let old = self.buffer.len();
        self.buffer.resize(old + CHUNK_BYTES, 0);
        let read = loop {
            match from.read(&mut self.buffer[old..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        self.buffer.truncate(old + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Ok(Came::End),
            Ok(bytes) => Ok(Came::Bytes(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Came::Nothing),
            Err(error) => Err(error),
        }
    }

    /// Bytes as they came, for those who read elsewhere.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if one is here.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, FramesError> {
        let rest = &self.buffer[self.taken..];
        let Some((length, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let bytes = u32::from_be_bytes(*length) as usize;
        if bytes == 0 || bytes > MAX_FRAME_BYTES {
            return Err(FramesError { bytes });
        }
        if rest.len() < bytes {
            return Ok(None);
        }
        let start = self.taken + 4;
        self.taken = start + bytes;
        Ok(Some(&self.buffer[start..self.taken]))
    }

    /// Whether part of a frame has come and the rest of it has not.
    pub(super) fn is_torn(&self) -> bool {
        self.taken < self.buffer.len()
    }
}

/// Frames on their way out. Bounded: what has no room is not taken, and never half of a frame.
#[derive(Debug)]
pub(super) struct Queue {
    bytes: VecDeque<u8>,
    most: usize,
}

impl Queue {
    /// With room for `most` bytes, lengths included.
    pub(super) fn new(most: usize) -> Self {
        Self { bytes: VecDeque::new(), most }
    }

    /// Takes a frame of `parts` laid end to end, if there is room for all of it.
    pub(super) fn push(&mut self, parts: &[&[u8]]) -> bool {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        if bytes == 0 || bytes > MAX_FRAME_BYTES || self.bytes.len() + 4 + bytes > self.most {
            return false;
        }
        self.bytes.extend((bytes as u32).to_be_bytes());
        parts.iter().for_each(|part| self.bytes.extend(*part));
        true
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Writes what can be written now.
    pub(super) fn flush(&mut self, to: &mut impl Write) -> io::Result<()> {
        while !self.bytes.is_empty() {
            match to.write(self.bytes.as_slices().0) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.bytes.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Queue {
    /// All that waits, in order; nothing waits then.
    pub(super) fn take(&mut self) -> VecDeque<u8> {
        std::mem::take(&mut self.bytes)
    }
}
