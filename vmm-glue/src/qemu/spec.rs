//! What a destination has to know of a QEMU guest to have a QEMU that can take it.

use super::disk::Known;
use super::inspect::Inspection;
use super::memory::in_order;
use serde::{Deserialize, Serialize};

/// Most blocks of RAM, most disks, and longest name of anything: a peer's numbers become work here.
const MOST_BLOCKS: usize = 64;
const MOST_DISKS: usize = 64;
const LONGEST_NAME: usize = 256;

/// A guest as its QEMU describes it. Regions of RAM are its blocks in the order of their ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuSpec {
    /// `pc-q35-7.2-machine`.
    pub machine: String,
    /// Of QEMU, where what the destination saves must load at the source.
    pub version: String,
    pub vcpus: u32,
    /// Id and bytes of each block.
    pub ram: Vec<(String, u64)>,
}

/// A writable disk, as its relay knows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QemuDisk {
    pub name: String,
    pub bytes: u64,
}

impl QemuDisk {
    /// Of what a relay says of itself.
    pub fn of(known: &Known) -> Self {
        Self { name: known.name.clone(), bytes: known.disk_bytes }
    }
}

/// Whether they are something that a guest could have.
pub fn check_disks(disks: &[QemuDisk]) -> Result<(), String> {
    if disks.len() > MOST_DISKS {
        return Err(format!("{} writable disks; at most {MOST_DISKS} are possible", disks.len()));
    }
    match disks.iter().find(|disk| disk.name.len() > LONGEST_NAME || disk.name.contains(char::is_control)) {
        Some(disk) => {
            Err(format!("a disk's name of {} bytes; at most {LONGEST_NAME}, printable, are possible", disk.name.len()))
        }
        None => Ok(()),
    }
}

/// Why a guest whose writable disks are `there` cannot have those that are `here` in their place, if it cannot.
pub fn disks_differ(there: &[QemuDisk], here: &[QemuDisk]) -> Option<String> {
    let listed = |disks: &[QemuDisk]| {
        let mut disks = disks.to_vec();
        disks.sort();
        disks
    };
    let (there, here) = (listed(there), listed(here));
    let list = |disks: &[QemuDisk]| match disks {
        [] => "none".to_owned(),
        _ => disks.iter().map(|disk| format!("{} of {} bytes", disk.name, disk.bytes)).collect::<Vec<_>>().join(", "),
    };
    (there != here).then(|| {
        format!(
            "the guest's writable disks are {} at the source and {} here; say --name and --image of `belay disk` alike, and --disk of each",
            list(&there),
            list(&here)
        )
    })
}

impl QemuSpec {
    /// Of a QEMU that was looked at.
    pub fn of(guest: &Inspection) -> Self {
        Self {
            machine: guest.machine.clone(),
            version: guest.version.to_string(),
            vcpus: guest.vcpus as u32,
            ram: in_order(&guest.ram).into_iter().map(|ram| (ram.id.clone(), ram.bytes)).collect(),
        }
    }

