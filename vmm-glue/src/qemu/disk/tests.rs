//! Two relays on one image, as two hosts have them, and a client that speaks NBD as QEMU does.

use super::messages::{FromHand, Role, VERSION, get, put};
use super::*;
use belay_transport::Deadline;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const DISK: usize = 1 << 20;
const BOUND: Duration = Duration::from_secs(20);

fn soon() -> Deadline {
    Deadline::after(BOUND)
}

fn me() -> u32 {
    std::process::id()
}

/// A relay on a thread, and what it said of itself.
struct Running {
    guest: PathBuf,
    hand: PathBuf,
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    places: Arc<Places>,
}

type Places = (Mutex<Vec<(Place, String)>>, Condvar);

impl Running {
    fn start(folder: &Path, name: &str, incoming: bool) -> Self {
        Self::try_start(folder, name, incoming).unwrap()
    }

    fn try_start(folder: &Path, name: &str, incoming: bool) -> Result<Self, crate::qemu::relay::RelayError> {
        let (guest, hand) = (folder.join(format!("{name}.nbd")), folder.join(format!("{name}.hand")));
        let places: Arc<Places> = Arc::default();
        let heard = Arc::clone(&places);
        let told: Told = Box::new(move |place, why| {
            heard.0.lock().unwrap().push((place, why.to_owned()));
            heard.1.notify_all();
        });
        let relay = DiskRelay::new(&guest, &hand, (&folder.join("image"), "vda"), incoming, told)?;
        let (stopped, stop) = rustix::pipe::pipe().unwrap();
        let thread = std::thread::spawn(move || relay.run(stopped.as_fd()).unwrap());
        Ok(Self { guest, hand, stop: Some(stop), thread: Some(thread), places })
    }

    fn attach(&self, role: Role) -> Hand {
        Hand::attach(&self.hand, role, me(), soon()).unwrap()
    }

    fn wait_for(&self, what: &str, is_it: impl Fn(&(Place, String)) -> bool) {
        let places = self.places.0.lock().unwrap();
        let waited = self.places.1.wait_timeout_while(places, BOUND, |places| !places.iter().any(&is_it)).unwrap();
        assert!(!waited.1.timed_out(), "{what}: {:?}", waited.0);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

/// What QEMU says.
struct Client {
    stream: UnixStream,
    cookie: u64,
}

impl Client {
    fn connect(relay: &Running) -> Self {
        Self::try_connect(relay, "vda").unwrap()
    }

    fn try_connect(relay: &Running, export: &str) -> std::io::Result<Self> {
        let mut stream = UnixStream::connect(&relay.guest)?;
        stream.set_read_timeout(Some(BOUND))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\x00\x03");
        stream.write_all(&3_u32.to_be_bytes())?;
        // GO, with the block sizes asked for.
        let data = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), &[0, 1, 0, 3]].concat();
        stream.write_all(b"IHAVEOPT\0\0\0\x07")?;
        stream.write_all(&(data.len() as u32).to_be_bytes())?;
        stream.write_all(&data)?;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            stream.read_exact(&mut data)?;
            match u32::from_be_bytes(head[12..16].try_into().unwrap()) {
                1 => return Ok(Self { stream, cookie: 0 }),
                3 if data[..2] == [0, 0] => assert_eq!(data[2..10], (DISK as u64).to_be_bytes()),
                3 => {}
                _ => return Err(std::io::ErrorKind::NotFound.into()),
            }
        }
    }

    fn send(&mut self, kind: u16, offset: u64, len: u32, data: &[u8]) {
        self.cookie += 1;
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0, 0]);
        request.extend(kind.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend_from_slice(data);
        self.stream.write_all(&request).unwrap();
    }

    /// The error that answers it; 0 for none.
    fn answer(&mut self) -> u32 {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).unwrap();
        assert_eq!(head[8..], self.cookie.to_be_bytes());
        u32::from_be_bytes(head[4..8].try_into().unwrap())
    }

    fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.send(0, offset, len, &[]);
        match self.answer() {
            0 => {
                let mut bytes = vec![0; len as usize];
                self.stream.read_exact(&mut bytes).unwrap();
                Ok(bytes)
            }
            error => Err(error),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.send(1, offset, data.len() as u32, data);
        self.answer()
    }

    fn flush(&mut self) -> u32 {
        self.send(3, 0, 0, &[]);
        self.answer()
    }

    fn zero(&mut self, offset: u64, len: u32) -> u32 {
        self.send(6, offset, len, &[]);
        self.answer()
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("image"), vec![0; DISK]).unwrap();
    folder
}

