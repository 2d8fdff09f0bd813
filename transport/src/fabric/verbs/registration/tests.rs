//! What registration promises, with a pretended device that pins real frames: it keeps hold of them as a NIC does, so that what it
//! reads after a hole was punched are the old bytes.

use super::extents::tests::{PAGE, any_extents, flags};
use super::table::tests::at;
use super::*;
use crate::deadline::Deadline;
use crate::region::RamFile;
use crate::testing::HugePages;
use proptest::prelude::*;
use rustix::pipe::{IoSliceRaw, PipeFlags, SpliceFlags, pipe_with, tee, vmsplice};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};

const BOUND: Duration = Duration::from_secs(20);
/// As a device that serves everything on demand asks for it.
const ON_DEMAND: OnDemand = OnDemand::of(u32::MAX);
/// Pages that a pipe holds by default (pipe(7)).
const PAGES_A_PIPE: usize = 16;

/// A device without hardware.
#[derive(Default)]
struct Nic {
    state: Arc<State>,
    /// Fails the registration of this offset.
    fails_at: Option<u64>,
    /// Has on-demand paging.
    on_demand: bool,
}

#[derive(Default)]
struct State {
    regions: Mutex<HashMap<u32, Pinned>>,
    next_key: AtomicUsize,
    announced: Mutex<Vec<Extent>>,
}

/// Frames held by reference in pipes: vmsplice(2) takes the frames that are mapped now, whatever is mapped there later.
struct Pinned {
    addr: u64,
    pipes: Vec<(OwnedFd, OwnedFd)>,
    mapping: Option<Arc<Mapping>>,
}

impl State {
    fn live(&self) -> usize {
        self.regions.lock().unwrap().len()
    }
}

/// Ends one region's registration when dropped.
struct Handle(Arc<State>, u32);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.regions.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

impl Registrar for Nic {
    fn register(&self, mapping: &Arc<Mapping>, offset: u64, len: u64, access: Access) -> io::Result<Region> {
        if self.fails_at.is_some_and(|at| (offset..offset + len).contains(&at)) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let unpinned = access == access.on_demand();
        if unpinned && !self.on_demand {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let mut pipes = Vec::new();
        let steps = if unpinned { 0 } else { (len as usize).div_ceil(PAGES_A_PIPE * PAGE as usize) };
        for step in 0..steps {
            let start = step * PAGES_A_PIPE * PAGE as usize;
            let bytes = (len as usize - start).min(PAGES_A_PIPE * PAGE as usize);
            let pipe = pipe_with(PipeFlags::CLOEXEC)?;
            let at = mapping.as_ptr().wrapping_add(offset as usize + start);
            // SAFETY: the slice is only an address for the kernel, which reads the frames later; they stay alive by its reference.
            let slice = unsafe { std::slice::from_raw_parts(at, bytes) };
            // SAFETY: shared memory that is read by nobody through this; what is read later may be newer or older, as the test wants.
            let held = unsafe { vmsplice(&pipe.1, &[IoSliceRaw::from_slice(slice)], SpliceFlags::NONBLOCK) }?;
            assert_eq!(held, bytes, "a pipe holds {PAGES_A_PIPE} pages");
            pipes.push(pipe);
        }
        let key = self.state.next_key.fetch_add(1, Ordering::Relaxed) as u32;
        let pinned = Pinned { addr: mapping.address() + offset, pipes, mapping: unpinned.then(|| mapping.clone()) };
        self.state.regions.lock().unwrap().insert(key, pinned);
        Ok(Region { lkey: key, rkey: key, handle: Box::new(Handle(self.state.clone(), key)) })
    }

    fn announce(&self, _: &Region, _: &Mapping, extents: &[Extent]) -> io::Result<()> {
        self.state.announced.lock().unwrap().extend(extents);
        Ok(())
    }
}

impl Nic {
    /// First byte of the page at `offset`, as the device reads it by what the table says.
    fn reads(&self, table: &Table, offset: u64) -> Option<u8> {
        let chunk = at(table, offset)?;
        Some(self.reads_by(chunk, offset))
    }

