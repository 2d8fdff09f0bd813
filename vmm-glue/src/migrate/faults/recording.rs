//! Writes down the faults of a guest that has moved, for `belay-bench replay`.
//!
//! The shards note what they meet in rings of their own ([`FaultLog`]); a thread of this file's own takes it out from time to time, puts faults and
//! answers together, and writes. Where it or the disk is too slow for that, or the file as large as it may be, the recording ends there, told of as a
//! state: a trace with a gap would be of another guest.

use super::file::Writer;
use super::{Fault, Region};
use crate::migrate::observation::Observer;
use crate::migrate::recorded::{Recorded, Written};
use belay_transport::RegionId;
use belay_transport::pull::{FaultLog, Noted, PageClass, RegionPlan};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Between two looks at what the shards have noted: at most a twentieth of what their rings hold.
const LOOK: Duration = Duration::from_millis(10);
/// Most faults that wait for an answer. Each is a thread's, or one that the engine has sent back.
const MOST_WAITING: usize = 1 << 16;

/// A recording, from when its file is there until it is dropped.
#[derive(Debug)]
pub struct FaultRecording {
    recorded: Recorded,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    /// The file is there; the guest has not come.
    Waiting(File),
    /// Hanging up `going` ends it.
    Going {
        going: Sender<()>,
        written: Written,
    },
    Over,
}

impl FaultRecording {
    /// Makes `path`, which must not be there. At most `most_bytes` are written, but for the last look's.
    pub fn create(path: &Path, most_bytes: u64, observer: Observer) -> io::Result<Self> {
        let (recorded, file) = Recorded::create(path, most_bytes, observer)?;
        Ok(Self { recorded, state: Mutex::new(State::Waiting(file)) })
    }

    /// An engine is about to start over such regions: the log it is to have. None for a second one, whose clock would be another: the recording
    /// is over then.
    pub fn begins(&self, shards: usize, regions: &[RegionPlan]) -> Option<Arc<FaultLog>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *state, State::Over);
        let begun = match before {
            State::Waiting(file) => self.going(file, shards, regions),
            State::Going { going, written } => {
                end(going, &written);
                Err(io::Error::other("the guest is pulled anew, over another session"))
            }
            State::Over => return None,
        };
        match begun {
            Ok((going, log)) => {
                *state = going;
                Some(log)
            }
            Err(error) => {
                self.recorded.over(&error);
                None
            }
        }
    }

    fn going(&self, file: File, shards: usize, regions: &[RegionPlan]) -> io::Result<(State, Arc<FaultLog>)> {
        let told = u16::try_from(shards).map_err(io::Error::other)?;
        let regions: Vec<Region> = regions.iter().map(region).collect();
        let writer = Writer::new(BufWriter::new(file), told, &regions)?;
        let log = Arc::new(FaultLog::new(shards));
        let (going, until) = bounded(0);
        let noted = Arc::clone(&log);
        let write = move |recorded: &Recorded| write_all(Writing::new(writer), &noted, &until, recorded);
        let written = self.recorded.write("belay-faults", write)?;
        Ok((State::Going { going, written }, log))
    }
}

impl Drop for FaultRecording {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let State::Going { going, written } = std::mem::replace(state, State::Over) {
            end(going, &written);
        }
    }
}

/// Hangs up, and waits for what is still to be written.
fn end(going: Sender<()>, written: &Written) {
    drop(going);
    written.wait();
}

fn region(plan: &RegionPlan) -> Region {
    let (mut zero, mut at) = (Vec::<(u64, u64)>::new(), 0);
    for run in &plan.classes {
        if run.class == PageClass::Zero && run.frames > 0 {
            zero.push((at, run.frames));
        }
        at += run.frames;
    }
    Region { id: plan.id, page_size: plan.page_size, frames: plan.bytes >> plan.page_size.shift(), zero }
}

fn write_all(
    mut writing: Writing<BufWriter<File>>,
    log: &FaultLog,
    until: &Receiver<()>,
    recorded: &Recorded,
) -> io::Result<()> {
    loop {
        let last = !matches!(until.recv_timeout(LOOK), Err(RecvTimeoutError::Timeout));
        let taken = writing.take(log);
        if last || taken.is_err() {
            return taken.and(writing.rest());
        }
        if let Err(full) = recorded.room_beyond(writing.writer.bytes()) {
            return writing.writer.flush().and(Err(full));
        }
    }
}

/// Faults without an answer, and where they go once they have one.
struct Writing<W: Write> {
    writer: Writer<W>,
    waiting: BTreeMap<(RegionId, u64), Vec<Fault>>,
    count: usize,
}

impl<W: Write> Writing<W> {
    fn new(writer: Writer<W>) -> Self {
        Self { writer, waiting: BTreeMap::new(), count: 0 }
    }

