//! Moving bytes between a socket and a mapping.
//!
//! Guest memory is never a slice: the kernel is given its addresses (iovec), or, under TLS, it is copied to and from private
//! buffers. Offsets are checked where a peer or a caller names them; here they are checked again, against the mapping only.

use crate::region::Mapping;
use crate::session::{Raw, pull_tls, push_tls};
use std::io::{self, BufRead, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Copied at once between a mapping and TLS: one TLS record.
const TLS_CHUNK_BYTES: usize = 16 << 10;

/// A list of memory pieces for one system call. Filled and used within one call of its owner; between calls its
/// addresses are stale and nobody reads them.
pub(super) struct Pieces(Vec<libc::iovec>);

// SAFETY: the addresses in it are used only between `clear` and the system call that follows, on one thread, while their
// owner is borrowed; moving the list to another thread between such calls moves numbers.
unsafe impl Send for Pieces {}

impl Pieces {
    pub(super) fn with_capacity(pieces: usize) -> Self {
        Self(Vec::with_capacity(pieces))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds `len` bytes of a mapping; panics when they are not within it.
    pub(super) fn push_mapping(&mut self, mapping: &Mapping, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= mapping.len()), "{offset}+{len} outside a mapping");
        // SAFETY: offset is within the mapping (checked above).
        let start = unsafe { mapping.as_ptr().add(offset) };
        self.0.push(libc::iovec { iov_base: start.cast(), iov_len: len });
    }

    /// Adds private bytes. They must stay where they are until the system call.
    pub(super) fn push_bytes(&mut self, bytes: &mut [u8]) {
        self.0.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
    }

    /// Drops the first `bytes` bytes of what the list names. `from` is the first piece that is still whole or in part there.
    fn skip(&mut self, from: &mut usize, mut bytes: usize) {
        while bytes > 0 {
            let piece = &mut self.0[*from];
            let step = bytes.min(piece.iov_len);
            // SAFETY: `step` is at most the piece's length, so the result is in it or one past its end.
            piece.iov_base = unsafe { piece.iov_base.cast::<u8>().add(step) }.cast();
            piece.iov_len -= step;
            bytes -= step;
            if piece.iov_len == 0 {
                *from += 1;
            }
        }
    }

    /// One sendmsg(2) or recvmsg(2) over the pieces from `from` on.
    fn call(
        &mut self,
        fd: BorrowedFd<'_>,
        from: usize,
        flags: i32,
        call: unsafe fn(i32, *mut libc::msghdr, i32) -> isize,
    ) -> io::Result<usize> {
        // SAFETY: an all-zero msghdr is a valid one: no address, no vector, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.0[from..].as_mut_ptr();
        message.msg_iovlen = self.0.len() - from;
        loop {
            // SAFETY: `message` names a live vector of pieces, each either in a mapping whose owner is borrowed by the caller
            // or in private memory that outlives this call; `call` is sendmsg or recvmsg, which use them only within it.
            let done = unsafe { call(fd.as_raw_fd(), &raw mut message, flags) };
            if let Ok(done) = usize::try_from(done) {
                return Ok(done);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Receives into the pieces what there is, without waiting. `Ok(0)`: the peer has closed.
    pub(super) fn receive(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.call(fd, 0, libc::MSG_DONTWAIT, recvmsg)
    }

    /// Sends the pieces from position `from` on as far as the socket takes them; `true` once all are sent. Blocks if the
    /// socket does.
    pub(super) fn send(&mut self, fd: BorrowedFd<'_>, from: &mut usize) -> io::Result<bool> {
        while *from < self.0.len() {
            let sent = self.call(fd, *from, libc::MSG_NOSIGNAL, sendmsg)?;
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.skip(from, sent);
        }
        Ok(true)
    }
}

/// recvmsg(2) with the type of [`Pieces::call`].
///
/// # Safety
/// `message` must be valid, and the vector it names writable for as long as the call lasts.
unsafe fn recvmsg(fd: i32, message: *mut libc::msghdr, flags: i32) -> isize {
    // SAFETY: handed on from the caller.
    unsafe { libc::recvmsg(fd, message, flags) }
}

/// sendmsg(2) with the type of [`Pieces::call`].
///
/// # Safety
/// `message` must be valid, and the vector it names readable for as long as the call lasts.
unsafe fn sendmsg(fd: i32, message: *mut libc::msghdr, flags: i32) -> isize {
    // SAFETY: handed on from the caller.
    unsafe { libc::sendmsg(fd, message, flags) }
}

/// Receives up to `len` bytes straight into a mapping; blocks if the socket does.
pub(super) fn receive_into(fd: BorrowedFd<'_>, mapping: &Mapping, offset: usize, len: usize) -> io::Result<usize> {
    assert!(offset.checked_add(len).is_some_and(|end| end <= mapping.len()), "{offset}+{len} outside a mapping");
    loop {
        // SAFETY: offset is within the mapping (checked above).
        let start = unsafe { mapping.as_ptr().add(offset) };
        // SAFETY: `start` is good for `len` bytes (checked above) of memory that the kernel writes and nobody refers to.
        let got = unsafe { libc::recv(fd.as_raw_fd(), start.cast(), len, 0) };
        if let Ok(got) = usize::try_from(got) {
            return Ok(got);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Reads at least one decrypted byte; `Ok(0)` at the end of the stream. Blocks if the socket does.
pub(super) fn tls_read(fd: BorrowedFd<'_>, tls: &mut rustls::Connection, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match tls.reader().read(into) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
            done => return done,
        }
        if !pull_tls(fd, tls)? {
            return Ok(0);
        }
    }
}

/// Offers `use_it` the decrypted bytes there are (it says how many it took), fetching some first if there are none.
/// `Ok(0)` at the end of the stream.
pub(super) fn tls_take(
    fd: BorrowedFd<'_>,
    tls: &mut rustls::Connection,
    use_it: impl FnOnce(&[u8]) -> usize,
) -> io::Result<usize> {
    loop {
        let mut reader = tls.reader();
        match reader.fill_buf() {
            Ok([]) => return Ok(0),
            Ok(bytes) => {
                let used = use_it(bytes);
                reader.consume(used);
                return Ok(used);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
            Err(error) => return Err(error),
        }
        if !pull_tls(fd, tls)? {
            return Ok(0);
        }
    }
}

/// Gives TLS `bytes` from `done` on, sending what it holds whenever its buffer is full. `done` grows by what was taken.
/// `WouldBlock` from a non-blocking socket means: not all has left yet, whatever `done` says.
pub(super) fn tls_send(
    fd: BorrowedFd<'_>,
    tls: &mut rustls::Connection,
    bytes: &[u8],
    done: &mut usize,
) -> io::Result<()> {
    while *done < bytes.len() {
        match tls.writer().write(&bytes[*done..])? {
            0 => push_tls(fd, tls)?,
            taken => *done += taken,
        }
    }
    Ok(())
}

/// As [`tls_send`], for `len` bytes of a mapping at `offset`.
pub(super) fn tls_send_mapped(
    fd: BorrowedFd<'_>,
    tls: &mut rustls::Connection,
    (mapping, offset, len): (&Mapping, usize, usize),
    done: &mut usize,
) -> io::Result<()> {
    let mut chunk = [0; TLS_CHUNK_BYTES];
    while *done < len {
        let size = TLS_CHUNK_BYTES.min(len - *done);
        mapping.read(offset + *done, &mut chunk[..size]);
        match tls.writer().write(&chunk[..size])? {
            0 => push_tls(fd, tls)?,
            taken => *done += taken,
        }
    }
    Ok(())
}

/// Sends what TLS holds.
pub(super) fn tls_flush(fd: BorrowedFd<'_>, tls: &mut rustls::Connection) -> io::Result<()> {
    push_tls(fd, tls)
}

/// Writes plain bytes; blocks if the socket does.
pub(super) fn send_bytes(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    Raw(fd).write(bytes)
}

/// Reads plain bytes; blocks if the socket does.
pub(super) fn receive_bytes(fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    Raw(fd).read(into)
}
