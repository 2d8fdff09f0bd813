//! The leanest loops that do the same work, for comparison. Nothing of belay is used here: system calls, memcpy, a socket.
//!
//! * fault: wait for a fault, copy the page (or ask for it over TCP), CONTINUE; or, of memory whose frames cannot be shared, COPY.
//! * replay: the same loop, for threads that touch what a trace has, with time between.
//! * ask: ask for a page over TCP, and no more.
//! * sweep: copy (or receive) a chunk, CONTINUE it, next chunk.
//! * memcpy and stream: the same bytes without userfaultfd.
//! * scattered: copy pages from all over a guest's memory, as the staging of a checkpoint must.

mod replay;
mod scan;
mod scattered;

use crate::cores::{self, Cores};
use linux_raw_sys::general as raw;
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_REGISTER};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use replay::{Step, replay};
pub use scan::Scan;
pub use scattered::Scattered;

pub const PAGE: usize = 4096;
/// Empty looks at the userfaultfd before the fault loop sleeps.
const SPINS: u32 = 200;

/// What one round of faults took, in nanoseconds.
#[derive(Default)]
pub struct Faults {
    /// As the touching thread saw it.
    pub toucher: Vec<u64>,
    /// From event read to page shown, in the serving thread.
    pub server: Vec<u64>,
}

/// Where the bytes come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    Memory,
    Tcp,
}

/// A shared mapping.
struct Map {
    at: *mut u8,
    len: usize,
}

// SAFETY: plain shared memory, used through raw copies only.
unsafe impl Sync for Map {}
// SAFETY: as above.
unsafe impl Send for Map {}

impl Map {
    fn new(fd: BorrowedFd<'_>, len: usize, populate: bool) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a null hint replaces no mapping.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if populate {
            // SAFETY: the range is the mapping just made.
            check(unsafe { libc::madvise(at, len, libc::MADV_POPULATE_WRITE) })?;
        }
        Ok(Self { at: at.cast(), len })
    }

    fn page(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= self.len);
        self.at.wrapping_add(offset)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; nothing refers to it any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

fn check(outcome: i32) -> io::Result<i32> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome) }
}

fn memfd(len: usize) -> io::Result<OwnedFd> {
    memfd_of(len, PAGE)
}

/// Of pages of 4 KiB or of 2 MiB.
fn memfd_of(len: usize, page: usize) -> io::Result<OwnedFd> {
    let huge = if page == PAGE { 0 } else { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB };
    // SAFETY: the name is NUL-terminated.
    let fd = check(unsafe { libc::memfd_create(c"floor".as_ptr(), libc::MFD_CLOEXEC | huge) })?;
    // SAFETY: the kernel just made it and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: ftruncate touches no memory of ours.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), len as i64) })?;
    Ok(fd)
}

fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: both come from `Map::page`, valid for `len`, of different mappings.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
}

/// What is pulled: made once, like the engine's, so that neither side finds its bytes warmer in the caches.
pub struct Source(Map);

impl Source {
    pub fn new(len: usize) -> io::Result<Self> {
        Map::new(memfd(len)?.as_fd(), len, true).map(Self)
    }
}

/// Memory that faults, and its alias.
struct Memory {
    alias: Map,
    guest: Map,
    uffd: OwnedFd,
    fault: Fault,
}

/// What one fault brings.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Bytes of a page: 4 KiB or 2 MiB.
    pub page: usize,
    /// COPY from where the bytes are, instead of writing them to the page's alias and CONTINUE.
    pub copy: bool,
    /// Where the serving thread and the touching ones are kept.
    pub cores: Option<Cores>,
}

/// Pages of 4 KiB, written through an alias.
pub const SMALL: Fault = Fault { page: PAGE, copy: false, cores: None };

impl Memory {
    fn new(len: usize, fault: Fault) -> io::Result<Self> {
        let file = memfd_of(len, fault.page)?;
        let (alias, guest) = (Map::new(file.as_fd(), len, !fault.copy)?, Map::new(file.as_fd(), len, false)?);
        // SAFETY: the system call takes its flags by value.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        // SAFETY: checked to be a descriptor the kernel just made.
        let uffd = unsafe { OwnedFd::from_raw_fd(check(fd as i32)?) };
        let mut api = raw::uffdio_api { api: u64::from(raw::UFFD_API), features: 0, ioctls: 0 };
        ioctl(&uffd, UFFDIO_API, &mut api)?;
        let range = raw::uffdio_range { start: guest.at as u64, len: len as u64 };
        let minor = if fault.copy { 0 } else { raw::UFFDIO_REGISTER_MODE_MINOR };
        let mode = u64::from(raw::UFFDIO_REGISTER_MODE_MISSING | minor);
        ioctl(&uffd, UFFDIO_REGISTER, &mut raw::uffdio_register { range, mode, ioctls: 0 })?;
        Ok(Self { alias, guest, uffd, fault })
    }

