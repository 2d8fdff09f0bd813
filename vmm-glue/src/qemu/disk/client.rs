//! One QEMU that is connected: its requests, one after the other.

use super::log::MOST_WRITE_BYTES;
use super::nbd::{Command, Failure, NbdError, REQUEST_BYTES, Request, reply, shake_hands};
use super::overlay::Overlay;
use super::server::{Core, Mode, Shared, told_to_guest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::MutexGuard;
use std::time::Duration;

/// Longest that a client may take to say which export it wants.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Between two looks whether a guest that waits is still connected.
const LOOK: Duration = Duration::from_millis(200);

/// Serves one client until it leaves, or says what is no request.
pub(super) fn serve(shared: &Shared, mut stream: UnixStream, pid: u32) {
    // Whoever it was: one client's end is nobody else's.
    let _ = talk(shared, &mut stream, pid);
}

fn talk(shared: &Shared, stream: &mut UnixStream, pid: u32) -> Result<(), NbdError> {
    stream.set_read_timeout(Some(HANDSHAKE))?;
    shake_hands(stream, &shared.name, shared.disk_bytes)?;
    stream.set_read_timeout(None)?;
    loop {
        let mut head = [0; REQUEST_BYTES];
        stream.read_exact(&mut head)?;
        let request = Request::decode(&head)?;
        let mut data = Vec::new();
        if request.command == Command::Write {
            if request.len > MOST_WRITE_BYTES {
                return Err(NbdError::Odd("a write that is longer than was offered"));
            }
            data.resize(request.len as usize, 0);
            stream.read_exact(&mut data)?;
        }
        let done = match request.refused(shared.disk_bytes) {
            Some(failure) => Err(failure),
            None => match request.command {
                Command::Disconnect => return Err(NbdError::Left),
                Command::Read => read(shared, stream, &request),
                _ => write(shared, stream, pid, &request, data).map(|()| Vec::new()),
            },
        };
        stream.write_all(&reply(request.cookie, done.as_ref().err().copied()))?;
        if let Ok(bytes) = done {
            stream.write_all(&bytes)?;
        }
    }
}

/// Waits while nobody has a guest's relay in hand that came, or there is no room for what it writes.
fn admitted<'s>(shared: &'s Shared, stream: &UnixStream, writes: bool) -> Result<MutexGuard<'s, Core>, Failure> {
    let mut core = shared.lock();
    loop {
        let Mode::Covered(covered) = &core.mode else { return Ok(core) };
        let held = core.hand.is_some() || shared.wants_own(&core);
        if held && (!writes || core.has_room(&covered.overlay)) {
            return Ok(core);
        }
        drop(core);
        if has_left(stream) {
            return Err(Failure::Io);
        }
        core = shared.wait(shared.lock(), LOOK);
    }
}

fn has_left(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

fn read(shared: &Shared, stream: &UnixStream, request: &Request) -> Result<Vec<u8>, Failure> {
    let mut bytes = vec![0; request.len as usize];
    let core = admitted(shared, stream, false)?;
    let failed = |error: std::io::Error| told_to_guest(&error);
    let holes: Vec<Range<u64>> = match &core.mode {
        Mode::Open(image) | Mode::Away(image) => {
            image.read(request.offset, &mut bytes).map_err(failed)?;
            return Ok(bytes);
        }
        // What lies over the image first: what is not there now has been in the image before now.
        Mode::Covered(covered) => covered.overlay.read(request.offset, &mut bytes),
        Mode::Waiting => Overlay::default().read(request.offset, &mut bytes),
    };
    drop(core);
    for hole in holes {
        let here = (hole.start - request.offset) as usize..(hole.end - request.offset) as usize;
        shared.storage.read(hole.start, &mut bytes[here]).map_err(failed)?;
    }
    Ok(bytes)
}

/// Writes, zeroes and flushes.
fn write(shared: &Shared, stream: &UnixStream, pid: u32, request: &Request, data: Vec<u8>) -> Result<(), Failure> {
    let flushes = request.command == Command::Flush;
    let mut core = admitted(shared, stream, true)?;
    // A flush by whoever writes nothing is done when nothing has been done.
    let is_writer = core.is_writer(pid);
    if !is_writer && !flushes {
        return Err(Failure::NotPermitted);
    }
    let Request { command, offset, len, .. } = *request;
    let done = match &mut core.mode {
        Mode::Open(image) => match command {
            Command::Write => image.write(offset, &data),
            Command::WriteZeroes => image.zero(offset, len),
            _ => image.sync(),
        },
        Mode::Covered(covered) => {
            match command {
                Command::Write => covered.overlay.write(offset, data.into()),
                Command::WriteZeroes => covered.overlay.zero(offset, len),
                _ if is_writer => covered.overlay.flush(),
                _ => {}
            }
            Ok(())
        }
        Mode::Waiting | Mode::Away(_) if flushes => Ok(()),
        Mode::Waiting | Mode::Away(_) => return Err(Failure::NotPermitted),
    };
    done.map_err(|error| told_to_guest(&error))
}
