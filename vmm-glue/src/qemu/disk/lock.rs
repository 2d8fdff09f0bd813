//! An image's locks, as QEMU has them (block/file-posix.c): a byte is locked for each thing that one does with the image, and another for each
//! thing that nobody else may do. So a QEMU on the image, another relay and `qemu-img` all keep out, and are kept out.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Where the bytes for what is done, and for what nobody else may do, begin.
const DONE: i64 = 100;
const KEPT_FROM_OTHERS: i64 = 200;
/// Numbers of the bytes: reading what makes sense, writing, changing the length.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

fn lock_of(kind: i32, start: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: 1, l_pid: 0 }
}

/// Shares one byte with whoever else shares it.
fn share(file: &File, byte: i64) -> io::Result<()> {
    let lock = lock_of(libc::F_RDLCK, byte);
    // SAFETY: the descriptor is open, and F_OFD_SETLK reads a struct flock that lives through the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether somebody else has that byte.
fn is_held(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = lock_of(libc::F_WRLCK, byte);
    // SAFETY: the descriptor is open, and F_OFD_GETLK writes a struct flock that lives through the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } {
        0 => Ok(i32::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes the image as the only one that writes; others may read. False: somebody else writes it, or wants nobody to. The lock ends with
/// the file.
pub fn take_for_writing(file: &File) -> io::Result<bool> {
    for byte in [DONE + READ, DONE + WRITE, DONE + RESIZE, KEPT_FROM_OTHERS + WRITE, KEPT_FROM_OTHERS + RESIZE] {
        share(file, byte)?;
    }
    // All were taken before any is looked at: of two who come at once neither may get it, and never both.
    for byte in
        [KEPT_FROM_OTHERS + READ, KEPT_FROM_OTHERS + WRITE, KEPT_FROM_OTHERS + RESIZE, DONE + WRITE, DONE + RESIZE]
    {
        if is_held(file, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}
