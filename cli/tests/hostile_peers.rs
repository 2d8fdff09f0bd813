//! Peers that break the protocol, hang up or fall silent at every step: belay's own process at one end, a liar at the other.

mod running;

use belay_checkpoint::guest::{Guest, Packet, PacketSink};
use belay_checkpoint::ownership::{Fate, OwnerEpoch};
use belay_checkpoint::record::{self, CRITICAL, FIRST, Head, SectionHeader, SegmentHeader, Trailer, kind};
use belay_checkpoint::ring::{OWNER_REGION_BYTES, SEGMENTS_OFFSET};
use belay_transport::fabric::{self, Lane, LaneId, LaneKind, LocalKey, Owner, ReadKey, RingKeys, Write};
use belay_transport::region::{Mapping, RamFile};
use belay_transport::session::{
    self, Address, Control, DestinationSession, Listener, Offer, RegionGeometry, Security, SessionConfig, SourceSession,
};
use belay_transport::{Deadline, PAGE_SIZE, PageSize, RegionId};
use belay_vmm_glue::guard::Secrets;
use belay_vmm_glue::kvm::guests::GuestSpec;
use belay_vmm_glue::kvm::{BareGuest, HostGuest};
use belay_vmm_glue::migrate::observation::ObservationId;
use belay_vmm_glue::migrate::protocol::{PROTOCOL_VERSION, RingOffer, ToDestination, ToSource, decode, encode};
use belay_vmm_glue::migrate::reattach::Identity;
use belay_vmm_glue::migrate::settings::{LeaseSettings, Proposal, ReleasePolicy, TetherSettings, VmmSpec};
use belay_vmm_glue::migrate::switch_map::RegionClasses;
use running::{BOUND, Place, Process};
use std::sync::Arc;
use std::time::Duration;
use zerocopy::IntoBytes;

const MEMORY: u64 = 8 << 20;
const FRAMES: u64 = MEMORY / PAGE_SIZE as u64;
const RAM: RegionId = RegionId(0);

fn bound() -> Deadline {
    Deadline::after(BOUND)
}

fn because() -> ObservationId {
    ObservationId("liar-1".to_owned())
}

fn has_userfaultfd() -> bool {
    std::fs::File::options().read(true).write(true).open("/dev/userfaultfd").is_ok()
}

fn guest_spec() -> GuestSpec {
    GuestSpec { memory_bytes: MEMORY, working_set_bytes: MEMORY / 2, ..GuestSpec::default() }
}

fn proposal() -> Proposal {
    Proposal {
        protocol: PROTOCOL_VERSION,
        vmm: VmmSpec::Kvm(guest_spec()),
        tether: None,
        output_to: None,
        release: ReleasePolicy::WhenLanded,
        shards: 1,
        nonces: vec![1],
        identity: Identity::random().expect("randomness"),
        reattach: None,
    }
}

/// Hears the next message; nothing once the peer has closed.
fn hear<M: serde::de::DeserializeOwned>(control: &Control) -> Option<M> {
    let frame = control.recv(bound()).ok()?;
    Some(decode(&frame).expect("belay keeps the protocol"))
}

struct Deaf;

impl PacketSink for Deaf {
    fn emit(&self, _packet: Packet) {}

    fn has_room(&self) -> bool {
        true
    }
}

// ---- a source that lies ------------------------------------------------------------------------------------------------------

/// The source's half of a session, with a guest that has never run.
struct Liar {
    session: SourceSession,
    owner: Box<dyn Owner>,
    key: ReadKey,
    ring: RingKeys,
    device_state: Vec<u8>,
    _kept: Vec<(Arc<RamFile>, Arc<Mapping>)>,
}

fn connect(to: &Address, proposal: &Proposal, bytes: u64) -> Result<SourceSession, session::SessionError> {
    let geometry = vec![RegionGeometry { id: RAM, bytes, page_size: PageSize::Small }];
    let offer = Offer { geometry, blob: encode(proposal) };
    session::connect(to, SessionConfig::new(Security::LoopbackOnly), &offer, bound())
}

