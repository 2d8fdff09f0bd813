//! What a running guest is made of, as QEMU and /proc tell it. Looks and changes nothing.

use super::process::{Mapping, Process, ProcessError};
use super::qmp::{Qmp, QmpError, Version};
use belay_transport::Deadline;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Why a guest could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("QEMU's answer to {0} is not what this command answers")]
    Odd(&'static str),
}

/// A block of guest RAM: a memory backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ram {
    /// The backend's id.
    pub id: String,
    /// Its class: memory-backend-file, memory-backend-memfd, memory-backend-ram.
    pub kind: String,
    pub bytes: u64,
    pub share: bool,
    /// `mem-path`: a file, or a directory in which QEMU made one.
    pub path: Option<String>,
    /// Where that file is mapped, if it is found: the whole block, in one piece.
    pub mapping: Option<Mapping>,
}

/// Memory of the guest that is no RAM: firmware, ROMs, a screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherMemory {
    /// As QEMU calls it: `0000:00:01.0/vga.vram`, `pc.bios`.
    pub name: String,
    pub bytes: u64,
}

/// A disk that a device of the guest has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The drive's name, or its device's.
    pub name: String,
    /// Block driver of the file below: file, nbd, nvme, …
    pub driver: String,
    pub read_only: bool,
    /// Socket of the NBD server that has it, if that is how it is reached.
    pub server: Option<PathBuf>,
}

/// A way out of the guest's network cards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Net {
    pub name: String,
    /// tap, user, stream, vhost-user, …
    pub kind: String,
}

/// A running guest.
#[derive(Debug, Clone)]
pub struct Inspection {
    pub version: Version,
    pub pid: u32,
    /// running, paused, inmigrate, …
    pub status: String,
    /// pc-q35-7.2-machine, …
    pub machine: String,
    pub vcpus: usize,
    pub kvm: bool,
    pub commands: BTreeSet<String>,
    /// Of migration.
    pub capabilities: BTreeSet<String>,
    pub ram: Vec<Ram>,
    pub other: Vec<OtherMemory>,
    /// Class names of every device, with the path of each.
    pub devices: Vec<(String, String)>,
    pub disks: Vec<Disk>,
    pub nets: Vec<Net>,
    /// Class of what keeps the guest's memory secret from its host: sev-guest, tdx-guest.
    pub confidential: Option<String>,
    /// What of /dev the process has open.
    pub host_devices: Vec<PathBuf>,
}

impl Inspection {
    /// Asks QEMU and /proc.
    pub fn of(qmp: &mut Qmp, process: &Process, deadline: Deadline) -> Result<Self, InspectError> {
        let mut asked = Asked { qmp, deadline };
        let commands = asked.names("query-commands", "name")?;
        let capabilities = asked.names("query-migrate-capabilities", "capability")?;
        let mut devices = Vec::new();
        for root in ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"] {
            devices.extend(asked.children(root)?.into_iter().map(|(name, kind)| (kind, format!("{root}/{name}"))));
        }
        let ram = asked.ram(&process.shared_mappings()?)?;
        let confidential =
            asked.text_property("/machine", "confidential-guest-support")?.filter(|path| !path.is_empty());
        let confidential = match confidential {
            Some(path) => Some(asked.text_property(&path, "type")?.unwrap_or(path)),
            None => None,
        };
        let ids: Vec<&str> = ram.iter().map(|ram| ram.id.as_str()).collect();
        Ok(Self {
            other: asked.other_memory(&ids)?,
            status: asked.word("query-status", "status")?,
            machine: asked.text_property("/machine", "type")?.unwrap_or_default(),
            vcpus: asked.list("query-cpus-fast")?.len(),
            kvm: asked.ask("query-kvm", json!({}))?.get("enabled").and_then(Value::as_bool).unwrap_or(false),
            disks: asked.disks()?,
            nets: nets(&asked.monitor("info network")?),
            host_devices: process.devices()?,
            pid: process.pid().as_raw_nonzero().get().unsigned_abs(),
            version: asked.qmp.version().clone(),
            commands,
            capabilities,
            ram,
            devices,
            confidential,
        })
    }
}

/// One round of questions.
struct Asked<'a> {
    qmp: &'a mut Qmp,
    deadline: Deadline,
}

