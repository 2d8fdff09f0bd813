//! What a process keeps in memory beside its guest's RAM, as the kernel counts it.

use crate::error::BenchError;
use rustix::process::Pid;
use std::fs::read_to_string;

/// How a file of guest RAM is called, on either host.
const GUEST_RAM: &str = "belay-guest-ram";

/// Bytes of a process, and of its children, that are not guest RAM: each page in the share that others leave it (Pss of proc_pid_smaps(5)).
/// A page that is mapped twice counts once.
pub fn beside_guest_ram(pid: Pid) -> Result<u64, BenchError> {
    let read = |pid: &str| read_to_string(format!("/proc/{pid}/smaps")).map_err(BenchError::io("read smaps"));
    let own = pid.as_raw_nonzero().to_string();
    let children = format!("/proc/{own}/task/{own}/children");
    let children = read_to_string(children).map_err(BenchError::io("list a process's children"))?;
    let mut bytes = beside(&read(&own)?);
    for child in children.split_whitespace() {
        // One that has ended meanwhile keeps nothing.
        bytes += read(child).map_or(0, |text| beside(&text));
    }
    Ok(bytes)
}

fn beside(smaps: &str) -> u64 {
    let (mut guest, mut kib) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        match first.strip_suffix(':') {
            None => guest = line.contains(GUEST_RAM),
            Some("Pss") if !guest => kib += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default(),
            Some(_) => {}
        }
    }
    kib * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_counts_but_guest_ram() {
        let smaps = "\
7f0000000000-7f0010000000 rw-s 00000000 00:01 7 /memfd:belay-guest-ram (deleted)
Size:             262144 kB
Pss:              131072 kB
Pss_Dirty:        131072 kB
7f0020000000-7f0024000000 rw-s 00000000 00:01 8 /memfd:belay-ring (deleted)
Pss:               65536 kB
Pss_Dirty:         65536 kB
55d000000000-55d000001000 r-xp 00000000 08:01 9 /usr/bin/belay
Pss:                   4 kB
";
        assert_eq!(beside(smaps), (65_536 + 4) * 1024);
        assert_eq!(beside(""), 0);
    }

    #[test]
    fn memory_that_this_process_takes_is_counted() {
        // Whatever the tests beside this one take and give back: this much it has.
        let taken = std::hint::black_box(vec![1_u8; 64 << 20]);
        let all = beside_guest_ram(rustix::process::getpid()).unwrap();
        assert!(all >= taken.len() as u64, "{all}");
    }
}