impl Liar {
    fn new(to: &Address) -> Self {
        let session = connect(to, &proposal(), MEMORY).expect("an honest hello is accepted");
        let memory = |bytes: usize| {
            let file = Arc::new(RamFile::memfd("liar", bytes, PageSize::Small).unwrap());
            file.preallocate(1, &|_| {}).unwrap();
            let alias = Arc::new(file.map().unwrap());
            (file, alias)
        };
        let (ram, ring, owner_region) = (memory(MEMORY as usize), memory(1 << 20), memory(OWNER_REGION_BYTES));
        let mut guest = HostGuest::new(&guest_spec(), ram.0.clone(), ram.1.clone(), Arc::new(Deaf)).unwrap();
        guest.boot().unwrap();
        let mut device_state = Vec::new();
        guest.save(&mut device_state).unwrap();
        let mut owner = fabric::owner(&session).unwrap();
        let key = owner.export_read(&ram.0, &ram.1, &ram.0.occupancy().unwrap()).unwrap();
        let ring_keys = owner.export_ring((&ring.0, &ring.1), (&owner_region.0, &owner_region.1)).unwrap();
        Self { session, owner, key, ring: ring_keys, device_state, _kept: vec![ram, ring, owner_region] }
    }

    fn say(&self, message: &ToDestination) {
        // A destination that has had enough has hung up; what counts is how it ended.
        let _ = self.session.control.send(&encode(message), bound());
    }

    fn prepare(&self, with_key: bool) -> ToDestination {
        let ram = if with_key { vec![(RAM, self.key)] } else { Vec::new() };
        let ring_geometry = RingOffer { bytes: u64::MAX, nonce: u64::MAX, overflow_bytes: u64::MAX };
        ToDestination::Prepare { ram, ring: self.ring, ring_geometry, because: because() }
    }

    fn switch(&self, runs: &[(u8, u64)]) -> ToDestination {
        let map = vec![RegionClasses { id: RAM, runs: runs.to_vec() }];
        ToDestination::Switch { map, device_state: self.device_state.clone(), nonce: u64::MAX, because: because() }
    }

    fn dial_lanes(&mut self) {
        for kind in [LaneKind::Fault, LaneKind::Bulk] {
            self.owner.serve_lane(LaneId { kind, index: 0 }, bound()).expect("lanes are taken");
        }
    }

    /// Goes the honest way up to Prepared.
    fn prepared(&mut self) {
        self.say(&self.prepare(true));
        self.dial_lanes();
        let heard = hear::<ToSource>(&self.session.control);
        assert!(matches!(heard, Some(ToSource::Prepared { .. })), "{heard:?}");
    }

    /// Goes the honest way up to Loaded.
    fn loaded(&mut self) {
        self.prepared();
        self.say(&self.switch(&[(1, FRAMES)]));
        let heard = hear::<ToSource>(&self.session.control);
        assert!(matches!(heard, Some(ToSource::Loaded { .. })), "{heard:?}");
    }
}

fn receive(place: &Place, options: &[&str]) -> (Process, Address) {
    let state = place.text("destination");
    let arguments = ["receive", "--json", "--listen", "127.0.0.1:0", "--drive", "threads", "--state-dir", &state];
    let mut process = place.belay(&[&arguments[..], options].concat());
    let address = process.wait_for_event("listening")["address"].as_str().unwrap().parse().unwrap();
    (process, address)
}

