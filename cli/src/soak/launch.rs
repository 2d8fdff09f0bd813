//! The command lines of a run's processes.

use super::case::{Case, Phase, Script};
use super::pace::{LEASE, Pace};
use super::points::At;
use super::stage;
use super::takeover::Setting;
use crate::options::FabricChoice;
use belay_transport::session::{SessionError, keygen};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long the guest runs before its switch, and once its fate is settled.
const RUN_BEFORE: Duration = Duration::from_millis(20);
const RUN_ON: Duration = Duration::from_millis(60);
/// How long a tether is kept whose end nobody orders: the strike comes first.
const KEPT: Duration = Duration::from_millis(300);
/// A lease that no run waits for.
const LONG_LEASE: Duration = Duration::from_secs(10);

/// Whom certificates are of.
const SOURCE: &str = "source";
const DESTINATION: &str = "destination";

/// A file of the run.
pub fn path(name: &str) -> PathBuf {
    Path::new(stage::PLACE).join(name)
}

/// Where guest memory has names that outlive the source.
pub fn memory() -> PathBuf {
    path("memory")
}

pub fn unix(name: &str) -> String {
    format!("unix:{}", path(name).display())
}

pub fn belay(arguments: &[&str]) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).env("TMPDIR", stage::PLACE);
    Ok(command)
}

/// What every process of a role is started with.
pub struct Launch<'a> {
    pub case: &'a Case,
    pub pace: Pace,
    pub script: &'a Script,
    /// Where the observer is, seen from there.
    pub output: &'a str,
}

