//! The only program of the test guest: its init. It keeps a working set that it checks itself, on every processor, and says so on the
//! console: `tick N` every few milliseconds (`tick_ms`), each number once; `WRONG …` if memory is ever not what it wrote there last.
//!
//! A page of the set holds a sequence number and words made of it and of the page's own number. What the number must be stands in a table,
//! so a page that is older than its entry, torn, or another's is found when it is next looked at, and all of them are looked at in turns.
//! Compiled by the tests with the toolchain that is there, linked statically.

use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WORDS: usize = 512;

fn mixed(sequence: u64, page: u64, word: u64) -> u64 {
    let x = sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ page.wrapping_mul(0xc2b2_ae3d_27d4_eb4f) ^ word << 32;
    (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// `name=value` of the kernel's command line, which init finds among its variables.
fn wanted(name: &str, otherwise: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

fn say(line: &str) {
    // One write a line: the console does not mix them.
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}

/// One processor's part of the set.
fn work(part: usize, pages: usize, at_once: usize, steps: &'static AtomicU64) -> ! {
    let mut memory = vec![0u64; pages * WORDS];
    let mut expected = vec![0u64; pages];
    let number = |page: usize| (part * pages + page) as u64;
    for page in 0..pages {
        for word in 0..WORDS {
            memory[page * WORDS + word] = mixed(0, number(page), word as u64);
        }
    }
    let (mut next, mut seed) = (0, 0x1234_5678_9abc_def0u64 ^ part as u64);
    loop {
        for turn in 0..at_once {
            // Every second one in order, so that none is left out; the others anywhere.
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = if turn % 2 == 0 { next } else { (seed >> 33) as usize % pages };
            next = (page + usize::from(turn % 2 == 0)) % pages;
            let words = &mut memory[page * WORDS..][..WORDS];
            let sequence = expected[page];
            for (word, is) in words.iter_mut().enumerate() {
                let must = mixed(sequence, number(page), word as u64);
                if *is != must {
                    loop {
                        say(&format!("WRONG page {page} of part {part} word {word}: {is:#x}, must be {must:#x} ({sequence})"));
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
                *is = mixed(sequence + 1, number(page), word as u64);
            }
            expected[page] = sequence + 1;
            steps.fetch_add(1, Ordering::SeqCst);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

// The C library that std is linked with; nothing else is.
unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn ioctl(fd: i32, request: u64, ...) -> i32;
    fn syscall(number: i64, ...) -> i64;
}

/// The modules of virtio devices, in the order in which they load; once.
fn load_modules() {
    const FINIT_MODULE: i64 = 313;
    static LOADED: Mutex<bool> = Mutex::new(false);
    let mut loaded = LOADED.lock().unwrap();
    if std::mem::replace(&mut loaded, true) {
        return;
    }
    let order = std::fs::read_to_string("/modules/order").unwrap_or_default();
    for name in order.lines().filter(|name| name.starts_with("virtio") || name.contains("failover")) {
        let Ok(module) = std::fs::File::open(format!("/modules/{name}")) else { continue };
        // SAFETY: finit_module(2) takes an open descriptor, a string that ends, and flags.
        let done = unsafe { syscall(FINIT_MODULE, module.as_raw_fd(), c"".as_ptr(), 0) };
        if done != 0 {
            say(&format!("{name} does not load: {}", std::io::Error::last_os_error()));
        }
    }
}

/// Gives eth0 the address and takes it up (netdevice(7)).
fn set_up(address: [u8; 4]) {
    const REQUESTS: [(u64, [u8; 8]); 2] =
        [(0x8916, [2, 0, 0, 0, 0, 0, 0, 0]), (0x891c, [2, 0, 0, 0, 255, 255, 255, 0])];
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { socket(2, 2, 0) };
    let ask = |request: u64, value: [u8; 8]| {
        let mut packet = [0_u8; 40];
        packet[..4].copy_from_slice(b"eth0");
        packet[16..24].copy_from_slice(&value);
        // SAFETY: these requests read a struct ifreq, 40 bytes, which lives through the call.
        if unsafe { ioctl(fd, request, packet.as_ptr()) } != 0 {
            say(&format!("eth0: request {request:#x}: {}", std::io::Error::last_os_error()));
        }
    };
    let [(set_address, mut value), (set_mask, mask)] = REQUESTS;
    value[4..].copy_from_slice(&address);
    ask(set_address, value);
    ask(set_mask, mask);
    // IFF_UP and IFF_RUNNING.
    ask(0x8914, [0x41, 0, 0, 0, 0, 0, 0, 0]);
}

/// How many requests were answered, and the chain of all of them: an answer that was given and is not so any more breaks it.
static ANSWERED: Mutex<(u64, u64)> = Mutex::new((0, 0));

fn answer(mut client: TcpStream) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let mut request = [0; 8];
    loop {
        client.read_exact(&mut request)?;
        let (count, chain) = {
            let mut answered = ANSWERED.lock().unwrap();
            *answered = (answered.0 + 1, mixed(answered.1 ^ u64::from_le_bytes(request), answered.0 + 1, 1));
            *answered
        };
        client.write_all(&[count.to_le_bytes(), chain.to_le_bytes()].concat())?;
    }
}

/// Answers on port 7.
fn serve(address: [u8; 4]) {
    load_modules();
    set_up(address);
    let listener = TcpListener::bind("0.0.0.0:7").expect("a port");
    say("serving");
    for client in listener.incoming().flatten() {
        std::thread::spawn(move || answer(client));
    }
}

/// 512 bytes as they lie on a disk.
type Sector = [u64; 64];

/// A disk whose every access is to the disk itself.
trait Disk {
    fn read(&self, sector: usize) -> Sector;
    fn write(&self, sector: usize, bytes: &Sector);
    fn flush(&self);
}

/// The first virtio disk, past the page cache.
struct VirtioDisk(std::fs::File);

/// Where O_DIRECT reads to and writes from.
#[repr(align(4096))]
struct Aligned([u8; 512]);

impl VirtioDisk {
    fn open() -> Self {
        const O_DIRECT: i32 = 0o40000;
        const MOUNT: i64 = 165;
        let _ = std::fs::create_dir("/dev");
        // SAFETY: mount(2) takes strings that end, and flags; what is mounted already (EBUSY) is there.
        unsafe { syscall(MOUNT, c"devtmpfs".as_ptr(), c"/dev".as_ptr(), c"devtmpfs".as_ptr(), 0, 0) };
        loop {
            match std::fs::OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open("/dev/vda") {
                Ok(file) => return Self(file),
                Err(error) => say(&format!("no /dev/vda yet: {error}")),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// An error of the disk is one of the tether's.
    fn done(what: &str, result: std::io::Result<()>) {
        if let Err(error) = result {
            say(&format!("WRONG disk: {what}: {error}"));
        }
    }
}

impl Disk for VirtioDisk {
    fn read(&self, sector: usize) -> Sector {
        let mut bytes = Aligned([0; 512]);
        Self::done("a read", self.0.read_exact_at(&mut bytes.0, sector as u64 * 512));
        std::array::from_fn(|word| u64::from_le_bytes(bytes.0[word * 8..][..8].try_into().expect("8 bytes")))
    }

    fn write(&self, sector: usize, words: &Sector) {
        let mut bytes = Aligned([0; 512]);
        bytes.0.chunks_mut(8).zip(words).for_each(|(at, word)| at.copy_from_slice(&word.to_le_bytes()));
        Self::done("a write", self.0.write_all_at(&bytes.0, sector as u64 * 512));
    }

    fn flush(&self) {
        Self::done("a flush", self.0.sync_data());
    }
}

/// The first IDE disk, by its ports (ATA/ATAPI-6, PIO data-out and data-in), which needs no driver.
struct IdeDisk;

impl IdeDisk {
    const DATA: u16 = 0x1f0;
    const STATUS: u16 = 0x1f7;

    /// Of the thread that calls this, and no other.
    fn open() -> Self {
        const IOPL: i64 = 172;
        // SAFETY: iopl(2) takes a number.
        if unsafe { syscall(IOPL, 3_i64) } != 0 {
            say(&format!("WRONG no ports: {}", std::io::Error::last_os_error()));
        }
        // No interrupts: nobody here answers them.
        Self::put(0x3f6, 2);
        Self
    }

    fn put(port: u16, value: u8) {
        // SAFETY: the port is one of the disk's, and iopl(2) has allowed it.
        unsafe { std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
    }

    fn get(port: u16) -> u8 {
        let value: u8;
        // SAFETY: as above.
        unsafe { std::arch::asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
        value
    }

    /// Waits until the disk is no longer busy, and with `data` until it wants some or has some.
    fn wait(what: &str, data: bool) {
        loop {
            let status = Self::get(Self::STATUS);
            // No disk says nothing at all.
            if status == 0 || status & 0x80 == 0 && status & 0x21 != 0 {
                say(&format!("WRONG disk: {what} ended with the status {status:#x}"));
                std::thread::sleep(Duration::from_millis(100));
            } else if status & 0x80 == 0 && (!data || status & 8 != 0) {
                return;
            }
            std::thread::yield_now();
        }
    }

    fn command(&self, command: u8, sector: usize) {
        Self::wait("before a command", false);
        Self::put(0x1f6, 0xe0 | (sector >> 24) as u8 & 0xf);
        for (port, value) in [(0x1f2, 1), (0x1f3, sector), (0x1f4, sector >> 8), (0x1f5, sector >> 16)] {
            Self::put(port, value as u8);
        }
        Self::put(Self::STATUS, command);
    }

}

impl Disk for IdeDisk {
    fn read(&self, sector: usize) -> Sector {
        self.command(0x20, sector);
        Self::wait("a read", true);
        let mut bytes = [0_u64; 64];
        // SAFETY: 256 words go from the disk's port into 512 bytes of this function's own.
        unsafe {
            std::arch::asm!("cld", "rep insw", in("dx") Self::DATA, inout("rdi") bytes.as_mut_ptr() => _, inout("rcx") 256_u64 => _);
        }
        bytes
    }

    fn write(&self, sector: usize, bytes: &Sector) {
        self.command(0x30, sector);
        Self::wait("a write", true);
        // SAFETY: 256 words go to the disk's port out of 512 bytes.
        unsafe {
            std::arch::asm!("cld", "rep outsw", in("dx") Self::DATA, inout("rsi") bytes.as_ptr() => _, inout("rcx") 256_u64 => _);
        }
        Self::wait("a write", false);
    }

    fn flush(&self) {
        self.command(0xe7, 0);
        Self::wait("a flush", false);
    }
}

/// The test has said that all of the disk is to be written, and not its first half alone.
static GROWN: AtomicBool = AtomicBool::new(false);

/// Writes sectors, each in generation after generation, and keeps in memory which generation each is of: a sector that is older than the table
/// says, or newer, is found when it is next read, and all of them are read in turns. `all_seen` hears of every time that all were.
fn keep_disk(disk: &dyn Disk, sectors: Range<usize>, all_seen: impl Fn(u64)) -> ! {
    let content = |generation: u64, sector: usize| -> Sector {
        std::array::from_fn(|word| if generation == 0 { 0 } else { mixed(generation, sector as u64, word as u64) })
    };
    let mut generations = vec![0_u64; sectors.len()];
    let check = |generations: &[u64], at: usize| {
        let (sector, memory) = (sectors.start + at, generations[at]);
        let (is, must) = (disk.read(sector), content(memory, sector));
        while is != must {
            let known = (0..memory + 1000).find(|&generation| content(generation, sector) == is);
            say(&format!("WRONG sector {sector} is of generation {known:?}, and memory says {memory}"));
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let waits = wanted("obeys", 0) == 1;
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64 ^ sectors.start as u64;
    for round in 1_u64.. {
        for at in 0..sectors.len() {
            check(&generations, at);
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let reach = if waits && !GROWN.load(Ordering::SeqCst) { sectors.len() / 2 } else { sectors.len() };
            let other = (seed >> 33) as usize % reach;
            check(&generations, other);
            disk.write(sectors.start + other, &content(generations[other] + 1, sectors.start + other));
            generations[other] += 1;
            if at % 32 == 0 {
                disk.flush();
            }
        }
        all_seen(round);
    }
    unreachable!("rounds do not end")
}

/// Takes memory, finds it all zeros, fills it, finds that again, and gives it back, and says so. Started with `init_on_free=1`, the kernel hands out
/// pages as they came back to it, from a balloon or from the host that they were reported to: what they hold is then what the host gives.
fn churn(mib: usize) -> ! {
    let pages = (mib << 20) / 4096;
    for round in 1_u64.. {
        // Longer than the kernel waits until it reports what is free (page_reporting.c).
        std::thread::sleep(Duration::from_millis(2500));
        let mut memory = vec![0_u64; pages * WORDS];
        // Not what an allocation of zeros is known to hold.
        let memory = std::hint::black_box(&mut memory[..]);
        let wrong = |page: usize, word: usize, is: u64, must: u64| loop {
            say(&format!("WRONG taken page {page} word {word} in round {round}: {is:#x}, must be {must:#x}"));
            std::thread::sleep(Duration::from_millis(100));
        };
        for (page, words) in memory.chunks_mut(WORDS).enumerate() {
            // Read first, it would be a page that all of them share.
            words[0] = mixed(round, page as u64, 0);
            if let Some(word) = (1..WORDS).find(|&word| words[word] != 0) {
                wrong(page, word, words[word], 0);
            }
            words.iter_mut().enumerate().for_each(|(word, is)| *is = mixed(round, page as u64, word as u64));
        }
        std::thread::sleep(Duration::from_millis(200));
        for (page, words) in memory.chunks(WORDS).enumerate() {
            let must = |word: usize| mixed(round, page as u64, word as u64);
            if let Some(word) = (0..WORDS).find(|&word| words[word] != must(word)) {
                wrong(page, word, words[word], must(word));
            }
        }
        say(&format!("churn {round}"));
    }
    unreachable!("rounds do not end")
}

/// Has `disk` of so many sectors kept by so many threads, each its own part of it, so that as many requests are on their way at a time. `disk N`
/// says that all of them have seen all of theirs, N times.
fn keep_all(disk: &'static (dyn Disk + Sync), sectors: usize, threads: usize) {
    static SEEN: Mutex<(Vec<u64>, u64)> = Mutex::new((Vec::new(), 0));
    SEEN.lock().unwrap().0 = vec![0; threads];
    let part = sectors / threads;
    for thread in 0..threads {
        let seen = move |round| {
            let mut seen = SEEN.lock().unwrap();
            seen.0[thread] = round;
            let all = *seen.0.iter().min().expect("one thread or more");
            if all > seen.1 {
                seen.1 = all;
                say(&format!("disk {all}"));
            }
        };
        std::thread::spawn(move || keep_disk(disk, thread * part..(thread + 1) * part, seen));
    }
}

/// The disk that there is.
fn keep_sectors(sectors: usize) {
    if wanted("virtio_disk", 0) == 1 {
        load_modules();
        let disk: &'static VirtioDisk = Box::leak(Box::new(VirtioDisk::open()));
        keep_all(disk, sectors, 4);
    } else {
        // One thread alone: the ports are its own.
        std::thread::spawn(move || {
            let disk = IdeDisk::open();
            keep_disk(&disk, 0..sectors, |round| say(&format!("disk {round}")))
        });
    }
}

/// Hears what the test says on the second serial port: `halt`, `off`, `again`, `grow`.
fn obey() {
    const MKNOD: i64 = 133;
    const REBOOT: i64 = 169;
    // ttyS1, a character device (devices.txt of the kernel's documentation).
    // SAFETY: mknod(2) takes a string that ends, and numbers.
    unsafe { syscall(MKNOD, c"/ttyS1".as_ptr(), 0o020_600, 4 << 8 | 65) };
    let port = match std::fs::File::open("/ttyS1") {
        Ok(port) => port,
        Err(error) => return say(&format!("no second port: {error}")),
    };
    for word in std::io::BufReader::new(port).lines().map_while(Result::ok) {
        say(&format!("told {word}"));
        let command: u32 = match word.trim() {
            "halt" => 0xcdef_0123,
            "off" => 0x4321_fedc,
            "again" => 0x0123_4567,
            "grow" => {
                GROWN.store(true, Ordering::SeqCst);
                continue;
            }
            _ => continue,
        };
        // SAFETY: reboot(2) takes numbers alone here.
        unsafe { syscall(REBOOT, 0xfee1_deadu32, 672_274_793u32, command, 0) };
    }
}

/// Says what it hears on this port, for a host that hears a guest's beacon; never comes back.
fn hear(port: u16) {
    let socket = std::net::UdpSocket::bind(("0.0.0.0", port)).expect("a port");
    let mut datagram = [0; 8];
    loop {
        if let Ok(8) = socket.recv(&mut datagram) {
            println!("heard {}", u64::from_le_bytes(datagram));
        }
    }
}

/// Where it tells its count at every tick, to everybody on its network.
fn beacon() -> Option<std::net::UdpSocket> {
    let to = std::env::var("beacon").ok()?;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.set_broadcast(true).ok()?;
    // Until its card is up there is no way there.
    socket.connect((to.as_str(), 7)).ok()?;
    Some(socket)
}

fn main() {
    if let Some(port) = std::env::var("hear").ok().and_then(|text| text.parse().ok()) {
        hear(port);
    }
    let sectors = wanted("sectors", 0);
    if sectors > 0 {
        keep_sectors(sectors);
    }
    let taken = wanted("churn", 0);
    if taken > 0 {
        load_modules();
        std::thread::spawn(move || churn(taken));
    }
    if wanted("obeys", 0) == 1 {
        std::thread::spawn(obey);
    }
    if let Some(address) = std::env::var("address").ok().and_then(|text| text.parse::<std::net::Ipv4Addr>().ok()) {
        std::thread::spawn(move || serve(address.octets()));
    }
    static STEPS: AtomicU64 = AtomicU64::new(0);
    let (parts, mib, at_once) = (wanted("parts", 1), wanted("mib", 16), wanted("at_once", 8));
    let pages = (mib << 20) / 4096 / parts;
    say(&format!("guest of {parts} parts with {pages} pages"));
    for part in 0..parts {
        std::thread::spawn(move || work(part, pages, at_once, &STEPS));
    }
    let pace = Duration::from_millis(wanted("tick_ms", 10) as u64);
    let (mut tick, mut slowest) = (0u64, Duration::ZERO);
    let mut at = Instant::now();
    let mut told = None;
    loop {
        std::thread::sleep(pace);
        slowest = slowest.max(at.elapsed());
        at = Instant::now();
        tick += 1;
        say(&format!("tick {tick} steps {} slowest {} ms", STEPS.load(Ordering::SeqCst), slowest.as_millis()));
        told = told.or_else(beacon);
        if let Some(told) = &told {
            let _ = told.send(&tick.to_le_bytes());
        }
        if tick % 8 == 0 {
            slowest = Duration::ZERO;
        }
    }
}