#[test]
fn p2_a_source_that_breaks_the_protocol_before_the_guest_runs_moves_nothing() {
    if !has_userfaultfd() {
        eprintln!("skipped: it needs a userfaultfd");
        return;
    }
    type Lie = fn(&mut Liar);
    let lies: [(&str, Lie); 15] = [
        ("hangs up at once", |_| {}),
        ("says no message", |liar| drop(liar.session.control.send(&[0xff; 64], bound()))),
        ("switches first", |liar| liar.say(&liar.switch(&[(1, FRAMES)]))),
        ("fails", |liar| liar.say(&ToDestination::Failed { reason: "out of \u{1b}[2J".into(), because: because() })),
        ("has no key for its memory", |liar| {
            liar.say(&liar.prepare(false));
            liar.dial_lanes();
            let _ = hear::<ToSource>(&liar.session.control);
        }),
        ("prepares twice", |liar| {
            liar.prepared();
            liar.say(&liar.prepare(true));
            let _ = hear::<ToSource>(&liar.session.control);
        }),
        ("says go before the switch", |liar| {
            liar.prepared();
            liar.say(&ToDestination::Go { owner_epoch: OwnerEpoch(u64::MAX), because: because() });
            let _ = hear::<ToSource>(&liar.session.control);
        }),
        ("releases before the switch", |liar| {
            liar.prepared();
            liar.say(&ToDestination::Released { because: because() });
            let _ = hear::<ToSource>(&liar.session.control);
        }),
        ("sends a map of nothing", |liar| {
            liar.prepared();
            liar.say(&ToDestination::Switch { map: vec![], device_state: vec![], nonce: 0, because: because() });
            let _ = hear::<ToSource>(&liar.session.control);
        }),
        ("sends a map with an unknown class", |liar| {
            liar.prepared();
            liar.say(&liar.switch(&[(9, FRAMES)]));
            let _ = hear::<ToSource>(&liar.session.control);
        }),
        ("sends a map of more pages than there are", |liar| {
            liar.prepared();
            liar.say(&liar.switch(&[(1, u64::MAX), (2, FRAMES + 1)]));
            let _ = hear::<ToSource>(&liar.session.control);
        }),
        ("sends no device state", |liar| {
            liar.prepared();
            liar.device_state.clear();
            liar.say(&liar.switch(&[(1, FRAMES)]));
            let heard = hear::<ToSource>(&liar.session.control);
            assert!(matches!(heard, Some(ToSource::Failed { .. })), "the reason is told: {heard:?}");
        }),
        ("switches twice", |liar| {
            liar.loaded();
            liar.say(&liar.switch(&[(2, FRAMES)]));
            let _ = hear::<ToSource>(&liar.session.control);
        }),
        ("releases before go, and hangs up", |liar| {
            liar.loaded();
            liar.say(&ToDestination::Released { because: because() });
            liar.say(&ToDestination::Fate { fate: Fate::Released, because: because() });
        }),
        ("hangs up before go", Liar::loaded),
    ];
    let place = Place::new();
    for (what, lie) in lies {
        let (mut destination, address) = receive(&place, &[]);
        let mut liar = Liar::new(&address);
        lie(&mut liar);
        drop(liar);
        assert_eq!(destination.end(), 5, "a source that {what}: {}", destination.story());
        for state in ["tethered", "owner"] {
            assert!(!destination.was(state), "a source that {what}: {}", destination.story());
        }
    }
    place.expect_nothing_left();
}

#[test]
fn p6_a_release_that_nobody_asked_for_while_pages_are_missing_is_none() {
    if !has_userfaultfd() {
        eprintln!("skipped: it needs a userfaultfd");
        return;
    }
    let place = Place::new();
    let (mut destination, address) = receive(&place, &["--hold-pull-at", "1"]);
    let mut liar = Liar::new(&address);
    liar.loaded();
    liar.say(&ToDestination::Go { owner_epoch: OwnerEpoch(0), because: because() });
    destination.wait_for_state("tethered");
    for _ in 0..200 {
        liar.say(&ToDestination::Released { because: because() });
        liar.say(&ToDestination::Go { owner_epoch: OwnerEpoch(u64::MAX), because: because() });
        liar.say(&ToDestination::Fate { fate: Fate::Released, because: because() });
        liar.say(&ToDestination::ReleaseRefused { because: because() });
    }
    drop(liar);
    destination.wait_for_state("fenced");
    destination.signal(libc::SIGTERM);
    assert_eq!(destination.end(), 11, "{}", destination.story());
    assert!(!destination.was("owner"), "{}", destination.story());
    place.expect_nothing_left();
}

#[test]
fn p7_a_proposal_beyond_every_limit_is_refused_and_the_wait_goes_on() {
    let place = Place::new();
    let (mut destination, address) = receive(&place, &[]);
    let tether = |lease: Duration| TetherSettings {
        tracker: belay_checkpoint::guest::TrackerKind::UffdWp,
        policy: "fixed:10ms".parse().unwrap(),
        output: belay_checkpoint::outbox::OutputMode::Commit,
        lease: LeaseSettings { length: lease, ..LeaseSettings::default() },
    };
    let guest = |vcpus| VmmSpec::Kvm(GuestSpec { vcpus, ..guest_spec() });
    for (what, proposal, bytes) in [
        ("protocol", Proposal { protocol: 99, ..proposal() }, MEMORY),
        ("shards", Proposal { shards: u16::MAX, ..proposal() }, MEMORY),
        ("vCPUs", Proposal { vmm: guest(u16::MAX), ..proposal() }, MEMORY),
        ("lease", Proposal { tether: Some(tether(Duration::ZERO)), ..proposal() }, MEMORY),
        ("lease", Proposal { tether: Some(tether(Duration::MAX)), ..proposal() }, MEMORY),
        ("bytes of RAM", proposal(), 1 << 39),
        ("bytes of RAM", proposal(), 0),
    ] {
        let refused = connect(&address, &proposal, bytes).expect_err(what).to_string();
        assert!(refused.contains(what) || bytes == 0, "{refused:?} does not speak of {what}");
        destination.wait_for_state("turned-away");
    }
    destination.signal(libc::SIGTERM);
    assert_eq!(destination.end(), 130, "{}", destination.story());
    place.expect_nothing_left();
}