    /// Takes what has been noted. What was before a gap is written all the same.
    fn take(&mut self, log: &FaultLog) -> io::Result<()> {
        let mut outcome = Ok(());
        let taken = log.take(&mut |shard, noted| {
            if outcome.is_ok() {
                outcome = self.one(shard as u16, noted);
            }
        });
        let taken = taken.map_err(io::Error::other);
        outcome.and(taken)
    }

    fn one(&mut self, shard: u16, noted: Noted) -> io::Result<()> {
        match noted {
            Noted::Fault { at_ns, region, frame, write, thread } => {
                if self.count == MOST_WAITING {
                    return Err(io::Error::other(format!("{MOST_WAITING} faults wait for an answer")));
                }
                let fault = Fault { ns: at_ns, waited_ns: None, shard, thread, region, frame, write };
                self.waiting.entry((region, frame.0)).or_default().push(fault);
                self.count += 1;
            }
            Noted::Shown { at_ns, region, first, frames } => {
                let end = first.0.saturating_add(frames);
                while let Some((&at, _)) = self.waiting.range((region, first.0)..(region, end)).next() {
                    for mut fault in self.waiting.remove(&at).unwrap_or_default() {
                        self.count -= 1;
                        fault.waited_ns = Some(at_ns.saturating_sub(fault.ns));
                        self.writer.write(&fault)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Faults that nothing answered.
    fn rest(mut self) -> io::Result<()> {
        for fault in std::mem::take(&mut self.waiting).into_values().flatten() {
            self.writer.write(&fault)?;
        }
        self.writer.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;
    use belay_checkpoint::json_lines::LinesError;
    use belay_transport::{FrameIndex, PageSize};
    use std::path::PathBuf;

    fn fault(ns: u64, frame: u64) -> Noted {
        Noted::Fault { at_ns: ns, region: RegionId(1), frame: FrameIndex(frame), write: false, thread: 9 }
    }

    fn shown(ns: u64, first: u64, frames: u64) -> Noted {
        Noted::Shown { at_ns: ns, region: RegionId(1), first: FrameIndex(first), frames }
    }

    /// What is in the file after these were noted.
    fn written(noted: &[Noted]) -> Result<super::super::FaultTrace, LinesError> {
        let regions = [Region { id: RegionId(1), page_size: PageSize::Small, frames: 64, zero: Vec::new() }];
        let mut text = Vec::new();
        let mut writing = Writing::new(Writer::new(&mut text, 1, &regions).unwrap());
        noted.iter().for_each(|noted| writing.one(0, *noted).unwrap());
        writing.rest().unwrap();
        file::read(&*text)
    }

    #[test]
    fn a_fault_waited_until_the_first_answer_that_covers_it_and_the_unanswered_stand_without() {
        let noted = [fault(10, 5), fault(12, 5), fault(13, 6), shown(20, 6, 1), shown(30, 0, 64), fault(31, 5)];
        let faults = written(&noted).unwrap().faults;
        let waits: Vec<_> = faults.iter().map(|fault| (fault.ns, fault.frame.0, fault.waited_ns)).collect();
        assert_eq!(waits, [(10, 5, Some(20)), (12, 5, Some(18)), (13, 6, Some(7)), (31, 5, None)]);
    }

    #[test]
    fn an_answer_that_nobody_waited_for_is_nothing() {
        let faults = written(&[shown(1, 0, 64), fault(2, 3), shown(4, 3, 1)]).unwrap().faults;
        assert_eq!((faults.len(), faults[0].waited_ns), (1, Some(2)));
    }

    fn place(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("belay-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_recording_never_overwrites_and_one_that_no_guest_came_for_is_empty() {
        let path = place("faults-recording");
        let recording = FaultRecording::create(&path, 1 << 20, Observer::silent()).unwrap();
        assert!(FaultRecording::create(&path, 1, Observer::silent()).is_err());
        drop(recording);
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_recording_ends_with_the_first_engine_and_is_whole_up_to_there() {
        let path = place("faults-second-engine");
        let recording = FaultRecording::create(&path, 1 << 20, Observer::silent()).unwrap();
        let log = recording.begins(2, &[]).expect("the first engine's");
        assert_eq!(log.shards(), 2);
        assert!(recording.begins(2, &[]).is_none() && recording.begins(2, &[]).is_none());
        drop(recording);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text, "{\"belay-faults\":1,\"shards\":2,\"regions\":[]}\n");
    }

    #[test]
    fn a_recording_ends_by_itself_once_it_is_as_large_as_it_may_be_and_is_whole_up_to_there() {
        let path = place("faults-bound");
        let recording = FaultRecording::create(&path, 10, Observer::silent()).unwrap();
        let _log = recording.begins(1, &[]).expect("the first engine's");
        let state = recording.state.lock().unwrap();
        let State::Going { written, .. } = &*state else { panic!("it has begun") };
        assert!(written.wait());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text, "{\"belay-faults\":1,\"shards\":1,\"regions\":[]}\n");
    }
}
