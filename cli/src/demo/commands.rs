//! The command lines of the demo's processes: what its options mean to source, destination and observer.

use super::{Demo, DemoError, KillAt, io};
use crate::options::{Drive, FabricChoice, OutputChoice, VmmPlace};
use crate::quantity::{Bytes, Span};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// How often the demo takes a checkpoint, if nothing else is said.
const PERIOD: Span = Span(Duration::from_millis(10));

impl Demo {
    fn belay(&self) -> Result<Command, DemoError> {
        Ok(Command::new(std::env::current_exe().map_err(io("find belay's own program"))?))
    }

    fn listen_address(&self, name: &str) -> String {
        match self.fabric {
            FabricChoice::Local => format!("unix:{}", self.directory.path(name).display()),
            FabricChoice::Auto | FabricChoice::Tcp | FabricChoice::Verbs => "127.0.0.1:0".to_owned(),
        }
    }

    pub(super) fn observer_command(&self, packets: &Path) -> Result<Command, DemoError> {
        let mut command = self.belay()?;
        command
            .args(["observe", "--json", "--listen"])
            .arg(format!("unix:{}", self.directory.path("observer.sock").display()));
        command.arg("--log").arg(packets);
        Ok(command)
    }

    /// With --tls: makes both pairs of certificates. The two sides' file names differ only in who is self and who is peer.
    pub(super) fn credentials(&self) -> Result<bool, DemoError> {
        if self.args.tls {
            for name in ["source", "destination"] {
                belay_transport::session::keygen(&self.directory.0, name).map_err(DemoError::Keygen)?;
            }
        }
        Ok(self.args.tls)
    }

    fn add_credentials(&self, command: &mut Command, own: &str, peer: &str) {
        command.arg("--cert").arg(self.directory.path(&format!("{own}.crt")));
        command.arg("--key").arg(self.directory.path(&format!("{own}.key")));
        command.arg("--peer-cert").arg(self.directory.path(&format!("{peer}.crt")));
    }

    fn add_fabric(&self, command: &mut Command) {
        let fabric = &self.args.fabric;
        command.args(["--fabric", &self.fabric.to_string()]);
        if let Some(node) = fabric.numa_node {
            command.args(["--numa-node", &node.to_string()]);
        }
        if !matches!(self.fabric, FabricChoice::Auto | FabricChoice::Verbs) {
            return;
        }
        command.arg("--trusted-fabric");
        let numbers = [("--ib-port", fabric.ib_port), ("--gid-index", fabric.gid_index)];
        let numbers = numbers.into_iter().filter_map(|(name, n)| Some((name, n?.to_string())));
        for (name, value) in fabric.ib_dev.iter().map(|name| ("--ib-dev", name.clone())).chain(numbers) {
            command.args([name, &value]);
        }
    }

    pub(super) fn receive_command(&self, output_to: &str, tls: bool) -> Result<Command, DemoError> {
        let mut command = self.belay()?;
        command.args(["receive", "--json", "--listen", &self.listen_address("receive.sock"), "--output-to", output_to]);
        command.arg("--state-dir").arg(self.directory.path("destination"));
        self.add_fabric(&mut command);
        if let Some(place) = self.args.guest.vmm {
            command.args(["--vmm", &place.to_string()]);
        }
        if let Some(drive) = self.args.guest.drive {
            command.args(["--drive", &drive.to_string()]);
        }
        if let Some(staging) = self.args.receive.staging {
            command.args(["--staging", &staging.to_string()]);
        }
        match self.args.kill_at {
            // Hold the background pull where the kill is due, so that the moment can be met on a machine of any speed.
            KillAt::Percent(percent) => command.args(["--hold-pull-at", &percent.to_string()]),
            KillAt::Never => command.args(["--check", "--run-on", &self.args.run_on.to_string()]),
        };
        if tls {
            self.add_credentials(&mut command, "destination", "source");
        }
        Ok(command)
    }

    pub(super) fn send_command(&self, address: &str, output_to: &str, tls: bool) -> Result<Command, DemoError> {
        let mut command = self.belay()?;
        command.args(["send", "--json", "--to", address, "--output-to", output_to]);
        command.arg("--state-dir").arg(self.directory.path("source"));
        self.add_fabric(&mut command);
        let (guest, tether) = (&self.args.guest, &self.args.tether);
        let mut pass = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                command.arg(name).arg(value);
            }
        };
        pass("--memory", Some(Bytes(self.memory).to_string()));
        pass("--page-size", guest.page_size.map(|size| size.to_string()));
        pass("--guest", guest.guest.map(|choice| choice.to_string()));
        pass("--working-set", guest.working_set.map(|bytes| bytes.to_string()));
        pass("--dirty-rate", guest.dirty_rate.map(|rate| rate.to_string()));
        pass("--vcpus", guest.vcpus.map(|n| n.to_string()));
        pass("--seed", guest.seed.map(|seed| seed.to_string()));
        pass("--vmm", guest.vmm.map(|place: VmmPlace| place.to_string()));
        pass("--drive", guest.drive.map(|drive: Drive| drive.to_string()));
        pass("--policy", tether.policy.as_ref().map(ToString::to_string));
        // Of the guest's output alone it would not be known how many checkpoints commit before the pull is over.
        let period = tether.period.or(tether.policy.is_none().then_some(PERIOD));
        pass("--period", period.map(|period| period.to_string()));
        pass("--output", tether.output.map(|output: OutputChoice| output.to_string()));
        pass("--tracker", tether.tracker.map(|tracker| tracker.to_string()));
        pass("--lease", tether.lease.map(|lease| lease.to_string()));
        pass("--ring", tether.ring.map(|ring| ring.to_string()));
        pass("--overflow", tether.overflow.map(|overflow| overflow.to_string()));
        pass("--release", tether.release.map(|release| release.to_string()));
        pass("--shards", tether.shards.map(|shards| shards.to_string()));
        pass("--pace", tether.pace.map(|pace| pace.to_string()));
        if let KillAt::Percent(_) = self.args.kill_at {
            command.args(["--check", "--run-on", &self.args.run_on.to_string()]);
            if self.args.tether.output == Some(OutputChoice::Lease) {
                // Under a lease the source catches only at the operator's word; in the demo the demo is the operator.
                command.arg("--catch-on-loss");
            }
        }
        if tls {
            self.add_credentials(&mut command, "source", "destination");
        }
        Ok(command)
    }
}