// ---- a destination that lies -------------------------------------------------------------------------------------------------

/// The destination's half of a session, with no guest at all.
struct Pretender {
    session: DestinationSession,
    lanes: [Box<dyn Lane>; 4],
    /// Where it may write, and what is asked of what it writes.
    ring: (RingKeys, RingOffer),
    /// What it writes from.
    pen: (Arc<Mapping>, LocalKey),
    _guard: std::os::fd::OwnedFd,
}

impl Pretender {
    /// Takes the hello, Prepare and every lane.
    fn new(listener: &Listener) -> Self {
        let session = listener.accept(bound()).expect("a source comes").accept(&[], bound()).unwrap();
        let heard = hear::<ToDestination>(&session.control);
        let Some(ToDestination::Prepare { ring, ring_geometry, .. }) = heard else { panic!("{heard:?}") };
        let mut initiator = fabric::initiator(&session).expect("a data path");
        let pen = Arc::new(RamFile::memfd("pen", 1 << 16, PageSize::Small).unwrap().map().unwrap());
        let key = initiator.register_local(&pen).unwrap();
        let ids = [(LaneKind::Fault, 0), (LaneKind::Bulk, 0), (LaneKind::Checkpoint, 0), (LaneKind::Checkpoint, 1)];
        let lanes = ids.map(|(kind, index)| initiator.open_lane(LaneId { kind, index }, 8, bound()).unwrap());
        let guard = session.lanes.take_guard(bound()).unwrap();
        Self { session, lanes, ring: (ring, ring_geometry), pen: (pen, key), _guard: guard }
    }

    fn say(&self, message: &ToSource) {
        // A source that has had enough has hung up; what counts is how it ended.
        let _ = self.session.control.send(&encode(message), bound());
    }

    /// Writes `bytes` into the ring, where the first segment belongs.
    fn write(&mut self, bytes: &[u8]) {
        let (pen, local) = &self.pen;
        pen.write(0, bytes);
        let (remote, remote_offset) = (self.ring.0.ring, SEGMENTS_OFFSET as u64);
        let write = Write { id: 1, remote, remote_offset, local: *local, local_offset: 0, len: bytes.len() as u32 };
        self.lanes[2].commit(&write, bound()).expect("the ring may be written");
    }

    fn prepared(&self) {
        self.say(&ToSource::Prepared { secrets: Some(Secrets::random().unwrap()), because: because() });
        let heard = hear::<ToDestination>(&self.session.control);
        assert!(matches!(heard, Some(ToDestination::Switch { .. })), "{heard:?}");
    }

    fn gone(&self) {
        self.prepared();
        self.say(&ToSource::Loaded { because: because() });
        let heard = hear::<ToDestination>(&self.session.control);
        assert!(matches!(heard, Some(ToDestination::Go { .. })), "{heard:?}");
    }

    fn resumed(&self) {
        self.gone();
        self.say(&ToSource::Resumed { because: because() });
    }
}

/// A source of a small guest whose destination is a liar, up to where that one has taken every lane.
fn tried(place: &Place, more: &[&str]) -> (Process, Pretender) {
    let any = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(&any, SessionConfig::new(Security::LoopbackOnly)).unwrap();
    let (to, state) = (listener.address().to_string(), place.text("source"));
    let where_to = ["send", "--json", "--to", &to, "--state-dir", &state];
    let guest = ["--drive", "threads", "--memory", "8M", "--run-before", "0ms", "--run-on", "50ms", "--check"];
    let source = place.belay(&[&where_to[..], &guest, more].concat());
    (source, Pretender::new(&listener))
}

