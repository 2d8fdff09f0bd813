//! Frames over a Unix stream socket, with room for one descriptor each.

use belay_transport::Deadline;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// How much a receive asks for at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Longest body: the dirty words of the largest guest, or a state.
const MAX_BODY_BYTES: usize = 64 << 20;

/// Sends one frame.
pub(crate) fn send<T: Serialize>(mut stream: &UnixStream, message: &T, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut bytes = vec![0; 4];
    bytes = postcard::to_extend(message, bytes).map_err(io::Error::other)?;
    let len = bytes.len() - 4;
    if len > MAX_BODY_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a frame of {len} bytes")));
    }
    bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
    let mut sent = 0;
    if let Some(fd) = fd {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        sent = loop {
            match sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                done => break done?,
            }
        };
    }
    stream.write_all(&bytes[sent..])
}

/// Receives one frame; `None` when the other side has closed between two frames.
pub(crate) fn receive<T: DeserializeOwned>(stream: &UnixStream) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    receive_within(stream, MAX_BODY_BYTES, None)
}

/// As [`receive`], of at most `most` bytes, and all of it by `deadline` if there is one (the socket's read timeout is then set).
pub(crate) fn receive_within<T: DeserializeOwned>(
    mut stream: &UnixStream,
    most: usize,
    deadline: Option<Deadline>,
) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let hurry = || match deadline.map(|deadline| deadline.left()) {
        Some(left) if left.is_zero() => Err(io::Error::from(io::ErrorKind::TimedOut)),
        Some(left) => stream.set_read_timeout(Some(left)),
        None => Ok(()),
    };
    let (mut head, mut filled, mut fd) = ([0; 4], 0, None);
    while filled < head.len() {
        hurry()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut head[filled..])];
        let got = match recvmsg(stream, into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            got => got?.bytes,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fds.for_each(|received| fd = Some(received));
            }
        }
        match (got, filled) {
            (0, 0) => return Ok(None),
            (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => filled += got,
        }
    }
    let len = u32::from_le_bytes(head) as usize;
    if len > most {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {len} bytes")));
    }
    // Memory follows what has arrived, never what a length promises.
    let (mut body, mut filled) = (Vec::new(), 0);
    while filled < len {
        hurry()?;
        body.resize(len.min(filled + CHUNK_BYTES), 0);
        match stream.read(&mut body[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => filled += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let message = postcard::from_bytes(&body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, fd)))
}
