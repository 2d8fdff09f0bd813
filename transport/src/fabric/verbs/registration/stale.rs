//! Finds holes that were punched under live registrations.
//!
//! A registration pins frames. When a hole is punched in the file (balloon, free-page reporting, virtio-mem), the frame leaves the
//! file and stays pinned: the device goes on reading the old bytes, while the guest's next touch allocates another frame. READs
//! succeed all the while.
//!
//! What tells of it is the page table of the mapping that was registered. Pinning fills its entries; punching a hole takes them
//! away from every mapping of the file; only a touch through this very mapping would fill them again, and **nobody touches it**: it
//! was made for the registration and for nothing else. So an entry that is missing under a registration means that its frame may
//! not be the file's any more. (A kernel that unmaps a frame for reasons of its own, reclaim or a split huge page, gives a
//! false alarm, which costs one more registration.)
//!
//! One thing must not fill entries behind our back: a *read* fault maps neighbours along (do_fault_around), a write fault does
//! not. So whoever registers populates by writing first ([`super::register`]), and pinning meets no fault.
//!
//! Linux 6.7 answers with one PAGEMAP_SCAN for a range; before that each page's word of /proc/self/pagemap is read
//! (Documentation/admin-guide/mm/pagemap.rst). A swapped or migrating page counts as present: its frame is still the file's.

use super::extents::{between, end, intersection, normal, total};
use crate::pagemap::{NO_REGION, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, Query, scan};
use crate::region::{Extent, Mapping};
use crate::units::{PAGE_SHIFT, PAGE_SIZE};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;

/// Least that is worth another thread.
const SHARE: u64 = 256 << 20;
/// Runs taken from the kernel at once.
const RUNS: usize = 1024;
/// Words of /proc/self/pagemap read at once: 64 KiB, 32 MiB of memory.
const WORDS: usize = 8192;
/// Bits of such a word.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// A way of asking the kernel which parts are in no page table.
type Look = fn(&OwnedFd, &Mapping, &[Extent]) -> Result<Vec<Extent>, Errno>;

/// The parts of `within` (normal, page-aligned) that are in no page table of `mapping`.
pub(super) fn missing(mapping: &Mapping, within: &[Extent], threads: usize) -> io::Result<Vec<Extent>> {
    missing_by(best, mapping, within, threads)
}

fn missing_by(look: Look, mapping: &Mapping, within: &[Extent], threads: usize) -> io::Result<Vec<Extent>> {
    if within.is_empty() {
        return Ok(Vec::new());
    }
    let shares = shares(within, threads);
    let found = std::thread::scope(|scope| {
        let looking: Vec<_> =
            shares[1..].iter().map(|share| scope.spawn(move || missing_in(look, mapping, share))).collect();
        let first = missing_in(look, mapping, &shares[0]);
        let others = looking.into_iter().map(|thread| thread.join().expect("looking at page tables does not panic"));
        std::iter::once(first).chain(others).collect::<io::Result<Vec<_>>>()
    })?;
    Ok(normal(found.concat()))
}

/// Extents in parts of about the same number of bytes, in order.
fn shares(within: &[Extent], threads: usize) -> Vec<Vec<Extent>> {
    let all = total(within);
    let parts = (all / SHARE).clamp(1, threads.max(1) as u64);
    let share = all.div_ceil(parts).next_multiple_of(PAGE_SIZE as u64);
    let (mut shares, mut current, mut room) = (Vec::new(), Vec::new(), share);
    for extent in within {
        let mut at = extent.offset;
        while at < end(extent) {
            let take = room.min(end(extent) - at);
            current.push(Extent { offset: at, len: take });
            at += take;
            room -= take;
            if room == 0 {
                shares.push(std::mem::take(&mut current));
                room = share;
            }
        }
    }
    if !current.is_empty() {
        shares.push(current);
    }
    shares
}

fn missing_in(look: Look, mapping: &Mapping, within: &[Extent]) -> io::Result<Vec<Extent>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let pagemap = rustix::fs::open("/proc/self/pagemap", flags, Mode::empty())?;
    Ok(look(&pagemap, mapping, within)?)
}