#[test]
fn p2_p9_whatever_a_destination_says_or_does_not_say_the_guest_runs_on_at_the_source() {
    type Lie = fn(&Pretender);
    // What it does, the exit code, and whether the guest runs on here and was found right in every byte.
    let lies: [(&str, i32, bool, Lie); 11] = [
        ("hangs up before Prepared", 5, false, |_| {}),
        ("fails to prepare", 5, false, |liar| {
            liar.say(&ToSource::Failed { reason: "no room".into(), because: because() });
        }),
        ("says Loaded for Prepared", 5, false, |liar| liar.say(&ToSource::Loaded { because: because() })),
        ("hangs up at the switch", 5, true, Pretender::prepared),
        ("says no message at the switch", 5, true, |liar| {
            liar.prepared();
            let _ = liar.session.control.send(&[0xff; 64], bound());
        }),
        ("says everything but Loaded at the switch", 5, true, |liar| {
            liar.prepared();
            for _ in 0..50 {
                liar.say(&ToSource::Resumed { because: because() });
                liar.say(&ToSource::ReleaseAsked { all_landed: true, because: because() });
                liar.say(&ToSource::FateAsked { owner_epoch: OwnerEpoch(u64::MAX) });
                liar.say(&ToSource::Farewell);
            }
        }),
        ("is silent at the switch", 5, true, |liar| {
            liar.prepared();
            let heard = hear::<ToDestination>(&liar.session.control);
            assert!(matches!(heard, Some(ToDestination::Failed { .. })), "{heard:?}");
        }),
        ("hangs up after go", 10, true, Pretender::gone),
        ("is silent after go", 10, true, |liar| {
            liar.gone();
            while hear::<ToDestination>(&liar.session.control).is_some() {}
        }),
        ("asks for a release too soon, then says its guest is gone", 10, true, |liar| {
            liar.resumed();
            liar.say(&ToSource::ReleaseAsked { all_landed: false, because: because() });
            let heard = hear::<ToDestination>(&liar.session.control);
            assert!(matches!(heard, Some(ToDestination::ReleaseRefused { .. })), "{heard:?}");
            liar.say(&ToSource::GuestGone { because: because() });
            let heard = hear::<ToDestination>(&liar.session.control);
            assert!(matches!(heard, Some(ToDestination::Fate { fate: Fate::Revoked, .. })), "{heard:?}");
        }),
        ("never stops talking and never beats its heart", 10, true, |liar| {
            liar.resumed();
            while liar.session.control.send(&encode(&ToSource::AllLanded { because: because() }), bound()).is_ok() {}
        }),
    ];
    let place = Place::new();
    std::thread::scope(|all| {
        for lies in lies.chunks(4) {
            let place = &place;
            all.spawn(move || {
                for (what, code, checked, lie) in lies {
                    let (mut source, liar) = tried(place, &["--lease", "300ms"]);
                    lie(&liar);
                    drop(liar);
                    assert_eq!(source.end(), *code, "a destination that {what}: {}", source.story());
                    if *checked {
                        let found = source.events("checked").last();
                        let found = found.unwrap_or_else(|| panic!("a destination that {what}: {}", source.story()));
                        assert_eq!(
                            (&found["wrong_pages"], &found["detail"]),
                            (&0.into(), &"".into()),
                            "{what}: {found}"
                        );
                    }
                    assert!(!source.was("released"), "a destination that {what}: {}", source.story());
                }
            });
        }
    });
    place.expect_nothing_left();
}

/// The first record of a session, sealed as a writer seals it, with these sections.
fn record(nonce: u64, version: u16, sections: &[(u16, &[u8])]) -> Vec<u8> {
    let (mut image, mut chain) = (Vec::new(), Vec::new());
    let mut put = |sequence: u64, kind: u16, body: &[u8], image: &mut Vec<u8>| {
        let (len, checksum) = ((body.len() as u32).into(), record::crc(body).into());
        let section = SectionHeader { kind: kind.into(), flags: CRITICAL.into(), len, checksum, ..Default::default() };
        let (magic, flags) = (record::MAGIC.into(), if sequence == 1 { FIRST } else { 0 }.into());
        let (version, nonce, sequence) = (version.into(), nonce.into(), sequence.into());
        let header =
            SegmentHeader { magic, version, flags, nonce, sequence, epoch: 1.into(), section, check: 0.into() };
        let end = image.len() + header.stride();
        image.extend_from_slice(header.sealed().as_bytes());
        image.extend_from_slice(body);
        image.resize(end, 0);
        chain.extend_from_slice(section.as_bytes());
        record::crc(&chain)
    };
    let head = Head { page_shift: 12.into(), regions: 1.into(), taken_at_ns: 1.into() };
    let mut sum = put(1, kind::HEAD, head.as_bytes(), &mut image);
    for (index, (kind, body)) in sections.iter().enumerate() {
        sum = put(2 + index as u64, *kind, body, &mut image);
    }
    let (segments, bytes) = ((1 + sections.len() as u64).into(), (image.len() as u64).into());
    let trailer = Trailer { segments, bytes, chain: sum.into(), reserved: 0.into() };
    put(2 + sections.len() as u64, kind::TRAILER, trailer.as_bytes(), &mut image);
    image
}