impl Asked<'_> {
    fn ask(&mut self, command: &'static str, arguments: Value) -> Result<Value, InspectError> {
        Ok(self.qmp.execute(command, arguments, self.deadline)?)
    }

    fn list(&mut self, command: &'static str) -> Result<Vec<Value>, InspectError> {
        match self.ask(command, json!({}))? {
            Value::Array(list) => Ok(list),
            _ => Err(InspectError::Odd(command)),
        }
    }

    fn names(&mut self, command: &'static str, field: &str) -> Result<BTreeSet<String>, InspectError> {
        Ok(self.list(command)?.iter().filter_map(|one| Some(one.get(field)?.as_str()?.to_owned())).collect())
    }

    fn word(&mut self, command: &'static str, field: &str) -> Result<String, InspectError> {
        let answer = self.ask(command, json!({}))?;
        answer.get(field).and_then(Value::as_str).map(str::to_owned).ok_or(InspectError::Odd(command))
    }

    fn monitor(&mut self, line: &str) -> Result<String, InspectError> {
        let answer = self.ask("human-monitor-command", json!({ "command-line": line }))?;
        answer.as_str().map(str::to_owned).ok_or(InspectError::Odd("human-monitor-command"))
    }

    /// A property that may not be there.
    fn property(&mut self, path: &str, property: &str) -> Result<Option<Value>, InspectError> {
        match self.qmp.execute("qom-get", json!({ "path": path, "property": property }), self.deadline) {
            Ok(value) => Ok(Some(value)),
            Err(QmpError::Refused { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn text_property(&mut self, path: &str, property: &str) -> Result<Option<String>, InspectError> {
        Ok(self.property(path, property)?.and_then(|value| value.as_str().map(str::to_owned)))
    }

    /// Name and class of what is below `path`.
    fn children(&mut self, path: &str) -> Result<Vec<(String, String)>, InspectError> {
        let Value::Array(list) = self.ask("qom-list", json!({ "path": path }))? else {
            return Err(InspectError::Odd("qom-list"));
        };
        let child = |one: &Value| {
            let kind = one.get("type")?.as_str()?.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
            Some((one.get("name")?.as_str()?.to_owned(), kind))
        };
        Ok(list.iter().filter_map(child).collect())
    }

    fn ram(&mut self, mappings: &[Mapping]) -> Result<Vec<Ram>, InspectError> {
        let mut found = Vec::new();
        for backend in self.list("query-memdev")? {
            let text = |field| backend.get(field).and_then(Value::as_str).map(str::to_owned);
            let (Some(id), Some(bytes)) = (text("id"), backend.get("size").and_then(Value::as_u64)) else {
                return Err(InspectError::Odd("query-memdev"));
            };
            let object = format!("/objects/{id}");
            let kind = self.text_property(&object, "type")?.unwrap_or_default();
            let path = self.text_property(&object, "mem-path")?;
            let share = backend.get("share").and_then(Value::as_bool).unwrap_or(false);
            let mapping = path.as_deref().and_then(|path| mapping_of(mappings, path, &id, bytes));
            found.push(Ram { mapping, id, kind, bytes, share, path });
        }
        Ok(found)
    }

    /// The blocks of `x-query-ramblock`'s table that are none of `ram`.
    fn other_memory(&mut self, ram: &[&str]) -> Result<Vec<OtherMemory>, InspectError> {
        let answer = self.ask("x-query-ramblock", json!({}))?;
        let table = answer.get("human-readable-text").and_then(Value::as_str);
        Ok(blocks(table.ok_or(InspectError::Odd("x-query-ramblock"))?)
            .into_iter()
            .filter(|block| !ram.contains(&block.name.strip_prefix("/objects/").unwrap_or(&block.name)))
            .collect())
    }

    fn disks(&mut self) -> Result<Vec<Disk>, InspectError> {
        let mut found = Vec::new();
        for drive in self.list("query-block")? {
            let text = |pointer: &str| drive.pointer(pointer).and_then(Value::as_str).filter(|text| !text.is_empty());
            // An empty CD drive has nothing inserted.
            let Some(inserted) = drive.get("inserted") else { continue };
            let name = text("/device").or_else(|| text("/qdev")).unwrap_or("a drive without a name");
            // With a format above it, the file below is in the image's description.
            let file = text("/inserted/file").unwrap_or_default();
            let driver = match file.split_once("://").map(|(scheme, _)| scheme) {
                Some(scheme @ ("nvme" | "nbd")) => scheme,
                _ => text("/inserted/drv").unwrap_or("unknown"),
            };
            let read_only = inserted.get("ro").and_then(Value::as_bool).unwrap_or(false);
            let server = server_of(file);
            found.push(Disk { name: name.to_owned(), driver: driver.to_owned(), read_only, server });
        }
        Ok(found)
    }
}

/// The socket in what QEMU calls a disk that an NBD server has: `nbd+unix:///EXPORT?socket=PATH` (block/nbd.c, nbd_refresh_filename).
fn server_of(file: &str) -> Option<PathBuf> {
    let (_, socket) = file.strip_prefix("nbd+unix://")?.split_once("?socket=")?;
    Some(socket.into())
}

/// The mapping of a backend's file: of that path, or of the file that it leads to, or in that directory with QEMU's name for the backend; all of it.
fn mapping_of(mappings: &[Mapping], path: &str, id: &str, bytes: u64) -> Option<Mapping> {
    // A path of another mount namespace leads nowhere here, or to another file: then its name has to do.
    let leads_to = std::fs::metadata(path)
        .ok()
        .filter(std::fs::Metadata::is_file)
        .map(|file| (libc::major(file.dev()), libc::minor(file.dev()), file.ino()));
    let called = |mapping: &&Mapping| {
        let name = mapping.path.strip_suffix(" (deleted)").unwrap_or(&mapping.path);
        let made = |rest: &str| {
            rest.starts_with(&format!("qemu_back_mem.{id}."))
                || rest.starts_with(&format!("qemu_back_mem._objects_{id}."))
        };
        name == path
            || leads_to == Some(mapping.file)
            || name.strip_prefix(path.trim_end_matches('/')).and_then(|rest| rest.strip_prefix('/')).is_some_and(made)
    };
    // A file larger than the block is mapped as far as the block goes; huge pages are mapped whole.
    mappings.iter().filter(called).find(|mapping| mapping.offset == 0 && mapping.end - mapping.start >= bytes).cloned()
}

/// Name and size in use of every block in the table that `info ramblock` shows. Names may have spaces; what follows does not,
/// but for the page size's unit.
fn blocks(table: &str) -> Vec<OtherMemory> {
    let one = |line: &str| {
        let (head, columns) = line.split_once(" 0x")?;
        // The name, a number, its unit.
        let (rest, _unit) = head.trim().rsplit_once(' ')?;
        let (name, _number) = rest.trim_end().rsplit_once(' ')?;
        let used = columns.split_whitespace().nth(1)?.strip_prefix("0x")?;
        Some(OtherMemory { name: name.trim().to_owned(), bytes: u64::from_str_radix(used, 16).ok()? })
    };
    table.lines().filter_map(one).collect()
}

/// The back ends in the text of `info network`: `name: index=0,type=tap,…`, those of a card indented below it.
fn nets(text: &str) -> Vec<Net> {
    let one = |line: &str| {
        let (name, what) = line.trim().trim_start_matches("\\ ").split_once(": ")?;
        let kind = what.split(',').find_map(|part| part.strip_prefix("type="))?;
        (kind != "nic").then(|| Net { name: name.to_owned(), kind: kind.to_owned() })
    };
    text.lines().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_with_and_without_the_columns_that_later_versions_have() {
        let old = "              Block Name    PSize              Offset               Used              Total\n\
                   \u{20}                      m    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\n\
                   \u{20}  0000:00:01.0/vga.vram    4 KiB  0x0000000006080000 0x0000000001000000 0x0000000001000000\n";
        let new = "Block Name    PSize              Offset               Used              Total                HVA  RO\n\
                   a name    2 MiB  0x0000000000000000 0x0000000000040000 0x0000000000040000 0x00007f8ac1e00000  ro\n";
        let read = |table| blocks(table).into_iter().map(|block| (block.name, block.bytes)).collect::<Vec<_>>();
        assert_eq!(read(old), [("m".to_owned(), 64 << 20), ("0000:00:01.0/vga.vram".to_owned(), 16 << 20)]);
        assert_eq!(read(new), [("a name".to_owned(), 256 << 10)]);
    }

    #[test]
    fn back_ends_are_read_and_cards_are_none() {
        let text = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ n0: index=0,type=user,net=10.0.2.0\r\nhub: index=0,type=tap,ifname=t\r\n";
        let found: Vec<_> = nets(text).into_iter().map(|net| (net.name, net.kind)).collect();
        assert_eq!(found, [("n0".to_owned(), "user".to_owned()), ("hub".to_owned(), "tap".to_owned())]);
    }

    #[test]
    fn a_backends_file_is_found_by_its_path_or_in_its_directory_by_its_name() {
        let mapping =
            |path: &str, bytes| Mapping { start: 0, end: bytes, offset: 0, file: (0, 1, 2), path: path.to_owned() };
        let all = [
            mapping("/dev/shm/a", 4096),
            mapping("/dev/shm/b", 8192),
            mapping("/hp/qemu_back_mem._objects_one.X (deleted)", 8192),
            mapping("/hp/qemu_back_mem.ones.Y", 8192),
        ];
        let found = |path, id, bytes| mapping_of(&all, path, id, bytes).map(|mapping| mapping.path);
        assert_eq!(found("/dev/shm/b", "m", 8192).as_deref(), Some("/dev/shm/b"));
        assert_eq!(found("/dev/shm/a", "m", 8192), None, "it must hold the whole block");
        assert_eq!(found("/hp/", "one", 8192).as_deref(), Some("/hp/qemu_back_mem._objects_one.X (deleted)"));
        assert_eq!(found("/hp", "two", 8192), None);
        // By a link.
        let folder = tempfile::tempdir().expect("a folder");
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        std::fs::write(&file, [0; 8192]).expect("a file");
        std::os::unix::fs::symlink(&file, &link).expect("a link");
        let known = std::fs::metadata(&file).expect("its numbers");
        let mut real = mapping("/elsewhere", 8192);
        real.file = (libc::major(known.dev()), libc::minor(known.dev()), known.ino());
        assert_eq!(mapping_of(std::slice::from_ref(&real), link.to_str().expect("text"), "m", 8192), Some(real));
    }

    #[test]
    fn no_text_makes_reading_tables_panic() {
        proptest::proptest!(|(text in "(?s).{0,200}")| {
            blocks(&text);
            nets(&text);
        });
    }
}