    fn reads_by(&self, chunk: &Chunk, offset: u64) -> u8 {
        let regions = self.state.regions.lock().unwrap();
        let pinned = &regions[&chunk.rkey];
        let inside = (chunk.addr + (offset - chunk.offset) - pinned.addr) as usize;
        if let Some(mapping) = &pinned.mapping {
            let mut byte = [0];
            mapping.read((pinned.addr - mapping.address()) as usize + inside, &mut byte);
            return byte[0];
        }
        let page = inside / PAGE as usize;
        let copy = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let whole = PAGES_A_PIPE * PAGE as usize;
        let copied = tee(&pinned.pipes[page / PAGES_A_PIPE].0, &copy.1, whole, SpliceFlags::NONBLOCK).unwrap();
        let mut bytes = vec![0; copied];
        let mut got = 0;
        while got < copied {
            got += rustix::io::read(&copy.0, &mut bytes[got..]).unwrap();
        }
        bytes[page % PAGES_A_PIPE * PAGE as usize]
    }
}

fn options() -> RegistrationOptions {
    RegistrationOptions { threads: 2, ..RegistrationOptions::for_device(u32::MAX, u64::MAX, PageSize::Small) }
}

/// A guest's file, its own mapping, and the one made for registration.
struct Ram {
    file: RamFile,
    guest: Mapping,
    pinned: Arc<Mapping>,
}

impl Ram {
    fn new(pages: u64) -> Self {
        let file = RamFile::memfd("registration", (pages * PAGE) as usize, PageSize::Small).unwrap();
        let (guest, pinned) = (file.map().unwrap(), Arc::new(file.map().unwrap()));
        Self { file, guest, pinned }
    }

    fn write(&self, page: u64, value: u8) {
        self.guest.write((page * PAGE) as usize, &[value]);
    }