/// The same for longer, with a name for orders, up to where the guest is said to run there.
fn lied_to(place: &Place, name: &str) -> (Process, Pretender) {
    let (source, liar) = tried(place, &["--lease", "5s", "--run-dir", &place.text("run"), "--name", name]);
    liar.resumed();
    (source, liar)
}

#[test]
fn p9_a_checkpoint_that_the_source_cannot_take_has_nobody_shut_out_and_the_operator_decides() {
    const UNKNOWN: u16 = 99;
    type Lie = fn(u64) -> Vec<u8>;
    let lies: [(&str, Lie, &str); 3] = [
        ("of-another-version", |nonce| record(nonce, record::VERSION + 1, &[]), "version"),
        ("with-an-unknown-section", |nonce| record(nonce, record::VERSION, &[(UNKNOWN, b"?")]), "99"),
        ("without-device-state", |nonce| record(nonce, record::VERSION, &[]), "device state"),
    ];
    let place = Place::new();
    std::thread::scope(|all| {
        for (what, lie, why) in lies {
            let place = &place;
            all.spawn(move || {
                let (mut source, mut liar) = lied_to(place, what);
                let order = |more: &[&str]| {
                    let run = place.text("run");
                    let mut order = place.belay(&[&["catch", what, "--run-dir", &run, "--json"], more].concat());
                    (order.end(), order.story())
                };
                let (code, story) = order(&["--older", "--i-know-what-came-after-is-undone"]);
                assert!(code == 31 && story.contains("no checkpoint has been refused"), "{what}: {code} {story}");
                liar.write(&lie(liar.ring.1.nonce));
                let stuck = source.wait_for_event("failed");
                assert!(
                    source.story().contains("no checkpoint after epoch 0 can be taken"),
                    "{what}: {}",
                    source.story()
                );
                assert!(source.story().contains(why), "{what}: {stuck} {}", source.story());
                // Neither revoked nor told so: it could go on with the guest, if it had one.
                let heard = liar.session.control.recv(Deadline::after(Duration::from_millis(50)));
                assert!(matches!(heard, Err(session::SessionError::TimedOut { .. })), "{what}: {heard:?}");
                assert!(source.events("revoked").next().is_none(), "{what}: {}", source.story());

                let (code, story) = order(&[]);
                assert!(code == 31 && story.contains("--older"), "{what}: {code} {story}");
                assert_eq!(order(&["--older"]).0, 2, "the word is asked for as well");
                let (code, story) = order(&["--older", "--i-know-what-came-after-is-undone"]);
                assert_eq!(code, 0, "{what}: {story} {}", source.story());
                assert_eq!(source.end(), 10, "{what}: {}", source.story());
                assert!(source.was("caught-from-older"), "{what}: {}", source.story());
                source.expect_whole();
            });
        }
    });
    place.expect_nothing_left();
}

#[test]
fn p9_a_checkpoint_that_does_not_load_is_kept_until_the_operator_ends_it() {
    let place = Place::new();
    let (mut source, mut liar) = lied_to(&place, "vm");
    liar.write(&record(liar.ring.1.nonce, record::VERSION, &[(kind::DEVICE_STATE, b"no state of any guest")]));
    drop(liar);
    source.wait_for_event("failed");
    assert!(source.story().contains("cannot load epoch 1"), "{}", source.story());
    source.signal(libc::SIGTERM);
    assert_eq!(source.end(), 14, "{}", source.story());
    assert!(!source.was("lost"), "{}", source.story());
    place.expect_nothing_left();
}