fn image(folder: &tempfile::TempDir, at: usize, len: usize) -> Vec<u8> {
    fs::read(folder.path().join("image")).unwrap()[at..at + len].to_vec()
}

#[test]
fn a_guest_at_home_reads_and_writes_its_image_and_is_told_what_cannot_be() {
    let folder = folder();
    let relay = Running::start(folder.path(), "here", false);
    let mut guest = Client::connect(&relay);
    assert_eq!(guest.write(512, &[7; 1024]), 0);
    assert_eq!(guest.zero(1024, 512), 0);
    assert_eq!(guest.flush(), 0);
    assert_eq!(guest.read(0, 2048).unwrap(), [[0; 512], [7; 512], [0; 512], [0; 512]].concat());
    assert_eq!(image(&folder, 0, 2048), guest.read(0, 2048).unwrap());
    assert_eq!(guest.write(DISK as u64 - 512, &[1; 1024]), 28, "no room behind the end");
    assert_eq!(guest.read(DISK as u64, 512), Err(22));
    assert_eq!(guest.read(u64::MAX - 10, 512), Err(22));
    assert_eq!(guest.zero(0, u32::MAX), 22);
    guest.send(4, 0, 512, &[]);
    assert_eq!(guest.answer(), 95, "a trim was not offered");
    assert_eq!(guest.read(512, 512).unwrap(), [7; 512], "it goes on");
    assert!(Client::try_connect(&relay, "vdb").is_err());
}

#[test]
fn a_second_relay_on_an_image_is_refused_while_the_first_has_it() {
    let folder = folder();
    let first = Running::start(folder.path(), "here", false);
    let refused = Running::try_start(folder.path(), "there", false).err().unwrap().to_string();
    assert!(refused.contains("somebody else writes"), "{refused}");
    let waiting = Running::start(folder.path(), "there", true);
    let mut guest = Client::connect(&waiting);
    assert_eq!(guest.read(0, 512).unwrap(), [0; 512]);
    assert_eq!(guest.write(0, &[1; 512]), 1, "it is not its to write");
    drop((first, waiting));
    drop(Running::start(folder.path(), "there", false));
}