    /// Bytes of RAM in all.
    pub fn memory_bytes(&self) -> u64 {
        self.ram.iter().map(|(_, bytes)| bytes).fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    /// Whether it is something that a QEMU could be.
    pub fn check(&self) -> Result<(), String> {
        let names = self.ram.iter().map(|(id, _)| id).chain([&self.machine, &self.version]);
        if self.ram.is_empty() || self.ram.len() > MOST_BLOCKS {
            return Err(format!("{} blocks of RAM; 1 to {MOST_BLOCKS} are possible", self.ram.len()));
        }
        if let Some(name) = names.into_iter().find(|name| name.len() > LONGEST_NAME || name.contains(char::is_control))
        {
            return Err(format!("a name of {} bytes; at most {LONGEST_NAME}, printable, are possible", name.len()));
        }
        if self.vcpus == 0 {
            return Err("a guest without a vCPU".to_owned());
        }
        Ok(())
    }

    /// Why a guest like this cannot go on in a QEMU like `here`, if it cannot. `both_ways`: what that one saves has to load where the guest
    /// comes from.
    pub fn differs(&self, here: &Self, both_ways: bool) -> Option<String> {
        let differ = |what: &str, there: &dyn std::fmt::Display, here: &dyn std::fmt::Display| {
            Some(format!("the guest's {what} is {there} at the source and {here} here; start both QEMUs alike"))
        };
        let list = |spec: &Self| {
            let block = |(id, bytes): &(String, u64)| format!("{id} of {} MiB", bytes >> 20);
            spec.ram.iter().map(block).collect::<Vec<_>>().join(", ")
        };
        if self.machine != here.machine {
            return differ("machine type", &self.machine, &here.machine);
        }
        if self.vcpus != here.vcpus {
            return differ("number of vCPUs", &self.vcpus, &here.vcpus);
        }
        if self.ram != here.ram {
            return differ("RAM", &list(self), &list(here));
        }
        if both_ways && self.version != here.version {
            return differ(
                "QEMU, whose checkpoints must load at the source again if it is tethered,",
                &self.version,
                &here.version,
            );
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> QemuSpec {
        let ram = vec![("m0".to_owned(), 64 << 20), ("m1".to_owned(), 32 << 20)];
        QemuSpec { machine: "pc-q35-7.2-machine".into(), version: "7.2.22".into(), vcpus: 2, ram }
    }

    #[test]
    fn what_differs_between_two_qemus_is_named() {
        assert_eq!(spec().differs(&spec(), true), None);
        let told = |change: fn(&mut QemuSpec), both_ways| {
            let mut here = spec();
            change(&mut here);
            spec().differs(&here, both_ways).unwrap_or_default()
        };
        assert!(told(|here| here.machine = "pc".into(), false).contains("machine type is pc-q35-7.2-machine"));
        assert!(told(|here| here.vcpus = 1, false).contains("vCPUs is 2 at the source and 1 here"));
        assert!(
            told(|here| here.ram[1].1 = 16 << 20, false)
                .contains("m1 of 32 MiB at the source and m0 of 64 MiB, m1 of 16")
        );
        assert!(told(|here| here.version = "10.0.2".into(), true).contains("10.0.2 here"));
        assert_eq!(told(|here| here.version = "10.0.2".into(), false), "", "it need not come back");
    }

    #[test]
    fn disks_are_the_same_in_any_order_and_what_differs_is_named() {
        let disk = |name: &str, bytes| QemuDisk { name: name.to_owned(), bytes };
        let (one, two) = (disk("one", 512), disk("two", 1024));
        assert_eq!(disks_differ(&[one.clone(), two.clone()], &[two.clone(), one.clone()]), None);
        let told = |there: &[QemuDisk], here: &[QemuDisk]| disks_differ(there, here).expect("they differ");
        let (renamed, longer) = (disk("uno", 512), disk("one", 1024));
        assert!(
            told(&[disk("one", 512)], &[renamed])
                .contains("are one of 512 bytes at the source and uno of 512 bytes here")
        );
        assert!(told(&[disk("one", 512)], &[longer]).contains("and one of 1024 bytes here"));
        assert!(told(&[one.clone(), two], &[one]).contains("one of 512 bytes, two of 1024 bytes at the source"));
        assert!(told(&[disk("d", 1)], &[]).contains("and none here"));
        assert!(check_disks(&vec![disk("d", 1); 65]).is_err() && check_disks(&[disk("\u{1b}[2J", 1)]).is_err());
        assert_eq!(check_disks(&[disk("d", 1)]), Ok(()));
    }

    #[test]
    fn a_peers_description_has_bounds() {
        assert_eq!(spec().check(), Ok(()));
        assert!(QemuSpec { ram: vec![], ..spec() }.check().is_err());
        assert!(QemuSpec { ram: vec![("m".into(), 1); 65], ..spec() }.check().is_err());
        assert!(QemuSpec { machine: "x".repeat(257), ..spec() }.check().is_err());
        assert!(QemuSpec { ram: vec![("\u{1b}[2J".into(), 4096)], ..spec() }.check().is_err());
        assert!(QemuSpec { vcpus: 0, ..spec() }.check().is_err());
        let huge = QemuSpec { ram: vec![("a".into(), u64::MAX), ("b".into(), u64::MAX)], ..spec() };
        assert_eq!(huge.memory_bytes(), u64::MAX);
    }
}
