//! A file system of a test's own, seen by nobody else.
#![allow(dead_code, reason = "each test file uses its part")]

use crate::running::{BELAY, Place, Process};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A file system of this test's own over a directory: seen by nobody else, and gone with the test however that ends.
pub struct Mounted {
    /// Lives until the test closes its stdin, or is gone.
    holder: Child,
    /// As it is called where it is mounted.
    pub directory: String,
}

impl Mounted {
    /// Mounts `kind` with `options`; `None` (said on stderr) where that cannot be.
    pub fn new(place: &Place, kind: &str, options: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting {kind} needs root");
            return None;
        }
        let directory = place.text(&format!("memory-{kind}-{}", options.replace(['=', ','], "-")));
        std::fs::create_dir(&directory).unwrap();
        let script = format!("mount -t {kind} -o {options} none {directory} && echo mounted && exec cat");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = command.spawn().expect("unshare(1) runs");
        let mut said = String::new();
        BufReader::new(holder.stdout.take().expect("a pipe")).read_line(&mut said).expect("a line or its end");
        let mounted = Self { holder, directory };
        if said.trim() != "mounted" {
            eprintln!("skipped: no {kind} with {options} can be mounted here");
            return None;
        }
        Some(mounted)
    }

    /// Starts belay where this is mounted.
    pub fn belay(&self, place: &Place, arguments: &[&str]) -> Process {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--mount", BELAY]).args(arguments);
        place.start(command)
    }

    /// A name in it, as this process can open it.
    pub fn path(&self, name: &str) -> PathBuf {
        format!("/proc/{}/root{}/{name}", self.holder.id(), self.directory).into()
    }

    /// Takes all the room that is left.
    pub fn fill(&self) {
        let mut filler = File::create(self.path("filler")).expect("room for a name");
        for step in [256 << 10, 4096] {
            while filler.write_all(&vec![1; step]).is_ok() {}
        }
    }

    /// Gives back the room that was taken.
    pub fn make_room(&self) {
        std::fs::remove_file(self.path("filler")).expect("it was filled");
    }

    /// What there is of migrations' memory.
    pub fn left(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path("")).unwrap().flatten().map(|entry| entry.path());
        entries.filter(|path| path.is_dir()).collect()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