#[test]
fn what_is_no_nbd_ends_its_own_connection_and_nobody_elses() {
    let folder = folder();
    let relay = Running::start(folder.path(), "here", false);
    let mut guest = Client::connect(&relay);
    for bytes in
        [&b"\0\0\0\xff"[..], b"\0\0\0\x03nonsense, and more of it", b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"]
    {
        let mut stranger = UnixStream::connect(&relay.guest).unwrap();
        stranger.set_read_timeout(Some(BOUND)).unwrap();
        stranger.write_all(bytes).unwrap();
        stranger.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        let _ = stranger.read_to_end(&mut all);
        assert_eq!(all.len(), 18, "greeted, and no more");
    }
    let mut stranger = Client::connect(&relay);
    stranger.send(1, 0, u32::MAX, &[]);
    assert_eq!(stranger.stream.read(&mut [0; 16]).unwrap_or(0), 0, "a write of 4 GiB ends it");
    let mut hand = UnixStream::connect(&relay.hand).unwrap();
    hand.set_read_timeout(Some(BOUND)).unwrap();
    hand.write_all(&[0xff; 64]).unwrap();
    assert_eq!(hand.read(&mut [0; 16]).unwrap_or(0), 0);
    assert_eq!(guest.write(0, &[9; 512]), 0);
    assert_eq!(look(&relay.hand, soon()).unwrap().guests, [me()]);
}

/// A guest of one process that leaves for "there"; both hosts' page servers are this one.
struct Away {
    folder: tempfile::TempDir,
    here: Running,
    there: Running,
    /// Keeps the guest's QEMU connected at the source.
    left: Client,
    guest: Client,
    source: Hand,
    destination: Hand,
}

fn away() -> Away {
    let folder = folder();
    let (here, there) = (Running::start(folder.path(), "here", false), Running::start(folder.path(), "there", true));
    let mut left = Client::connect(&here);
    assert_eq!(left.write(0, &[1; 4096]), 0);
    let (guest, source) = (Client::connect(&there), here.attach(Role::Leaving));
    let destination = there.attach(Role::Arriving);
    assert_eq!((source.known.name.as_str(), source.known.disk_bytes), ("vda", DISK as u64));
    assert_eq!(source.known.socket, here.guest);
    source.away(soon()).unwrap();
    Away { folder, here, there, left, guest, source, destination }
}

#[test]
fn what_a_guest_wrote_is_in_the_image_once_it_has_committed_and_not_before() {
    let Away { folder, mut left, mut guest, source, destination, here: _here, there: _there } = away();
    assert_eq!(left.write(0, &[9; 512]), 1, "who left writes nothing");
    assert_eq!(guest.write(512, &[2; 512]), 0);
    assert_eq!(guest.flush(), 0);
    assert_eq!(guest.zero(1024, 512), 0);
    assert_eq!(guest.read(0, 2048).unwrap(), [[1; 512], [2; 512], [0; 512], [1; 512]].concat());
    let (first, flushed) = destination.settle(1, soon()).unwrap();
    assert!(flushed);
    assert_eq!(guest.write(1536, &[3; 512]), 0);
    let (second, flushed) = destination.settle(2, soon()).unwrap();
    assert!(!flushed);
    assert_eq!(destination.settle(3, soon()).unwrap(), (Vec::new(), false), "nothing was done");
    assert_eq!(image(&folder, 0, 2048), [1; 2048], "nothing has committed");
    source.apply(&first, soon(), &mut || ()).unwrap();
    assert_eq!(image(&folder, 0, 2048), [[1; 512], [2; 512], [0; 512], [1; 512]].concat());
    destination.applied(1).unwrap();
    assert_eq!(guest.read(0, 2048).unwrap(), [[1; 512], [2; 512], [0; 512], [3; 512]].concat());
    // Twice, as one does who died in between.
    source.apply(&second, soon(), &mut || ()).unwrap();
    source.apply(&second, soon(), &mut || ()).unwrap();
    destination.applied(2).unwrap();
    assert_eq!(guest.read(0, 2048).unwrap(), image(&folder, 0, 2048));
    // Caught: the guest is at home, and what the other one writes from here on is nowhere.
    assert_eq!(guest.write(0, &[8; 512]), 0);
    source.back(me(), soon()).unwrap();
    assert_eq!(left.read(0, 2048).unwrap(), [[1; 512], [2; 512], [0; 512], [3; 512]].concat());
    assert_eq!(left.write(0, &[5; 512]), 0);
    destination.let_go(soon()).unwrap();
    assert_eq!(guest.write(0, &[8; 512]), 1);
    assert_eq!(image(&folder, 0, 512), [5; 512]);
}

#[test]
fn a_released_guests_image_passes_to_its_host_with_all_it_wrote() {
    let Away { folder, here, there, mut left, mut guest, source, destination } = away();
    assert_eq!(guest.write(512, &[2; 512]), 0);
    destination.settle(1, soon()).unwrap();
    assert_eq!(guest.write(1024, &[3; 512]), 0);
    let still = destination.own(Deadline::after(Duration::from_millis(30))).unwrap_err().to_string();
    assert!(still.contains("somebody else writes"), "{still}");
    assert_eq!(guest.write(1536, &[4; 512]), 0, "it goes on meanwhile");
    source.give_up(soon()).unwrap();
    assert!(source.apply(b"", soon(), &mut || ()).is_err(), "nothing is written here any more");
    destination.own(soon()).unwrap();
    assert_eq!(image(&folder, 0, 2048), [[1; 512], [2; 512], [3; 512], [4; 512]].concat());
    assert_eq!(guest.write(0, &[6; 512]), 0);
    assert_eq!(image(&folder, 0, 512), [6; 512]);
    assert_eq!(left.write(0, &[7; 512]), 1);
    // And back, the other way round.
    source.let_go(soon()).unwrap();
    destination.let_go(soon()).unwrap();
    let (source, destination) = (there.attach(Role::Leaving), here.attach(Role::Arriving));
    source.away(soon()).unwrap();
    assert_eq!(left.read(0, 512).unwrap(), [6; 512]);
    assert_eq!(left.write(0, &[7; 512]), 0);
    source.give_up(soon()).unwrap();
    destination.own(soon()).unwrap();
    assert_eq!(image(&folder, 0, 512), [7; 512]);
}

#[test]
fn a_release_that_does_not_come_about_leaves_the_image_where_it_was() {
    let Away { folder, mut guest, source, destination, here: _here, there: _there, left: _left } = away();
    assert_eq!(guest.write(512, &[2; 512]), 0);
    let (log, _) = destination.settle(1, soon()).unwrap();
    source.give_up(soon()).unwrap();
    source.away(soon()).unwrap();
    source.apply(&log, soon(), &mut || ()).unwrap();
    assert_eq!(image(&folder, 512, 512), [2; 512]);
}

#[test]
fn a_relay_whose_guest_is_its_hosts_own_goes_on_trying_when_its_page_server_has_gone() {
    let Away { folder, here, there, mut guest, source, destination, left: _left } = away();
    assert_eq!(guest.write(512, &[2; 512]), 0);
    destination.own(Deadline::after(Duration::ZERO)).unwrap_err();
    drop(destination);
    assert_eq!(guest.write(1024, &[3; 512]), 0, "it does not wait: it is its host's own");
    drop((source, here));
    there.wait_for("the image is its own", |(place, _)| *place == Place::Open);
    assert_eq!(image(&folder, 512, 1024), [[2; 512], [3; 512]].concat());
}

#[test]
fn a_guest_waits_while_nobody_has_its_relay_in_hand_and_goes_on_with_the_next_one() {
    let Away { there, mut guest, destination, folder: _folder, here: _here, left: _left, source: _source } = away();
    assert_eq!(guest.write(512, &[2; 512]), 0);
    drop(destination);
    there.wait_for("told", |(_, why)| why.contains("waits"));
    guest.send(0, 512, 512, &[]);
    guest.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(guest.stream.read(&mut [0; 1]).is_err(), "nobody answers");
    guest.stream.set_read_timeout(Some(BOUND)).unwrap();
    let destination = there.attach(Role::Arriving);
    assert_eq!(guest.answer(), 0);
    let mut bytes = [0; 512];
    guest.stream.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [2; 512], "what it wrote before is kept");
    assert!(!destination.settle(1, soon()).unwrap().0.is_empty());
}

