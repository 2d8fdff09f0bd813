//! The guest: a Linux kernel that is there, and an initramfs of one program, which is compiled for it.

use crate::error::BenchError;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Kernel and initramfs.
pub struct Linux {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

impl Linux {
    /// Made in `folder`, with `kernel` or this machine's newest.
    pub fn make(folder: &Path, kernel: Option<&Path>) -> Result<Self, BenchError> {
        let kernel = match kernel {
            Some(kernel) => Some(kernel.to_owned()),
            None => newest(&in_boot()).or_else(|| newest(&of_the_lab())),
        };
        let kernel = kernel.ok_or_else(|| BenchError::Options {
            what: "no kernel for the guest",
            why: "there is none in /boot that can be read, and none of the lab's; name one with --kernel (cluster-configs/softroce/lab --image fetches one)".into(),
        })?;
        fs::File::open(&kernel).map_err(BenchError::io("open the guest's kernel"))?;
        let written = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).map_err(BenchError::io("write the guest's program")).map(|()| path)
        };
        written("layout.rs", include_str!("guest/layout.rs"))?;
        let source = written("program.rs", include_str!("guest/program.rs"))?;
        let program = folder.join("init");
        let options =
            ["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort", "-C", "strip=symbols"];
        let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let compiled = Command::new(&compiler).args(options).arg("-o").arg(&program).arg(source).output();
        let compiled = compiled.map_err(BenchError::io("run rustc, which compiles the guest's program"))?;
        if !compiled.status.success() {
            let said = String::from_utf8_lossy(&compiled.stderr).lines().take(5).collect::<Vec<_>>().join("; ");
            return Err(BenchError::Options { what: "the guest's program does not compile", why: said });
        }
        let program = fs::read(&program).map_err(BenchError::io("read the guest's program"))?;
        let initramfs = folder.join("initramfs");
        fs::write(&initramfs, archive(&program)).map_err(BenchError::io("write the guest's initramfs"))?;
        Ok(Self { kernel, initramfs })
    }
}

fn entries(folder: &Path, start: &str) -> Vec<PathBuf> {
    let is_named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start));
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(is_named).collect()
}

fn in_boot() -> Vec<PathBuf> {
    entries(Path::new("/boot"), "vmlinuz-")
}

/// What the SoftRoCE lab has fetched for its hosts.
fn of_the_lab() -> Vec<PathBuf> {
    let cache = || {
        let of_user = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        Some(std::env::var_os("XDG_CACHE_HOME").map_or(of_user?, PathBuf::from).join("belay-lab"))
    };
    let lab = std::env::var_os("BELAY_LAB_CACHE").map(PathBuf::from).or_else(cache);
    let images = lab.iter().flat_map(|lab| entries(lab, "image-"));
    images.map(|image| image.join("vmlinuz")).collect()
}

fn newest(kernels: &[PathBuf]) -> Option<PathBuf> {
    let readable = kernels.iter().filter(|path| fs::File::open(path).is_ok());
    readable.max_by_key(|path| fs::metadata(path).and_then(|file| file.modified()).ok()).cloned()
}

/// A cpio archive (newc) of one program, `/init` (kernel documentation, early-userspace/buffer-format).
fn archive(program: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (inode, name, mode, content) in [(1, "init", 0o100_755, program), (0, "TRAILER!!!", 0, &[][..])] {
        let fields = [inode, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        bytes.extend(b"070701");
        fields.iter().for_each(|field| bytes.extend(format!("{field:08x}").bytes()));
        bytes.extend(name.bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}