    /// Answers a fault with the page at `from`, after `wait`.
    fn answer(&self, offset: usize, from: *const u8, wait: impl FnOnce()) -> io::Result<()> {
        let page = self.fault.page;
        if !self.fault.copy {
            copy(from, self.alias.page(offset, page), page);
            wait();
            return self.show(offset, page);
        }
        wait();
        let (dst, src) = (self.guest.page(offset, page) as u64, from as u64);
        ioctl(&self.uffd, UFFDIO_COPY, &mut raw::uffdio_copy { dst, src, len: page as u64, mode: 0, copy: 0 })
    }

    #[inline]
    fn show(&self, offset: usize, len: usize) -> io::Result<()> {
        let range = raw::uffdio_range { start: self.guest.at as u64 + offset as u64, len: len as u64 };
        ioctl(&self.uffd, UFFDIO_CONTINUE, &mut raw::uffdio_continue { range, mode: 0, mapped: 0 })
    }
}

#[inline]
fn ioctl<T>(fd: &OwnedFd, request: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller pairs a request with the kernel's struct for it.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), u64::from(request), std::ptr::from_mut(argument)) }).map(|_| ())
}

/// Touches the pages of `order` one after the other while the leanest loop serves them. `wait`: before a page is shown the loop
/// stays awake for so long, as if a wire had been waited for.
pub fn faults(wire: Wire, source: &Source, order: &[usize], wait: Duration) -> io::Result<Faults> {
    faults_of(wire, source, SMALL, &[order], wait).map(|(faults, _)| faults)
}

/// As [`faults`], with a touching thread for each of `orders` and pages of another kind; also how long all touches took together.
pub fn faults_of(
    wire: Wire,
    Source(source): &Source,
    fault: Fault,
    orders: &[&[usize]],
    wait: Duration,
) -> io::Result<(Faults, Duration)> {
    served(wire, source, fault, wait, orders, |memory, order| touch(memory, order))
}

/// Serves what a thread for each of `threads` touches; also how long all touches took together.
fn served<T: Sync>(
    wire: Wire,
    source: &Map,
    fault: Fault,
    wait: Duration,
    threads: &[T],
    touch: impl Fn(&Memory, &T) -> Vec<u64> + Sync,
) -> io::Result<(Faults, Duration)> {
    let memory = Memory::new(source.len, fault)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let peer = match wire {
            Wire::Memory => None,
            Wire::Tcp => Some(connect(scope, source, fault.page)?),
        };
        let server = scope.spawn(|| {
            fault.cores.inspect(|cores| cores::keep_on(cores.server));
            serve(&memory, source, &stop, peer, wait)
        });
        let start = Instant::now();
        let (memory, touch) = (&memory, &touch);
        let one = |thread| {
            fault.cores.inspect(|cores| cores::keep_on(cores.toucher));
            touch(memory, thread)
        };
        let touchers: Vec<_> = threads.iter().map(|thread| scope.spawn(move || one(thread))).collect();
        let mut toucher = Vec::new();
        for one in touchers {
            toucher.extend(one.join().map_err(|_| io::Error::other("a thread that touched panicked"))?);
        }
        let took = start.elapsed();
        stop.store(true, Ordering::Release);
        let server = server.join().map_err(|_| io::Error::other("the floor's server panicked"))??;
        Ok((Faults { toucher, server }, took))
    })
}

fn touch(memory: &Memory, order: &[usize]) -> Vec<u64> {
    let mut took = Vec::with_capacity(order.len());
    for page in order {
        let at = memory.guest.page(page * memory.fault.page, 8).cast::<u64>();
        let start = Instant::now();
        // SAFETY: inside the mapping and aligned; volatile, because it is another thread that fills it.
        unsafe { at.read_volatile() };
        took.push(start.elapsed().as_nanos() as u64);
    }
    took
}

fn serve(
    memory: &Memory,
    source: &Map,
    stop: &AtomicBool,
    mut peer: Option<TcpStream>,
    wait: Duration,
) -> io::Result<Vec<u64>> {
    let mut times = Vec::with_capacity(1 << 16);
    let (mut message, mut page) = ([0_u64; 4], vec![0_u8; memory.fault.page]);
    let mut empty = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: the buffer takes one message of 32 bytes.
        let got = unsafe { libc::read(memory.uffd.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
        if got != 32 {
            empty += 1;
            if empty > SPINS {
                let mut descriptor = libc::pollfd { fd: memory.uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one valid pollfd.
                unsafe { libc::poll(&mut descriptor, 1, 10) };
            }
            continue;
        }
        empty = 0;
        let start = Instant::now();
        let offset = (message[2] - memory.guest.at as u64) as usize & !(memory.fault.page - 1);
        let waiting = || {
            while start.elapsed() < wait {
                std::hint::spin_loop();
            }
        };
        match &mut peer {
            None => memory.answer(offset, source.page(offset, memory.fault.page), waiting)?,
            Some(peer) => {
                peer.write_all(&(offset as u64).to_ne_bytes())?;
                peer.read_exact(&mut page)?;
                memory.answer(offset, page.as_ptr(), waiting)?;
            }
        }
        times.push(start.elapsed().as_nanos() as u64);
    }
    Ok(times)
}

/// A connection to a thread of its own that answers an offset with a page of `source`.
fn connect<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    source: &'scope Map,
    page: usize,
) -> io::Result<TcpStream> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let ours = TcpStream::connect(listener.local_addr()?)?;
    ours.set_nodelay(true)?;
    scope.spawn(move || answer(listener, source, page));
    Ok(ours)
}