/// By PAGEMAP_SCAN, and word by word where the kernel does not know it: as true, only slower.
fn best(pagemap: &OwnedFd, mapping: &Mapping, within: &[Extent]) -> Result<Vec<Extent>, Errno> {
    match scanned(pagemap, mapping, within) {
        Err(Errno::NOTTY | Errno::INVAL) => read(pagemap, mapping, within),
        other => other,
    }
}

/// By PAGEMAP_SCAN over the whole span: unpopulated stretches between extents are skipped by the kernel a page table at a time.
fn scanned(pagemap: &OwnedFd, mapping: &Mapping, within: &[Extent]) -> Result<Vec<Extent>, Errno> {
    let base = mapping.address();
    let (Some(first), Some(last)) = (within.first(), within.last()) else { return Ok(Vec::new()) };
    let (mut at, stop) = (base + first.offset, base + end(last));
    let neither = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
    let query = Query { flags: 0, categories: neither, inverted: true };
    let mut runs = vec![NO_REGION; RUNS];
    let mut missing = Vec::new();
    while at < stop {
        let (count, walked) = scan(pagemap, query, at, stop, &mut runs)?;
        missing.extend(runs[..count].iter().map(|run| between(run.start - base, run.end - base)));
        at = walked;
    }
    Ok(intersection(&normal(missing), within))
}

