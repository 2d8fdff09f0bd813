//! Guest RAM of a QEMU, as files this process maps too.

use super::inspect::Ram;
use super::machine::failed;
use super::process::Process;
use belay_checkpoint::guest::{GuestError, RamBlock};
use belay_transport::RegionId;
use belay_transport::region::{Mapping, RamFile};
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

/// Present in RAM, or swapped out (proc_pid_pagemap(5)).
const MAPPED: u64 = 1 << 63 | 1 << 62;

fn pid(process: &Process) -> i32 {
    process.pid().as_raw_nonzero().get()
}

/// The file of a block, as the process itself has it open: its path may be gone, or another file's by now.
pub fn path_of(process: &Process, ram: &Ram) -> Result<PathBuf, GuestError> {
    let pid = pid(process);
    let mapping = ram.mapping.as_ref().ok_or_else(|| not_found(ram, pid))?;
    let (major, minor, inode) = mapping.file;
    let device = libc::makedev(major, minor);
    let open = fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed("list what QEMU has open"))?;
    let is_it = |path: &PathBuf| fs::metadata(path).is_ok_and(|file| file.dev() == device && file.ino() == inode);
    open.flatten().map(|entry| entry.path()).find(is_it).ok_or_else(|| not_found(ram, pid))
}

fn not_found(ram: &Ram, pid: i32) -> GuestError {
    let path = ram.path.as_deref().unwrap_or("no file");
    GuestError::Unsupported(format!("RAM {} ({path}) is not open in process {pid}", ram.id))
}

/// The file of a block, to be mapped here. It must be as long as the block.
pub fn file_of(process: &Process, ram: &Ram) -> Result<RamFile, GuestError> {
    let path = path_of(process, ram)?;
    let file = RamFile::open(&path).map_err(|error| GuestError::Io {
        doing: format!("open RAM {} of QEMU", ram.id),
        source: io::Error::other(error),
    })?;
    if file.len() as u64 != ram.bytes {
        let (id, path, is) = (&ram.id, ram.path.as_deref().unwrap_or_default(), file.len());
        let why = format!("RAM {id} has {} bytes and its file {path} has {is}; give it a file of its own", ram.bytes);
        return Err(GuestError::Unsupported(why));
    }
    Ok(file)
}

/// Blocks in the order of their ids, which is the same on both hosts.
pub fn in_order(ram: &[Ram]) -> Vec<&Ram> {
    let mut blocks: Vec<&Ram> = ram.iter().collect();
    blocks.sort_by(|one, other| one.id.cmp(&other.id));
    blocks
}

/// A block as roles and trackers know it.
pub fn block(
    id: RegionId,
    ram: &Ram,
    file: Arc<RamFile>,
    alias: Arc<Mapping>,
    process: &Process,
) -> Result<RamBlock, GuestError> {
    let vmm_address = ram.mapping.as_ref().ok_or_else(|| not_found(ram, pid(process)))?.start;
    Ok(RamBlock { id, page_size: file.page_size(), file, alias, vmm_address })
}

/// Fails where the process has a page of `block` in its page table: it would never ask for that one (P1).
pub fn expect_untouched(process: &Process, block: &RamBlock) -> Result<(), GuestError> {
    const AT_ONCE: u64 = 64 << 10;
    let doing = "look at QEMU's page table";
    let path = format!("/proc/{}/pagemap", pid(process));
    let mut pagemap = fs::File::open(path).map_err(failed(doing))?;
    let page = belay_transport::PAGE_SIZE as u64;
    let (first, pages) = (block.vmm_address / page, block.alias.len() as u64 / page);
    pagemap.seek(SeekFrom::Start(first * 8)).map_err(failed(doing))?;
    let mut entries = vec![0; (AT_ONCE.min(pages) * 8) as usize];
    for begun in (0..pages).step_by(AT_ONCE as usize) {
        let wanted = &mut entries[..(AT_ONCE.min(pages - begun) * 8) as usize];
        pagemap.read_exact(wanted).map_err(failed(doing))?;
        let words = wanted.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("chunks of 8")));
        if let Some(at) = words.into_iter().position(|entry| entry & MAPPED != 0) {
            let page = begun + at as u64;
            return Err(GuestError::Unsupported(format!(
                "QEMU has touched page {page} of {} before its guest came; start it with -incoming defer and nothing else that uses its memory",
                block.id
            )));
        }
    }
    Ok(())
}
