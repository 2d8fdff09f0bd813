//! What a tethered guest writes and sends, recorded for `belay-bench policy --trace`: an epoch is a stretch of its time.
//!
//! The tether's thread hands over what an epoch held and goes on; a thread of this file's own writes. Where the disk is too slow for that, or
//! the file as large as it may be, the recording ends there, told of as a state: a trace with a gap would be of another guest.

use super::observation::Observer;
use super::recorded::{Recorded, Written};
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::RamBlock;
use belay_checkpoint::policy::trace::Stretch;
use belay_checkpoint::policy::trace::file::Writer;
use belay_transport::{PAGE_SIZE, RegionId};
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Epochs that may wait for the disk.
const WAITING: usize = 256;

/// A recording, from when its file is there until it is dropped.
#[derive(Debug)]
pub struct Recording {
    recorded: Recorded,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    /// The file is there; the guest has not come.
    Waiting(File),
    /// Hanging up ends it.
    Going {
        to: Sender<Stretch>,
        written: Written,
        regions: Vec<(RegionId, u32)>,
    },
    Over {
        written: Option<Written>,
    },
}

impl Recording {
    /// Makes `path`, which must not be there. At most `most_bytes` are written.
    pub fn create(path: &Path, most_bytes: u64, observer: Observer) -> io::Result<Self> {
        let (recorded, file) = Recorded::create(path, most_bytes, observer)?;
        Ok(Self { recorded, state: Mutex::new(State::Waiting(file)) })
    }

    /// The guest's memory is known. A tether that begins again goes on with the same recording.
    pub fn begins(&self, memory: &[RamBlock]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State::Waiting(file) = &*state else { return };
        *state = match file.try_clone().and_then(|file| self.going(file, memory)) {
            Ok(going) => going,
            Err(error) => {
                self.recorded.over(&error);
                State::Over { written: None }
            }
        };
    }

    fn going(&self, file: File, memory: &[RamBlock]) -> io::Result<State> {
        let (mut regions, mut pages) = (Vec::new(), 0_u32);
        for block in memory {
            regions.push((block.id, pages));
            let more = u32::try_from(block.alias.len() / PAGE_SIZE).ok();
            pages = more
                .and_then(|more| pages.checked_add(more))
                .ok_or_else(|| io::Error::other("more than 16 TiB of guest RAM"))?;
        }
        let writer = Writer::new(BufWriter::new(file), pages)?;
        let (to, stretches) = bounded(WAITING);
        let written = self.recorded.write("belay-record", move |recorded| write_all(writer, &stretches, recorded))?;
        Ok(State::Going { to, written, regions })
    }

    /// An epoch was closed.
    pub fn closed(&self, ran: Duration, packets: usize, dirty: &DirtySet) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State::Going { to, regions, .. } = &*state else { return };
        let mut stretch = Stretch { lasts: ran, outputs: u32::try_from(packets).unwrap_or(u32::MAX), runs: Vec::new() };
        for (region, page) in dirty.iter() {
            let Some((_, first)) = regions.iter().find(|(id, _)| *id == region) else { continue };
            // As many fit, or nothing would be recorded.
            stretch.wrote(first + page.0 as u32);
        }
        match to.try_send(stretch) {
            Ok(()) => return,
            // The other side has said why.
            Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => {
                self.recorded.over(&io::Error::other(format!("{WAITING} epochs wait for the disk")));
            }
        }
        state.end();
    }
}

impl State {
    /// Hands over nothing more.
    fn end(&mut self) {
        let before = std::mem::replace(self, Self::Over { written: None });
        *self = match before {
            Self::Going { written, .. } => Self::Over { written: Some(written) },
            other => other,
        };
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.end();
        if let State::Over { written: Some(written) } = state {
            written.wait();
        }
    }
}

fn write_all(
    mut writer: Writer<BufWriter<File>>,
    stretches: &Receiver<Stretch>,
    recorded: &Recorded,
) -> io::Result<()> {
    for stretch in stretches {
        writer.write(stretch)?;
        if let Err(full) = recorded.room_beyond(writer.bytes()) {
            return writer.flush().and(Err(full));
        }
    }
    writer.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use belay_checkpoint::policy::trace::file;
    use belay_transport::PageIndex;
    use belay_transport::PageSize;
    use belay_transport::region::RamFile;
    use std::io::BufReader;
    use std::path::PathBuf;
    use std::sync::Arc;

    fn block(id: u16, pages: usize) -> RamBlock {
        let file = Arc::new(RamFile::memfd("recording-test", pages * PAGE_SIZE, PageSize::Small).unwrap());
        let alias = Arc::new(file.map().unwrap());
        RamBlock { id: RegionId(id), page_size: PageSize::Small, file, alias, vmm_address: 0 }
    }

    fn dirty(pages: &[(u16, u64)]) -> DirtySet {
        let mut set = DirtySet::new([(RegionId(0), 16), (RegionId(1), 16)]);
        for (region, page) in pages {
            set.insert(RegionId(*region), PageIndex(*page));
        }
        set
    }

    fn place(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("belay-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_recording_holds_every_epoch_until_it_ends_with_all_regions_counted_through() {
        let path = place("recording");
        let recording = Recording::create(&path, 1 << 20, Observer::silent()).unwrap();
        assert!(Recording::create(&path, 1, Observer::silent()).is_err(), "one that is there is not overwritten");
        recording.closed(Duration::from_millis(1), 1, &dirty(&[(0, 1)]));
        let memory = [block(0, 16), block(1, 16)];
        recording.begins(&memory);
        for epoch in 0..100 {
            recording.closed(Duration::from_millis(epoch), 2, &dirty(&[(0, 3), (0, 4), (1, 0)]));
        }
        recording.begins(&memory);
        recording.closed(Duration::from_millis(7), 0, &dirty(&[]));
        drop(recording);
        let trace = file::read(BufReader::new(File::open(&path).unwrap())).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!((trace.pages, trace.stretches.len()), (32, 101));
        let tenth = Stretch { lasts: Duration::from_millis(9), outputs: 2, runs: vec![(3, 2), (16, 1)] };
        assert_eq!(trace.stretches[9], tenth);
        assert_eq!(trace.stretches[100].pages().count(), 0);
    }

    #[test]
    fn a_recording_ends_where_it_is_as_large_as_it_may_be_and_is_whole_up_to_there() {
        let path = place("recording-bound");
        let recording = Recording::create(&path, 200, Observer::silent()).unwrap();
        recording.begins(&[block(0, 16), block(1, 16)]);
        let mut told = 0;
        while matches!(*recording.state.lock().unwrap(), State::Going { .. }) {
            recording.closed(Duration::from_millis(1), 0, &dirty(&[(0, 3), (1, 9)]));
            told += 1;
            assert!(told < 1_000_000);
        }
        drop(recording);
        let trace = file::read(BufReader::new(File::open(&path).unwrap())).unwrap();
        let bytes = std::fs::metadata(&path).unwrap().len();
        std::fs::remove_file(&path).unwrap();
        assert!(
            (200..300).contains(&bytes) && (2..8).contains(&trace.stretches.len()),
            "{bytes} {}",
            trace.stretches.len()
        );
    }
}