impl Launch<'_> {
    /// A page server, at first or in the place of one that has died.
    fn serve(&self, listen: &str) -> std::io::Result<Command> {
        let mut command = self.page_server(listen)?;
        command.args(["--output-to", self.output]);
        Ok(command)
    }

    fn page_server(&self, listen: &str) -> std::io::Result<Command> {
        let state = path("destination").display().to_string();
        let mut command = belay(&["receive", "--json", "--listen", listen, "--state-dir", &state])?;
        command.args(["--fabric", &self.case.fabric.to_string(), "--drive", "kvm", "--check"]);
        command.args(["--run-on", &self.pace.ms(RUN_ON)]);
        self.certify(&mut command, DESTINATION, SOURCE);
        Ok(command)
    }

    /// Makes what both hosts prove themselves with, where they are to.
    pub fn make_certificates(&self) -> Result<(), SessionError> {
        let of: &[&str] = if self.script.tls { &[SOURCE, DESTINATION] } else { &[] };
        of.iter().try_for_each(|name| keygen(Path::new(stage::PLACE), name).map(drop))
    }

    /// What a process proves itself with, and what its peer has to. A source that takes over has it from the journal.
    fn certify(&self, command: &mut Command, own: &str, peer: &str) {
        if self.script.tls {
            command.arg("--cert").arg(path(&format!("{own}.crt"))).arg("--key").arg(path(&format!("{own}.key")));
            command.arg("--peer-cert").arg(path(&format!("{peer}.crt")));
        }
    }

    /// The destination of the run.
    pub fn receive(&self) -> std::io::Result<Command> {
        let listen = match self.case.fabric {
            FabricChoice::Local => unix("receive.sock"),
            _ => "127.0.0.1:0".to_owned(),
        };
        let mut command = self.serve(&listen)?;
        command.args(["--vmm", if self.script.apart { "apart" } else { "in-process" }]);
        if let Some(percent) = self.script.hold_at {
            command.args(["--hold-pull-at", &percent.to_string()]);
        }
        Ok(self.finish(command, self.stop_at(At::Destination)))
    }

    /// One that goes on with the guest of a page server that has died, and with all of its memory.
    pub fn receive_again(&self, listen: &str) -> std::io::Result<Command> {
        let mut command = self.serve(listen)?;
        command.arg("--takeover");
        Ok(self.finish(command, None))
    }

    /// The source of the run.
    pub fn send(&self, to: &str) -> std::io::Result<Command> {
        let state = path("source").display().to_string();
        let mut command = belay(&["send", "--json", "--to", to, "--output-to", self.output, "--state-dir", &state])?;
        command.args(["--fabric", &self.case.fabric.to_string(), "--drive", "kvm", "--check"]);
        command.args(["--memory", "64M", "--working-set", "24M", "--ring", "16M"]);
        command.args(["--run-before", &self.pace.ms(RUN_BEFORE), "--run-on", &self.pace.ms(RUN_ON)]);
        command.args(["--seed", &self.script.guest_seed.to_string(), "--tracker", self.script.tracker]);
        let takeover = self.script.takeover.as_ref();
        let by_lease = takeover.is_some_and(|takeover| takeover.setting == Setting::Lease);
        match by_lease {
            true => command.args(self.pace.words(LONG_LEASE)).args(["--output", "lease"]),
            false => command.args(self.pace.words(LEASE)),
        };
        command.arg("--release").arg(match self.script.keep_tether {
            true if takeover.is_some_and(|takeover| takeover.is_released_in_time(self.case.strike)) => {
                self.pace.ms(KEPT)
            }
            true => "never".to_owned(),
            false => "when-landed".to_owned(),
        });
        self.certify(&mut command, SOURCE, DESTINATION);
        if takeover.is_some_and(|takeover| takeover.keeps_memory(self.case.strike)) {
            std::fs::create_dir_all(memory())?;
            command.arg("--memory-dir").arg(memory());
        }
        Ok(self.finish(command, self.stop_at(At::Source)))
    }

    /// One that goes on with the migration of a source that has died.
    pub fn send_again(&self, stop_at: Option<String>) -> std::io::Result<Command> {
        let state = path("source").display().to_string();
        let mut command = belay(&["send", "--json", "--takeover", "--state-dir", &state, "--check"])?;
        command.args(["--takeover-grace", &self.pace.ms(self.grace()), "--run-on", &self.pace.ms(RUN_ON)]);
        Ok(self.finish(command, stop_at))
    }

    /// The destination of a second migration, that nobody strikes: everything lies where it did.
    pub fn receive_second(&self) -> std::io::Result<Command> {
        let listen = match self.case.fabric {
            FabricChoice::Local => unix("receive.sock"),
            _ => "127.0.0.1:0".to_owned(),
        };
        let mut command = self.page_server(&listen)?;
        command.args(["--vmm", if self.script.apart { "apart" } else { "in-process" }]);
        Ok(self.finish(command, None))
    }

    /// The source of that one. Its guest is another, so that none of the first one's memory could be taken for its own.
    pub fn send_second(&self, to: &str) -> std::io::Result<Command> {
        let state = path("source").display().to_string();
        let mut command = belay(&["send", "--json", "--to", to, "--state-dir", &state])?;
        command.args(["--fabric", &self.case.fabric.to_string(), "--drive", "kvm", "--check"]);
        command.args(["--memory", "16M", "--working-set", "4M", "--ring", "4M", "--run-before", "0ms"]);
        command.args(["--run-on", &self.pace.ms(RUN_ON), "--seed", &(self.script.guest_seed + 1).to_string()]);
        command.args(self.pace.words(LONG_LEASE)).args(["--release", "when-landed"]);
        self.certify(&mut command, SOURCE, DESTINATION);
        if self.script.takeover.as_ref().is_some_and(|takeover| takeover.keeps_memory(self.case.strike)) {
            command.arg("--memory-dir").arg(memory());
        }
        Ok(self.finish(command, None))
    }

    /// How long the destination is waited for: not for long where it cannot come or may have gone, for certain where it lives. It hears nobody
    /// while a vCPU of its that waits for a page is being stopped.
    fn grace(&self) -> Duration {
        let point = self.script.moment.stop_at().map(|(_, point)| point).unwrap_or_default();
        let at = |names: &[&str]| names.iter().any(|name| point.starts_with(name));
        match self.case.phase {
            Phase::Prepare | Phase::Catch => Duration::from_millis(500),
            Phase::Switch if !at(&["loaded-told"]) => Duration::from_millis(500),
            Phase::Release if at(&["release-recorded", "release-told", "release-heard"]) => Duration::from_secs(2),
            _ => Duration::from_secs(10),
        }
    }

    fn stop_at(&self, at: At) -> Option<String> {
        self.script.moment.stop_at().filter(|(who, _)| *who == at).map(|(_, point)| point)
    }

    fn finish(&self, mut command: Command, stop_at: Option<String>) -> Command {
        if self.case.fabric == FabricChoice::Verbs {
            command.arg("--trusted-fabric");
        }
        command.arg("--run-dir").arg(path("run"));
        if let Some(point) = stop_at {
            command.args(["--stop-at", &point]);
        }
        command
    }
}