#[test]
fn a_guest_that_writes_much_waits_for_its_checkpoint_and_a_stop_lets_in_what_it_has_under_way() {
    let Away { mut guest, destination, folder: _folder, here: _here, there: _there, left: _left, source: _source } =
        away();
    let mebibyte = vec![5; 1 << 20];
    for _ in 0..16 {
        assert_eq!(guest.write(0, &mebibyte), 0);
    }
    guest.send(1, 0, 1 << 20, &mebibyte);
    guest.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(guest.stream.read(&mut [0; 1]).is_err(), "there is no room");
    guest.stream.set_read_timeout(Some(BOUND)).unwrap();
    destination.prepare().unwrap();
    assert_eq!(guest.answer(), 0);
    let (log, _) = destination.settle(1, soon()).unwrap();
    assert!(log.len() > 17 << 20, "{} bytes", log.len());
    destination.wait_for_room(soon()).unwrap();
    destination.go().unwrap();
    // And while the source writes nothing, nothing more than this lies over the image.
    let mut epoch = 1;
    let full = loop {
        destination.prepare().unwrap();
        (0..16).for_each(|_| assert_eq!(guest.write(0, &mebibyte), 0));
        epoch += 1;
        destination.settle(epoch, soon()).unwrap();
        if let Err(full) = destination.wait_for_room(Deadline::after(Duration::ZERO)) {
            break full.to_string();
        }
        destination.go().unwrap();
        assert!(epoch < 20);
    };
    assert!(full.contains("the source has not written"), "{full}");
    destination.applied(2).unwrap();
    destination.wait_for_room(soon()).unwrap();
}

#[test]
fn a_log_of_another_disk_is_not_written() {
    let Away { folder, source, here: _here, there: _there, left: _left, guest: _guest, destination: _destination } =
        away();
    let entry = [log::Entry::Write { offset: 0, data: [9; 512].into() }];
    for (name, bytes) in [("vdb", DISK as u64), ("vda", 2 * DISK as u64)] {
        let refused = source.apply(&log::encode(name, bytes, &entry), soon(), &mut || ()).unwrap_err().to_string();
        assert!(refused.contains("came to vda"), "{refused}");
    }
    source.apply(b"\x07", soon(), &mut || ()).unwrap_err();
    assert_eq!(image(&folder, 0, 512), [1; 512]);
}

#[test]
fn the_hand_is_given_to_one_who_has_the_guest_and_to_one_at_a_time() {
    let Away { here, there, folder: _folder, left: _left, guest: _guest, source: _source, destination: _destination } =
        away();
    let refused = |relay: &Running, role, guest| {
        Hand::attach(&relay.hand, role, guest, Deadline::after(Duration::ZERO)).unwrap_err().to_string()
    };
    assert!(refused(&there, Role::Arriving, me()).contains("has the hand"));
    let folder = folder();
    let alone = Running::start(folder.path(), "here", false);
    assert!(refused(&alone, Role::Leaving, 1).contains("not connected"));
    let _guest = Client::connect(&alone);
    assert!(refused(&alone, Role::Arriving, me()).contains("--incoming"));
    let mut stranger = UnixStream::connect(&here.hand).unwrap();
    put(&mut stranger, &FromHand::Attach { version: VERSION + 1, role: Role::Leaving, guest: me() }.encode()).unwrap();
    assert!(String::from_utf8_lossy(&get(&mut stranger).unwrap()).contains("version"));
}
