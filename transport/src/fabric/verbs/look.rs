//! Whether this host has an RDMA device that could carry a session: from sysfs, without opening or changing anything.
//!
//! Asked before a session, so that a host without RDMA offers `tcp` instead of failing. What only opening the device can
//! tell (permission, memlock) is told when it is opened.

use super::VerbsSettings;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the kernel's RDMA core lists devices (Documentation/ABI/stable/sysfs-class-infiniband).
const CLASS: &str = "/sys/class/infiniband";

/// Why no device of this host fits what the operator asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoDevice {
    #[error("nothing is in /sys/class/infiniband")]
    None,
    #[error("there is no {asked}, only {}", there.join(", "))]
    NoSuchDevice { asked: String, there: Vec<String> },
    #[error("{device} has no port {asked}")]
    NoSuchPort { device: String, asked: u8 },
    #[error("no port is active: {}", ports.join(", "))]
    Inactive { ports: Vec<String> },
    #[error("index {index} of the GID table of {device} port {port} is empty")]
    EmptyGid { device: String, port: u8, index: u8 },
}

/// A port, and the number and state it has.
struct Port {
    device: String,
    path: PathBuf,
    number: u8,
    state: String,
}

impl Port {
    fn is_active(&self) -> bool {
        self.state.ends_with("ACTIVE")
    }

    fn has_gid(&self, index: u8) -> bool {
        let gid = read(&self.path.join("gids").join(index.to_string())).unwrap_or_default();
        gid.bytes().any(|byte| byte != b'0' && byte != b':')
    }
}

/// Whether a device of this host fits `settings`; if not, why.
pub fn look(settings: &VerbsSettings) -> Result<(), NoDevice> {
    look_in(Path::new(CLASS), settings)
}

fn look_in(class: &Path, settings: &VerbsSettings) -> Result<(), NoDevice> {
    let mut devices = names(class);
    if devices.is_empty() {
        return Err(NoDevice::None);
    }
    if let Some(asked) = &settings.device {
        if !devices.contains(asked) {
            return Err(NoDevice::NoSuchDevice { asked: asked.clone(), there: devices });
        }
        devices.retain(|device| device == asked);
    }
    let mut ports: Vec<Port> = devices.iter().flat_map(|device| ports(&class.join(device), device)).collect();
    if let Some(asked) = settings.port {
        ports.retain(|port| port.number == asked);
        if ports.is_empty() {
            return Err(NoDevice::NoSuchPort { device: devices.join(", "), asked });
        }
    }
    if !ports.iter().any(Port::is_active) {
        let told = |port: &Port| format!("{} port {} is {}", port.device, port.number, port.state);
        return Err(NoDevice::Inactive { ports: ports.iter().map(told).collect() });
    }
    let Some(index) = settings.gid_index else { return Ok(()) };
    let mut active = ports.into_iter().filter(Port::is_active).peekable();
    let first = active.peek().map(|port| (port.device.clone(), port.number));
    match first {
        Some((device, port)) if !active.any(|port| port.has_gid(index)) => {
            Err(NoDevice::EmptyGid { device, port, index })
        }
        _ => Ok(()),
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn ports(device_path: &Path, device: &str) -> Vec<Port> {
    let directory = device_path.join("ports");
    let number = |name: String| Some((name.parse::<u8>().ok()?, directory.join(name)));
    let port = |(number, path): (u8, PathBuf)| {
        // "4: ACTIVE"; the number is ibv_port_state.
        let state = read(&path.join("state")).unwrap_or_else(|| "unreadable".to_owned());
        let state = state.rsplit(": ").next().unwrap_or_default().to_owned();
        Port { device: device.to_owned(), path, number, state }
    };
    names(&directory).into_iter().filter_map(number).map(port).collect()
}

fn read(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GID: &str = "0000:0000:0000:0000:0000:ffff:0a00:0001";
    const EMPTY: &str = "0000:0000:0000:0000:0000:0000:0000:0000";

    /// mlx5_0 with an active port 1 and an inactive port 2, and rxe0 whose port is down.
    fn host() -> tempfile::TempDir {
        let class = tempfile::tempdir().expect("tempdir");
        for (device, port, state) in
            [("mlx5_0", "1", "4: ACTIVE\n"), ("mlx5_0", "2", "2: INIT\n"), ("rxe0", "1", "1: DOWN\n")]
        {
            let port = class.path().join(device).join("ports").join(port);
            fs::create_dir_all(port.join("gids")).expect("directories");
            fs::write(port.join("state"), state).expect("state");
            fs::write(port.join("gids/0"), GID).expect("gid");
            fs::write(port.join("gids/1"), EMPTY).expect("gid");
        }
        class
    }

    fn asked(device: Option<&str>, port: Option<u8>, gid_index: Option<u8>) -> Result<(), NoDevice> {
        let device = device.map(str::to_owned);
        look_in(host().path(), &VerbsSettings { device, port, gid_index, ..VerbsSettings::default() })
    }

    #[test]
    fn an_active_port_that_fits_is_found() {
        for settings in [(None, None, None), (Some("mlx5_0"), Some(1), Some(0)), (None, Some(1), Some(0))] {
            asked(settings.0, settings.1, settings.2).expect("it is there");
        }
    }

    #[test]
    fn what_does_not_fit_is_named_with_what_there_is() {
        let said = |device, port, gid| asked(device, port, gid).expect_err("not there").to_string();
        assert_eq!(said(Some("mlx5_7"), None, None), "there is no mlx5_7, only mlx5_0, rxe0");
        assert_eq!(said(Some("rxe0"), Some(2), None), "rxe0 has no port 2");
        assert_eq!(said(Some("rxe0"), None, None), "no port is active: rxe0 port 1 is DOWN");
        assert_eq!(said(None, Some(2), None), "no port is active: mlx5_0 port 2 is INIT");
        for index in [1, 9] {
            let text = format!("index {index} of the GID table of mlx5_0 port 1 is empty");
            assert_eq!(said(Some("mlx5_0"), None, Some(index)), text);
        }
    }

    #[test]
    fn a_host_without_rdma_is_told_from_one_whose_link_is_down() {
        let nothing = tempfile::tempdir().expect("tempdir");
        assert_eq!(look_in(nothing.path(), &VerbsSettings::default()), Err(NoDevice::None));
        assert_eq!(look_in(&nothing.path().join("absent"), &VerbsSettings::default()), Err(NoDevice::None));
    }
}