    fn punch(&self, page: u64) {
        self.file.punch(Extent { offset: page * PAGE, len: PAGE }).unwrap();
    }
}

#[test]
fn exporting_pins_what_holds_data_and_fills_no_hole() {
    let ram = Ram::new(4096);
    for page in [0, 1, 2, 77, 500, 501, 4095] {
        ram.write(page, page as u8);
    }
    let before = ram.file.occupancy().unwrap();
    let nic = Nic::default();
    let registered = register(&nic, &ram.pinned, &before, Access::EXPORTED, &options()).unwrap();
    assert_eq!(ram.file.occupancy().unwrap(), before, "a hole was filled by exporting");
    assert_eq!(registered.table.extents(), before);
    let report = registered.report();
    assert_eq!((report.regions, report.pinned_bytes), (4, 7 * PAGE));
    for page in [0, 1, 2, 77, 500, 501, 4095] {
        assert_eq!(nic.reads(&registered.table, page * PAGE), Some(page as u8));
    }
    assert_eq!(nic.reads(&registered.table, 3 * PAGE), None);
    assert_eq!(nic.state.live(), 4);
    drop(registered);
    assert_eq!(nic.state.live(), 0, "every region is given back");
}

#[test]
fn a_stale_pin_brings_old_bytes_and_an_extension_replaces_it() {
    let ram = Ram::new(1024);
    for page in 0..1024 {
        ram.write(page, 1);
    }
    let nic = Nic::default();
    let extents = ram.file.occupancy().unwrap();
    let mut registered = register(&nic, &ram.pinned, &extents, Access::EXPORTED, &options()).unwrap();
    let old = *at(&registered.table, 700 * PAGE).unwrap();
    for page in 700..703 {
        ram.punch(page);
        ram.write(page, 2);
    }
    assert_eq!(ram.file.occupancy().unwrap(), extents, "the occupancy does not tell");
    assert_eq!(nic.reads_by(&old, 700 * PAGE), 1, "the trap is not there any more: is this still a test?");
    let extension = registered.extend(&nic, &extents, &options()).unwrap();
    assert_eq!((extension.changed, extension.new_bytes, extension.stale_bytes), (true, 0, 3 * PAGE));
    // Registered anew with its populated neighbours in the block: one region, not three.
    assert_eq!(extension.regions, 1);
    let newer = at(&registered.table, 700 * PAGE).unwrap();
    assert_eq!((newer.offset, newer.len), (BLOCK, BLOCK));
    assert_eq!(nic.reads_by(&old, 700 * PAGE), 1, "the old registration stays, and stays stale");
    for page in 0..1024 {
        let expected = if (700..703).contains(&page) { 2 } else { 1 };
        assert_eq!(nic.reads(&registered.table, page * PAGE), Some(expected), "page {page}");
    }
    // The same again, now under the newer region; and with nothing to do, nothing is done.
    ram.punch(701);
    ram.write(701, 3);
    let extension = registered.extend(&nic, &extents, &options()).unwrap();
    assert_eq!(extension.stale_bytes, PAGE);
    assert_eq!(nic.reads(&registered.table, 701 * PAGE), Some(3));
    let idle = registered.extend(&nic, &extents, &options()).unwrap();
    assert_eq!(Extension { took: Duration::ZERO, ..idle }, Extension::default());
}

#[test]
fn what_the_guest_gave_up_is_offered_no_more() {
    let ram = Ram::new(64);
    for page in 0..64 {
        ram.write(page, 1);
    }
    let nic = Nic::default();
    let extents = ram.file.occupancy().unwrap();
    let mut registered = register(&nic, &ram.pinned, &extents, Access::EXPORTED, &options()).unwrap();
    ram.punch(9);
    let extents = ram.file.occupancy().unwrap();
    let extension = registered.extend(&nic, &extents, &options()).unwrap();
    assert_eq!((extension.changed, extension.regions), (true, 0));
    assert_eq!(nic.reads(&registered.table, 9 * PAGE), None);
    assert_eq!(registered.table.extents(), extents);
    assert_eq!(ram.file.occupancy().unwrap(), extents, "looking for it filled it");
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64),
    Punch(u64),
    Extend,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..96_u64).prop_map(Step::Write),
        3 => (0..96_u64).prop_map(Step::Punch),
        1 => Just(Step::Extend),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever a guest does between prepare and switch, with regions to spare or hardly any.
    #[test]
    fn after_an_extension_the_device_reads_what_the_guest_wrote_last(
        populated in any_extents(),
        steps in prop::collection::vec(any_step(), 1..60),
        few in prop::option::of(24..40_usize),
        page_table_reading in any::<bool>(),
    ) {
        let ram = Ram::new(96);
        let nic = Nic { on_demand: page_table_reading, ..Nic::default() };
        let mut options = options();
        options.on_demand = if page_table_reading { ON_DEMAND } else { OnDemand::NONE };
        if let Some(few) = few {
            options.max_regions = few;
        }
        let mut model = [0_u8; 96];
        for (page, value) in model.iter_mut().enumerate() {
            if flags(&populated)[page] {
                *value = 1;
                ram.write(page as u64, 1);
            }
        }
        let extents = ram.file.occupancy().unwrap();
        let mut registered = register(&nic, &ram.pinned, &extents, Access::EXPORTED, &options).unwrap();
        for (count, step) in steps.into_iter().chain([Step::Extend]).enumerate() {
            let value = 2 + count as u8;
            match step {
                Step::Write(page) => {
                    ram.write(page, value);
                    model[page as usize] = value;
                }
                Step::Punch(page) => {
                    ram.punch(page);
                    model[page as usize] = 0;
                }
                Step::Extend => {
                    let extents = ram.file.occupancy().unwrap();
                    let before = registered.chunks().to_vec();
                    let Ok(extension) = registered.extend(&nic, &extents, &options) else {
                        // Only the budget can end it, and only because each extension takes some.
                        prop_assert!(few.is_some());
                        break;
                    };
                    prop_assert_eq!(extension.changed, before != registered.chunks(), "the peer has to be told");
                    for (page, held) in flags(&extents).into_iter().enumerate().filter(|(_, held)| *held) {
                        prop_assert_eq!(nic.reads(&registered.table, page as u64 * PAGE), Some(model[page]), "page {} {}", page, held);
                    }
                    if few.is_none() {
                        prop_assert_eq!(ram.file.occupancy().unwrap(), extents, "a hole was filled");
                    }
                    prop_assert!(nic.state.live() <= options.max_regions);
                }
            }
        }
    }
}

