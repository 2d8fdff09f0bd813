//! The leash's own process ([`super::leash`] has the picture): a pidfd of the QEMU as standard input, its end of the socket as standard output.

use super::leash::{Answer, Ask, Holding, What};
use crate::guard::{LifePage, SignOfLife, proof_of_death};
use crate::kvm::apart::door::{self, Door, Holder};
use crate::kvm::apart::{Kept, frame};
use belay_transport::Deadline;
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// Kind of the doors to QEMUs that were left.
pub(super) const QEMU: &str = "qemu";
/// How often a QEMU that is kept is looked at, whether it still is there.
const LOOK: Duration = Duration::from_millis(200);
/// Longest that anything may take to be written to a page server.
const WRITE_BOUND: Duration = Duration::from_secs(5);
/// How long a page server that has closed its socket may take to be gone: its address space is torn down between the two.
const GONE_BOUND: Duration = Duration::from_secs(60);
/// How long a QEMU that was killed is waited for, where that is to be proven. The address space of a guest of a TiB takes minutes.
const PROOF_BOUND: Duration = Duration::from_secs(600);
/// Most descriptors that are kept: blocks of RAM, shards, and a handful.
const MOST_KEPT: usize = 512;

/// The body of the hidden command that runs as a leash.
pub fn leash_main() -> io::Result<()> {
    let stream = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    hold(io::stdin().as_fd(), stream, GONE_BOUND)
}

/// How a page server's socket ended.
#[derive(Debug, PartialEq, Eq)]
enum Last {
    LetGo,
    End,
    /// It died.
    Gone,
}

/// What was laid down.
#[derive(Default)]
struct Estate {
    holding: Option<Holding>,
    kept: Vec<(What, OwnedFd)>,
    /// In QEMU's stead. An earlier page server's are held on to: that one's guard would take a slot given back for an end.
    signs: Vec<SignOfLife>,
    /// Open as soon as somebody could go on with what is here.
    door: Option<Door>,
}

/// `gone`: how long a page server that has closed its socket is given to end.
fn hold(pidfd: BorrowedFd<'_>, stream: UnixStream, gone: Duration) -> io::Result<()> {
    let mut estate = Estate::default();
    let last = serve(pidfd, stream, gone, &mut estate);
    if matches!(last, Ok(Last::LetGo)) {
        estate.signs.into_iter().for_each(SignOfLife::stand_down);
        return Ok(());
    }
    // Also where something went wrong here: a QEMU that nobody holds must not run on. Whoever finds it gone finds no door either.
    estate.door = None;
    signal(pidfd, Signal::KILL)?;
    if !estate.signs.is_empty() {
        // Whoever watches this process takes its end for QEMU's.
        proof_of_death(pidfd, Deadline::after(PROOF_BOUND))?;
    }
    last.map(drop)
}

/// Answers one page server after the other, until one lets go or ends it, or none comes.
fn serve(pidfd: BorrowedFd<'_>, mut stream: UnixStream, gone: Duration, estate: &mut Estate) -> io::Result<Last> {
    loop {
        let server = Holder::of(&stream)?;
        match estate.attend(&stream) {
            Last::Gone => {}
            last => return Ok(last),
        }
        let (Some(door), Some(holding), true) = (&estate.door, &estate.holding, estate.is_whole()) else {
            return Ok(Last::Gone);
        };
        // A child of the page server that stands when that ends is sent SIGHUP (setpgid(2)), of which QEMU would end. What it lets out goes nowhere
        // meanwhile.
        server.ends_by(Deadline::after(gone));
        signal(pidfd, Signal::STOP)?;
        door.has_left();
        let until = Deadline::after(holding.linger);
        stream = loop {
            if let Some(caller) = door.next(Deadline::after(LOOK.min(until.left()))) {
                // One that has gone again leaves its seat as it found it.
                match caller.welcome() {
                    Ok(stream) => break stream,
                    Err(_) => door.has_left(),
                }
            }
            if until.expired() || proof_of_death(pidfd, Deadline::after(Duration::ZERO))? {
                return Ok(Last::Gone);
            }
        };
    }
}