/// The other end of the TCP floor: an offset in, a page out.
fn answer(listener: TcpListener, source: &Map, len: usize) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let (mut request, mut page) = ([0; 8], vec![0_u8; len]);
    while stream.read_exact(&mut request).is_ok() {
        copy(source.page(u64::from_ne_bytes(request) as usize, len), page.as_mut_ptr(), len);
        stream.write_all(&page)?;
    }
    Ok(())
}

/// Asks for the pages of `order` over TCP, one after the other, and does nothing with them: what each took, in nanoseconds.
pub fn ask(Source(source): &Source, order: &[usize], page: usize) -> io::Result<Vec<u64>> {
    std::thread::scope(|scope| {
        let mut peer = connect(scope, source, page)?;
        let mut bytes = vec![0; page];
        let one = |at: &usize| {
            let start = Instant::now();
            peer.write_all(&((at * page) as u64).to_ne_bytes())?;
            peer.read_exact(&mut bytes)?;
            Ok(start.elapsed().as_nanos() as u64)
        };
        order.iter().map(one).collect()
    })
}

/// Copies (or receives) and shows all of the source in chunks, each of whole pages of `page` bytes.
pub fn sweep(wire: Wire, Source(source): &Source, chunk: usize, page: usize) -> io::Result<Duration> {
    let len = source.len;
    let memory = Memory::new(len, Fault { page, ..SMALL })?;
    match wire {
        Wire::Memory => {
            let start = Instant::now();
            for offset in (0..len).step_by(chunk) {
                copy(source.page(offset, chunk), memory.alias.page(offset, chunk), chunk);
                memory.show(offset, chunk)?;
            }
            Ok(start.elapsed())
        }
        Wire::Tcp => streamed(source, len, chunk, |stream, offset| {
            receive(stream, memory.alias.page(offset, chunk), chunk)?;
            memory.show(offset, chunk)
        }),
    }
}

/// The same bytes, copied or streamed only.
pub fn plain(wire: Wire, Source(source): &Source, chunk: usize) -> io::Result<Duration> {
    let len = source.len;
    let target = Map::new(memfd(len)?.as_fd(), len, true)?;
    let start = Instant::now();
    match wire {
        Wire::Memory => {
            for offset in (0..len).step_by(chunk) {
                copy(source.page(offset, chunk), target.page(offset, chunk), chunk);
            }
            Ok(start.elapsed())
        }
        Wire::Tcp => streamed(source, len, chunk, |stream, offset| receive(stream, target.page(offset, chunk), chunk)),
    }
}

/// A sender pushes `source` as fast as the socket takes it; `take` is called for every chunk.
fn streamed(
    source: &Map,
    len: usize,
    chunk: usize,
    mut take: impl FnMut(&TcpStream, usize) -> io::Result<()>,
) -> io::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let ours = TcpStream::connect(listener.local_addr()?)?;
    std::thread::scope(|scope| {
        scope.spawn(move || -> io::Result<()> {
            let (theirs, _) = listener.accept()?;
            for offset in (0..len).step_by(chunk) {
                send(&theirs, source.page(offset, chunk), chunk)?;
            }
            Ok(())
        });
        let start = Instant::now();
        for offset in (0..len).step_by(chunk) {
            take(&ours, offset)?;
        }
        Ok(start.elapsed())
    })
}

fn receive(stream: &TcpStream, to: *mut u8, len: usize) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        // SAFETY: the caller's chunk is `len` bytes long.
        let got = unsafe { libc::recv(stream.as_raw_fd(), to.wrapping_add(done).cast(), len - done, 0) };
        match usize::try_from(got) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => done += got,
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

fn send(stream: &TcpStream, from: *const u8, len: usize) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let at = from.wrapping_add(done).cast();
        // SAFETY: the caller's chunk is `len` bytes long.
        let put = unsafe { libc::send(stream.as_raw_fd(), at, len - done, libc::MSG_NOSIGNAL) };
        done += usize::try_from(put).map_err(|_| io::Error::last_os_error())?;
    }
    Ok(())
}