#[test]
fn a_registration_that_fails_half_way_leaves_nothing_behind_and_names_the_place() {
    let ram = Ram::new(256);
    let runs: Vec<Extent> = (0..256).step_by(4).map(|page| Extent { offset: page * PAGE, len: PAGE }).collect();
    let nic = Nic { fails_at: Some(128 * PAGE), ..Nic::default() };
    let error = register(&nic, &ram.pinned, &runs, Access::EXPORTED, &options()).err().unwrap();
    assert!(matches!(error, RegistrationError::Register { offset, len, .. } if (offset, len) == (128 * PAGE, PAGE)));
    assert!(error.to_string().contains("524288+4096"), "{error}");
    assert_eq!(nic.state.live(), 0);
}

#[test]
fn extents_outside_the_mapping_are_refused_before_anything_is_pinned() {
    let ram = Ram::new(4);
    let nic = Nic::default();
    for (offset, len) in [(3 * PAGE, 2 * PAGE), (u64::MAX, 2)] {
        let refused =
            register(&nic, &ram.pinned, &[Extent { offset, len }], Access::EXPORTED, &options()).err().unwrap();
        assert!(matches!(refused, RegistrationError::OutOfRange { size, .. } if size == 4 * PAGE));
    }
    assert_eq!(nic.state.next_key.load(Ordering::Relaxed), 0);
}

#[test]
fn progress_grows_to_the_total() {
    let ram = Ram::new(600);
    let runs: Vec<Extent> = (0..600).step_by(3).map(|page| Extent { offset: page * PAGE, len: PAGE }).collect();
    let told = Arc::new(Mutex::new(Vec::new()));
    let (tell, pinned_before) = (told.clone(), 5 * PAGE);
    let options = RegistrationOptions {
        pinned_before,
        progress: Some(Arc::new(move |progress| tell.lock().unwrap().push(progress))),
        ..options()
    };
    let registered = register(&Nic::default(), &ram.pinned, &runs, Access::EXPORTED, &options).unwrap();
    let told = told.lock().unwrap();
    assert_eq!(told.len(), 200);
    assert!(told.windows(2).all(|pair| pair[0].done_bytes < pair[1].done_bytes && pair[0].regions < pair[1].regions));
    let last = told.last().unwrap();
    assert_eq!((last.done_bytes, last.total_bytes, last.regions), (200 * PAGE, 200 * PAGE, 200));
    assert_eq!(last.pinned_bytes, pinned_before + 200 * PAGE);
    assert_eq!(registered.report().pinned_bytes, 200 * PAGE);
}

#[test]
fn on_demand_regions_pin_nothing_and_are_never_stale() {
    let ram = Ram::new(512);
    for page in 100..200 {
        ram.write(page, 1);
    }
    let nic = Nic { on_demand: true, ..Nic::default() };
    let options = RegistrationOptions { on_demand: ON_DEMAND, max_region_bytes: 300 * PAGE, ..options() };
    let extents = ram.file.occupancy().unwrap();
    let mut registered = register(&nic, &ram.pinned, &extents, Access::EXPORTED, &options).unwrap();
    let report = registered.report();
    assert_eq!((report.regions, report.pinned_bytes), (2, 0));
    assert_eq!(registered.table.extents(), extents);
    assert_eq!(*nic.state.announced.lock().unwrap(), extents, "the device learns beforehand what will be read");
    ram.punch(150);
    ram.write(150, 2);
    ram.write(299, 3);
    ram.write(300, 3);
    let extents = ram.file.occupancy().unwrap();
    let extension = registered.extend(&nic, &extents, &options).unwrap();
    assert_eq!((extension.new_bytes, extension.stale_bytes, nic.state.live()), (2 * PAGE, 0, 2));
    assert_eq!(registered.table.extents(), extents);
    for (page, value) in [(150, 2), (151, 1), (299, 3), (300, 3)] {
        assert_eq!(nic.reads(&registered.table, page * PAGE), Some(value));
    }
    assert_eq!(nic.reads(&registered.table, 301 * PAGE), None);
}