/// One that has ended needs none.
fn signal(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    match pidfd_send_signal(pidfd, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl Estate {
    /// Whether another page server could go on with it.
    fn is_whole(&self) -> bool {
        let laid_down = |what: &Kept| self.find(What::Kept(*what)).is_some();
        self.holding.is_some() && [Kept::Will, Kept::PageStates].iter().all(laid_down)
    }

    fn find(&self, what: What) -> Option<&OwnedFd> {
        self.kept.iter().find(|(kept, _)| *kept == what).map(|(_, fd)| fd)
    }

    /// Answers one page server until it ends.
    fn attend(&mut self, stream: &UnixStream) -> Last {
        if stream.set_write_timeout(Some(WRITE_BOUND)).is_err() || stream.set_read_timeout(None).is_err() {
            return Last::Gone;
        }
        loop {
            // What is no frame comes from nobody who can be answered.
            let Ok(Some((ask, given))) = frame::receive(stream) else { return Last::Gone };
            let last = match &ask {
                Ask::LetGo => Some(Last::LetGo),
                Ask::End => Some(Last::End),
                _ => None,
            };
            let (answer, fd) = match self.answer(ask, given, stream) {
                Ok(answered) => answered,
                Err(why) => (Answer::Refused(why), None),
            };
            let sent = frame::send(stream, &answer, fd.as_ref().map(|fd| fd.as_fd()));
            match last {
                Some(last) => return last,
                None if sent.is_err() => return Last::Gone,
                None => {}
            }
        }
    }

    fn answer(
        &mut self,
        ask: Ask,
        given: Option<OwnedFd>,
        stream: &UnixStream,
    ) -> Result<(Answer, Option<OwnedFd>), String> {
        match ask {
            Ask::Hold(holding) => self.holding = Some(holding),
            Ask::Keep(what) => {
                let given = given.ok_or_else(|| format!("{what:?} came without a descriptor"))?;
                self.kept.retain(|(kept, _)| *kept != what);
                if self.kept.len() >= MOST_KEPT {
                    return Err(format!("{MOST_KEPT} descriptors are kept already"));
                }
                self.kept.push((what, given));
                if self.door.is_none() && self.is_whole() {
                    self.open_door(stream)?;
                }
            }
            Ask::Describe => {
                let holding = self.holding.clone().ok_or("nothing is kept")?;
                let kept = self.kept.iter().map(|(what, _)| *what).collect();
                return Ok((Answer::Described { holding, kept }, None));
            }
            Ask::Give(what) => {
                let fd = self.find(what).ok_or_else(|| format!("{what:?} was not laid down"))?;
                return Ok((Answer::Done, Some(fd.try_clone().map_err(|error| error.to_string())?)));
            }
            Ask::GiveSign(slot) => {
                let page = given.ok_or("a slot came without its page")?;
                let page = LifePage::from_fd(page).map_err(|error| error.to_string())?;
                let slot = usize::try_from(slot).map_err(|error| error.to_string())?;
                self.signs.push(SignOfLife::hold(Arc::new(page), slot).map_err(|error| error.to_string())?);
            }
            Ask::LetGo | Ask::End => {}
        }
        Ok((Answer::Done, None))
    }

    fn open_door(&mut self, stream: &UnixStream) -> Result<(), String> {
        let Some(holding) = &self.holding else { return Ok(()) };
        let name = door::name(QEMU, holding.pid);
        let opened = Holder::of(stream).and_then(|holder| Door::open(&holding.doors, &name, holder));
        self.door = Some(opened.map_err(|error| format!("a door in {}: {error}", holding.doors.display()))?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::apart::{take_keepers_seat, waiting_of};
    use crate::qemu::leash::Line;
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command};
    use std::thread::JoinHandle;

    fn sleeper() -> (Child, OwnedFd) {
        let child = Command::new("sleep").arg("600").spawn().expect("a process");
        let pid = Pid::from_raw(child.id() as i32).expect("a pid");
        (child, pidfd_open(pid, PidfdFlags::empty()).expect("a pidfd"))
    }

    fn held(pidfd: &OwnedFd) -> (UnixStream, JoinHandle<io::Result<()>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let pidfd = pidfd.try_clone().unwrap();
        (ours, std::thread::spawn(move || hold(pidfd.as_fd(), theirs, Duration::from_millis(50))))
    }

    fn killed(mut child: Child) {
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn what_is_on_a_leash_ends_with_its_holder_and_lives_on_when_it_is_let_go() {
        let (mut child, pidfd) = sleeper();
        let (ours, leash) = held(&pidfd);
        Line::over(ours).unwrap().ask(&Ask::LetGo, None).unwrap();
        leash.join().unwrap().unwrap();
        assert!(child.try_wait().unwrap().is_none(), "it was let go");
        let (ours, leash) = held(&pidfd);
        drop(ours);
        leash.join().unwrap().unwrap();
        killed(child);
        // One that has ended is no error.
        let (ours, leash) = held(&pidfd);
        drop(ours);
        leash.join().unwrap().unwrap();
    }

    /// Lays down what the next page server needs.
    fn lay_down(line: &Line, pid: u32, doors: &std::path::Path, linger: Duration) {
        let holding =
            Holding { pid, monitor: "m".into(), made: None, addresses: vec![4096], doors: doors.to_owned(), linger };
        line.ask(&Ask::Hold(holding), None).unwrap();
        for what in [What::Kept(Kept::PageStates), What::Kept(Kept::Will), What::Ram(3)] {
            line.ask(&Ask::Keep(what), Some(io::stderr().as_fd())).unwrap();
        }
    }

    #[test]
    fn a_will_without_all_else_that_is_needed_keeps_nobody() {
        let (child, pidfd) = sleeper();
        let (ours, leash) = held(&pidfd);
        let line = Line::over(ours).unwrap();
        line.ask(&Ask::Keep(What::Kept(Kept::Will)), Some(io::stderr().as_fd())).unwrap();
        line.ask(&Ask::Keep(What::Kept(Kept::PageStates)), Some(io::stderr().as_fd())).unwrap();
        assert!(line.ask(&Ask::Give(What::Process), None).unwrap_err().to_string().contains("not laid down"));
        assert!(line.ask(&Ask::Keep(What::Process), None).unwrap_err().to_string().contains("without a descriptor"));
        drop(line);
        leash.join().unwrap().unwrap();
        killed(child);
    }

    #[test]
    fn one_that_is_kept_stands_still_until_its_time_is_over() {
        let (child, pidfd) = sleeper();
        let doors = tempfile::tempdir().unwrap();
        let (ours, leash) = held(&pidfd);
        let line = Line::over(ours).unwrap();
        lay_down(&line, child.id(), doors.path(), Duration::from_millis(300));
        let there = waiting_of(doors.path(), QEMU).unwrap();
        assert_eq!(there.iter().map(|one| one.pid).collect::<Vec<_>>(), [child.id() as i32]);
        // Its page server lives: this process.
        let error = take_keepers_seat(&there[0].path, Deadline::after(Duration::from_secs(5))).unwrap_err();
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(line);
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while !stat().contains(") T ") && !leash.is_finished() {
            assert!(std::time::Instant::now() < end, "{}", stat());
            std::thread::yield_now();
        }
        // Nobody can come: the seat is this process's, which has not ended.
        leash.join().unwrap().unwrap();
        killed(child);
        assert!(waiting_of(doors.path(), QEMU).unwrap().is_empty(), "the door is gone");
    }
}