/// A page's word at a time.
fn read(pagemap: &OwnedFd, mapping: &Mapping, within: &[Extent]) -> Result<Vec<Extent>, Errno> {
    let mut words = vec![0_u8; WORDS * 8];
    let mut missing: Vec<Extent> = Vec::new();
    for extent in within {
        let mut at = extent.offset;
        while at < end(extent) {
            let pages = (((end(extent) - at) >> PAGE_SHIFT) as usize).min(WORDS);
            let position = ((mapping.address() + at) >> PAGE_SHIFT) * 8;
            let got = match rustix::io::pread(pagemap, &mut words[..pages * 8], position) {
                Ok(got) if got >= 8 => got / 8,
                Ok(_) => return Err(Errno::IO),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            for (index, word) in words[..got * 8].chunks_exact(8).enumerate() {
                let word = u64::from_ne_bytes(word.try_into().expect("chunks of eight bytes"));
                if word & (PRESENT | SWAPPED) == 0 {
                    let offset = at + ((index as u64) << PAGE_SHIFT);
                    match missing.last_mut().filter(|last| end(last) == offset) {
                        Some(last) => last.len += PAGE_SIZE as u64,
                        None => missing.push(Extent { offset, len: PAGE_SIZE as u64 }),
                    }
                }
            }
            at += (got as u64) << PAGE_SHIFT;
        }
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::RamFile;
    use crate::testing::HugePages;
    use crate::units::PageSize;

    const PAGE: u64 = PAGE_SIZE as u64;
    const WAYS: [(&str, Look); 2] = [("at once", best), ("by words", read)];

    fn populate(mapping: &Mapping, extent: &Extent) {
        super::super::populate(mapping, extent).unwrap();
    }

    #[test]
    fn a_hole_punched_under_a_mapping_that_nobody_touches_is_found_though_it_was_filled_again() {
        let pages = 2000;
        let file = RamFile::memfd("stale", (pages * PAGE) as usize, PageSize::Small).unwrap();
        let (guest, pinned) = (file.map().unwrap(), file.map().unwrap());
        for page in 0..pages {
            guest.write((page * PAGE) as usize, &[1]);
        }
        let all = [Extent { offset: 0, len: pages * PAGE }];
        populate(&pinned, &all[0]);
        for (name, way) in WAYS {
            assert_eq!(missing_by(way, &pinned, &all, 2).unwrap(), [], "{name}");
        }
        let punched = [Extent { offset: 0, len: PAGE }, Extent { offset: 700 * PAGE, len: 9 * PAGE }];
        for extent in &punched {
            file.punch(*extent).unwrap();
            // Refilled through another mapping: the file has data there again, and SEEK_DATA sees no difference.
            guest.write(extent.offset as usize, &vec![2; extent.len as usize]);
        }
        assert_eq!(file.occupancy().unwrap(), all);
        for (name, way) in WAYS {
            assert_eq!(missing_by(way, &pinned, &all, 2).unwrap(), punched, "{name}");
            let part = [Extent { offset: 702 * PAGE, len: PAGE }, Extent { offset: 1000 * PAGE, len: PAGE }];
            assert_eq!(missing_by(way, &pinned, &part, 2).unwrap(), part[..1], "{name}: only what was asked about");
        }
        // Populated again by whoever registers it anew.
        for extent in &punched {
            populate(&pinned, extent);
        }
        for (name, way) in WAYS {
            assert_eq!(missing_by(way, &pinned, &all, 2).unwrap(), [], "{name}");
        }
    }

    #[test]
    fn populating_one_page_does_not_hide_that_its_neighbour_was_punched() {
        let file = RamFile::memfd("stale-around", 64 * PAGE as usize, PageSize::Small).unwrap();
        let (guest, pinned) = (file.map().unwrap(), file.map().unwrap());
        guest.write(0, &[1; 64 * PAGE_SIZE]);
        let all = [Extent { offset: 0, len: 64 * PAGE }];
        populate(&pinned, &all[0]);
        file.punch(Extent { offset: 20 * PAGE, len: 8 * PAGE }).unwrap();
        guest.write(20 * PAGE_SIZE, &[2; 8 * PAGE_SIZE]);
        populate(&pinned, &Extent { offset: 23 * PAGE, len: PAGE });
        let expected = [Extent { offset: 20 * PAGE, len: 3 * PAGE }, Extent { offset: 24 * PAGE, len: 4 * PAGE }];
        for (name, way) in WAYS {
            assert_eq!(missing_by(way, &pinned, &all, 1).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn both_ways_agree_on_scattered_pages_and_any_number_of_threads() {
        let len = 3 * SHARE;
        let file = RamFile::memfd("stale-ways", len as usize, PageSize::Small).unwrap();
        let pinned = file.map().unwrap();
        let mut within = Vec::new();
        let mut expected = Vec::new();
        // Far more runs than one call of the kernel gives back; one page in three missing, on both sides of every share's border.
        for (index, at) in (0..len / PAGE).step_by(29).enumerate() {
            let extent = Extent { offset: at * PAGE, len: PAGE };
            within.push(extent);
            if index % 3 == 0 {
                expected.push(extent);
            } else {
                populate(&pinned, &extent);
            }
        }
        for threads in [1, 3] {
            for (name, way) in WAYS {
                assert!(missing_by(way, &pinned, &within, threads).unwrap() == expected, "{threads} threads, {name}");
            }
        }
        assert!(expected.len() > 2 * RUNS);
    }

    #[test]
    fn shares_are_the_same_extents_in_order() {
        let within = [Extent { offset: PAGE, len: 700 << 20 }, Extent { offset: 1 << 40, len: 400 << 20 }];
        for threads in [1, 2, 3, 16] {
            let shares = shares(&within, threads);
            assert!(shares.len() <= threads.min(4), "{} shares", shares.len());
            assert_eq!(normal(shares.concat()), within);
            assert!(shares.iter().flatten().all(|extent| extent.len % PAGE == 0));
        }
    }

    #[test]
    fn a_huge_page_punched_is_found_by_both_ways() {
        let Some(_pages) = HugePages::reserve(6) else { return };
        let huge = 2 << 20;
        let file = RamFile::memfd("stale-huge", 4 * huge as usize, PageSize::Huge).unwrap();
        let (guest, pinned) = (file.map().unwrap(), file.map().unwrap());
        let all = [Extent { offset: 0, len: 4 * huge }];
        populate(&pinned, &all[0]);
        for (name, way) in WAYS {
            assert_eq!(missing_by(way, &pinned, &all, 1).unwrap(), [], "{name}");
        }
        let punched = Extent { offset: 2 * huge, len: huge };
        file.punch(punched).unwrap();
        guest.write(2 * huge as usize, &[1]);
        for (name, way) in WAYS {
            assert_eq!(missing_by(way, &pinned, &all, 1).unwrap(), [punched], "{name}");
        }
    }
}