#[test]
fn a_device_that_will_not_page_on_demand_after_all_is_pinned_for() {
    let ram = Ram::new(8);
    ram.write(3, 1);
    let nic = Nic::default();
    let options = RegistrationOptions { on_demand: ON_DEMAND, ..options() };
    let extents = ram.file.occupancy().unwrap();
    let registered = register(&nic, &ram.pinned, &extents, Access::EXPORTED, &options).unwrap();
    assert_eq!((registered.report().pinned_bytes, nic.state.live()), (PAGE, 1));
}

#[test]
fn huge_pages_are_registered_whole_and_looked_after() {
    let Some(_pages) = HugePages::reserve(6) else { return };
    let huge = 2_u64 << 20;
    let file = RamFile::memfd("registration-huge", 4 * huge as usize, PageSize::Huge).unwrap();
    let (guest, pinned) = (file.map().unwrap(), Arc::new(file.map().unwrap()));
    guest.write(huge as usize, &[1]);
    let options = RegistrationOptions { page_size: PageSize::Huge, ..options() };
    let nic = Nic::default();
    // Any byte of a huge page means all of it.
    let part = [Extent { offset: huge + 8 * PAGE, len: PAGE }];
    let mut registered = register(&nic, &pinned, &part, Access::EXPORTED, &options).unwrap();
    assert_eq!(registered.table.extents(), [Extent { offset: huge, len: huge }]);
    assert_eq!(nic.reads(&registered.table, huge), Some(1));
    file.punch(Extent { offset: huge, len: huge }).unwrap();
    guest.write(huge as usize, &[2]);
    let extension = registered.extend(&nic, &part, &options).unwrap();
    assert_eq!((extension.stale_bytes, extension.regions), (huge, 1));
    assert_eq!(nic.reads(&registered.table, huge), Some(2));
}

/// A device that takes its time to let go: until told.
struct Slow(Mutex<Receiver<()>>, AtomicU64);

struct SlowHandle(Arc<Slow>);

impl Drop for SlowHandle {
    fn drop(&mut self) {
        let _ = self.0.0.lock().unwrap().recv_timeout(BOUND);
        self.0.1.fetch_add(1, Ordering::Release);
    }
}

#[test]
fn giving_back_goes_on_in_the_background_and_its_end_is_told() {
    struct SlowNic(Arc<Slow>);
    impl Registrar for SlowNic {
        fn register(&self, _: &Arc<Mapping>, _: u64, _: u64, _: Access) -> io::Result<Region> {
            Ok(Region { lkey: 0, rkey: 0, handle: Box::new(SlowHandle(self.0.clone())) })
        }
        fn announce(&self, _: &Region, _: &Mapping, _: &[Extent]) -> io::Result<()> {
            Ok(())
        }
    }
    let (go, gate) = channel();
    let slow = Arc::new(Slow(Mutex::new(gate), AtomicU64::new(0)));
    let ram = Ram::new(8);
    let whole = register_whole(&SlowNic(slow.clone()), &ram.pinned, Access::landing(false), &options()).unwrap();
    let mut releasing = Releasing::start(vec![whole]).unwrap();
    assert_eq!(releasing.wait(Deadline::after(Duration::ZERO)), None, "it does not wait for the device");
    assert_eq!(slow.1.load(Ordering::Acquire), 0);
    go.send(()).unwrap();
    let report = releasing.wait(Deadline::after(BOUND)).unwrap();
    assert_eq!((report.regions, report.pinned_bytes), (1, 8 * PAGE));
    assert_eq!(slow.1.load(Ordering::Acquire), 1);
}
