//! Which parts of a RAM file hold data, asked of the file itself (lseek(2), SEEK_DATA and SEEK_HOLE): looking through a mapping
//! would fill the holes.
//!
//! The question is asked while the guest stands still for the switch, and costs two calls a run of data: 13 ms for a guest of
//! 256 MiB with every fourth page a hole. So large files are looked at by several threads.

use super::{Extent, RegionError};
use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Bytes that are worth a thread.
const SHARE: u64 = 64 << 20;
/// Most threads; the look-up is bound by the file's page tree, not by cores.
const MOST_THREADS: u64 = 8;

/// The extents of a file's first `len` bytes that hold data, in order and not touching.
pub(super) fn data_extents(file: impl AsFd, len: u64) -> Result<Vec<Extent>, RegionError> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let parts = (len / SHARE).clamp(1, cores.min(MOST_THREADS));
    let share = len.div_ceil(parts).next_multiple_of(2 << 20);
    // Descriptions of their own: calls that move one file position wait for each other. Without /proc there is one.
    let files: Option<Vec<OwnedFd>> = (1..parts).map(|_| reopened(&file)).collect();
    let files = files.unwrap_or_default();
    let share = if files.is_empty() { len } else { share };
    let part = |index: u64| (index * share).min(len)..((index + 1) * share).min(len);
    let found = std::thread::scope(|scope| {
        let threads: Vec<_> = files
            .iter()
            .zip(1..)
            .map(|(file, index)| scope.spawn(move || data_extents_in(file, part(index))))
            .collect();
        let first = data_extents_in(&file, part(0));
        let others = threads.into_iter().map(|thread| thread.join().expect("looking for data does not panic"));
        std::iter::once(first).chain(others).collect::<Result<Vec<_>, _>>()
    })?;
    let mut extents: Vec<Extent> = Vec::with_capacity(found.iter().map(Vec::len).sum());
    for extent in found.into_iter().flatten() {
        match extents.last_mut() {
            Some(last) if last.offset + last.len == extent.offset => last.len += extent.len,
            _ => extents.push(extent),
        }
    }
    Ok(extents)
}

/// As [`data_extents`], where that was asked `before`: only what was a hole then is looked at, which takes no time where little was.
/// `allocated` is how many bytes the file has. `None` where that is not what was found: something was given up since, or is
/// reserved and holds no data, and all of it has to be looked at.
pub(super) fn grown_extents(
    file: impl AsFd,
    before: &[Extent],
    len: u64,
    allocated: u64,
) -> Result<Option<Vec<Extent>>, RegionError> {
    let mut extents: Vec<Extent> = Vec::with_capacity(before.len());
    let mut add = |extent: Extent| match extents.last_mut() {
        Some(last) if last.offset + last.len == extent.offset => last.len += extent.len,
        _ => extents.push(extent),
    };
    let (mut at, mut bytes) = (0, 0);
    let end = Extent { offset: len, len: 0 };
    for extent in before.iter().chain([&end]) {
        let grown = if extent.offset > at { data_extents_in(&file, at..extent.offset)? } else { Vec::new() };
        for extent in grown.into_iter().chain((extent.len > 0).then_some(*extent)) {
            bytes += extent.len;
            add(extent);
        }
        at = extent.offset + extent.len;
    }
    Ok((bytes == allocated).then_some(extents))
}

fn reopened(file: impl AsFd) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

fn data_extents_in(file: impl AsFd, range: Range<u64>) -> Result<Vec<Extent>, RegionError> {
    let file = file.as_fd();
    let mut extents = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // hugetlbfs knows no holes: all of it has to be taken for data.
            Err(Errno::INVAL) if extents.is_empty() => {
                return Ok(vec![Extent { offset: range.start, len: range.end - range.start }]);
            }
            Err(errno) => return Err(RegionError::io(format!("SEEK_DATA at {at}"))(errno)),
        };
        if start >= range.end {
            break;
        }
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))
            .map_err(RegionError::io(format!("SEEK_HOLE at {start}")))?
            .min(range.end);
        if end <= start {
            break;
        }
        extents.push(Extent { offset: start, len: end - start });
        at = end;
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageSize;
    use crate::region::RamFile;
    use proptest::prelude::*;

    #[test]
    fn several_threads_find_what_one_finds() {
        let len = 4 * SHARE as usize;
        let file = RamFile::memfd("occupancy-test", len, PageSize::Small).unwrap();
        let mapping = file.map().unwrap();
        let mut at = 0;
        let mut step = 1;
        while at < len {
            mapping.write(at, &[1]);
            // Runs of one and two pages at odd distances, some of them across the threads' borders.
            step = step * 7 % 61 + 1;
            at += step << 12 | usize::from(step % 3 == 0) << 12;
        }
        mapping.zero(SHARE as usize - 4096, 8192);
        let whole = data_extents_in(&file, 0..len as u64).unwrap();
        assert_eq!(data_extents(&file, len as u64).unwrap(), whole);
        assert!(whole.len() > 100);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_found_since_an_earlier_look_lacks_nothing_that_a_whole_look_finds_and_more_only_where_zeros_are(
            early in prop::collection::vec(0..64_usize, 0..40),
            late in prop::collection::vec((0..64_usize, 0..4_u8), 0..40),
        ) {
            let file = RamFile::memfd("grown", 64 << 12, PageSize::Small).unwrap();
            let mapping = file.map().unwrap();
            early.iter().for_each(|page| mapping.write(page << 12, &[1]));
            let before = file.occupancy().unwrap();
            for (page, what) in late {
                let extent = Extent { offset: (page as u64) << 12, len: 4096 };
                match what {
                    0 => file.punch(extent).unwrap(),
                    1 => file.reserve(extent).unwrap(),
                    _ => mapping.write(page << 12, &[2]),
                }
            }
            let pages = |extents: Vec<Extent>| {
                prop_assert!(extents.windows(2).all(|pair| pair[0].offset + pair[0].len < pair[1].offset));
                let pages = extents.iter().flat_map(|extent| extent.offset >> 12..(extent.offset + extent.len) >> 12);
                Ok(pages.collect::<Vec<u64>>())
            };
            let since = pages(file.occupancy_since(&before).unwrap())?;
            let whole = pages(file.occupancy().unwrap())?;
            prop_assert!(whole.iter().all(|page| since.contains(page)), "{:?} lacks some of {:?}", since, whole);
            for page in since.into_iter().filter(|page| !whole.contains(page)) {
                let mut bytes = [1; 4096];
                mapping.read((page as usize) << 12, &mut bytes);
                prop_assert_eq!(bytes, [0; 4096]);
            }
        }
    }

    #[test]
    fn what_only_grew_is_found_without_another_look_at_the_rest() {
        let file = RamFile::memfd("grown", 64 << 12, PageSize::Small).unwrap();
        let mapping = file.map().unwrap();
        (8..40).for_each(|page| mapping.write(page << 12, &[1]));
        let before = file.occupancy().unwrap();
        [0, 7, 40, 41, 63].iter().for_each(|page| mapping.write(page << 12, &[1]));
        let (len, page) = (64 << 12, 4096);
        let grown = grown_extents(&file, &before, len, 37 * page).unwrap().expect("nothing was given up");
        let extent = |first: u64, pages: u64| Extent { offset: first * page, len: pages * page };
        assert_eq!(grown, [extent(0, 1), extent(7, 35), extent(63, 1)]);
        // Given up where it was data: only the number of bytes tells.
        file.punch(extent(20, 1)).unwrap();
        assert_eq!(grown_extents(&file, &before, len, 36 * page).unwrap(), None);
    }
}
