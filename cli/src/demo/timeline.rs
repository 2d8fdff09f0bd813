//! The demo's ending: a time line a person can read, and the histogram of fault latency.

use crate::report::{bytes, time};
use belay_vmm_glue::migrate::observation::{Kind, Observation};
use std::fmt::Write;

/// What the demo has gathered of one run, as far as the drawing needs it.
#[derive(Debug, Default)]
pub struct Story {
    pub source: Vec<Observation>,
    pub destination: Vec<Observation>,
    pub observer: Vec<Observation>,
    /// When the destination was killed, on this host's monotonic clock.
    pub killed_at_us: Option<u64>,
}

impl Story {
    fn first<'a, T>(of: &'a [Observation], pick: impl Fn(&'a Kind) -> Option<T>) -> Option<(u64, T)> {
        of.iter().find_map(|seen| pick(&seen.kind).map(|found| (seen.at_us, found)))
    }

    fn last<'a, T>(of: &'a [Observation], pick: impl Fn(&'a Kind) -> Option<T>) -> Option<(u64, T)> {
        of.iter().rev().find_map(|seen| pick(&seen.kind).map(|found| (seen.at_us, found)))
    }

    /// Whether the source has written the release down.
    pub fn is_released(&self) -> bool {
        self.source.iter().any(|seen| matches!(seen.kind, Kind::ReleaseRecorded { .. }))
    }

    /// Pause at the source: where the time line begins.
    fn origin(&self) -> Option<u64> {
        Self::first(&self.source, |kind| matches!(kind, Kind::Paused { .. }).then_some(())).map(|(at, ())| at)
    }

    /// Every commit the destination was told of: (when, epoch, pages, pause, age).
    pub fn commits(&self) -> Vec<(u64, u64, u64, u64, u64)> {
        let commits = self.destination.iter().filter_map(|seen| match seen.kind {
            Kind::Committed { epoch, pages, pause_us, age_us, .. } => {
                Some((seen.at_us, epoch, pages, pause_us, age_us))
            }
            _ => None,
        });
        commits.collect()
    }

    /// The time line: one line an event, in milliseconds since the guest was paused.
    pub fn draw(&self) -> String {
        let Some(origin) = self.origin() else {
            return "the guest was never paused: nothing moved\n".to_owned();
        };
        let mut lines: Vec<(u64, &str, String)> = vec![(origin, "source", "guest paused".to_owned())];
        if let Some((at, text)) = Self::first(&self.source, |kind| match kind {
            Kind::SwitchSent { peer_frames, zero_frames, device_state_bytes } => Some(format!(
                "switch sent: {peer_frames} pages to pull, {zero_frames} zero, {} of vCPU and device state",
                bytes(*device_state_bytes)
            )),
            _ => None,
        }) {
            lines.push((at, "source", text));
        }
        if let Some((at, load)) = Self::first(&self.destination, |kind| match kind {
            Kind::Loaded { took_us } => Some(*took_us),
            _ => None,
        }) {
            let blackout = Self::first(&self.source, |kind| match kind {
                Kind::Blackout { took_us } => Some(*took_us),
                _ => None,
            });
            let blackout = blackout.map_or(String::new(), |(_, us)| format!("; blackout {}", time(us)));
            lines.push((at, "destination", format!("guest runs, state loaded in {}{blackout}", time(load))));
        }
        let commits = self.commits();
        for &(at, epoch, pages, pause, age) in commits.iter().take(3) {
            let text = format!("checkpoint {epoch} committed: {pages} pages, pause {}, age {}", time(pause), time(age));
            lines.push((at, "destination", text));
        }
        if let Some(&(at, epoch, pages, pause, age)) = commits.last().filter(|_| commits.len() > 3) {
            let more = commits.len() - 4;
            let gap = if more > 0 { format!("… {more} more; ") } else { String::new() };
            let text =
                format!("{gap}checkpoint {epoch} committed: {pages} pages, pause {}, age {}", time(pause), time(age));
            lines.push((at, "destination", text));
        }
        if let Some((at, (landed, absent, faults))) = Self::last(&self.destination, |kind| match kind {
            Kind::Pull { landed_frames, absent_frames, faults, .. } => Some((*landed_frames, *absent_frames, *faults)),
            _ => None,
        }) {
            let share = absent as f64 * 100.0 / (landed + absent).max(1) as f64;
            lines.push((
                at,
                "destination",
                format!("pull: {landed} pages here, {absent} absent ({share:.0} %), {faults} faults served"),
            ));
        }
        if let Some((at, (took, size))) = Self::first(&self.destination, |kind| match kind {
            Kind::AllLanded { took_us, bytes, .. } => Some((*took_us, *bytes)),
            _ => None,
        }) {
            let rate = size as f64 / took.max(1) as f64;
            lines.push((
                at,
                "destination",
                format!("all pages landed: {} in {} ({rate:.0} MB/s)", bytes(size), time(took)),
            ));
        }
        if let Some(at) = self.killed_at_us {
            lines.push((at, "demo", "destination killed with SIGKILL".to_owned()));
        }
        for seen in &self.source {
            let text = match &seen.kind {
                Kind::Noticed { by } => format!("noticed: {by}"),
                Kind::Revoked { took_us } => format!("revoked: the old destination is shut out ({})", time(*took_us)),
                Kind::Recovered { epoch, total_pages, took_us, resent_packets, .. } => format!(
                    "folded: checkpoint {epoch} is in RAM ({total_pages} pages in all; the last of it took {}), {resent_packets} packets sent again",
                    time(*took_us)
                ),
                Kind::Caught { noticed_to_running_us, .. } => {
                    format!("running: guest is back, {} after the loss was noticed", time(*noticed_to_running_us))
                }
                Kind::ReleaseRecorded { .. } => {
                    "release recorded and fsynced: this host will never resume the guest".to_owned()
                }
                Kind::Released { total_us } => format!("released: total migration time {}", time(*total_us)),
                _ => continue,
            };
            lines.push((seen.at_us, "source", text));
        }
        lines.sort_by_key(|line| line.0);
        let mut out = String::from("        ms  who          what\n");
        for (at, who, what) in lines {
            let ms = (at as f64 - origin as f64) / 1e3;
            let _ = writeln!(out, "{ms:>10.2}  {who:<12} {what}");
        }
        out
    }

    /// The fault-latency histogram, in power-of-two buckets of microseconds as QEMU prints its own.
    pub fn histogram(&self) -> String {
        let found = Self::last(&self.destination, |kind| match kind {
            Kind::Latency { what, count, p50_us, p99_us, max_us, buckets, .. } if what == "total" => {
                Some((*count, *p50_us, *p99_us, *max_us, buckets))
            }
            _ => None,
        });
        let Some((_, (count, p50, p99, max, buckets))) = found else {
            return "no demand fault was served\n".to_owned();
        };
        let most = buckets.iter().map(|&(_, n)| n).max().unwrap_or(1).max(1);
        let mut out = format!(
            "demand faults, read from the userfaultfd to page in place: {count}, p50 {p50:.1} µs, p99 {p99:.1} µs, max {max:.0} µs\n"
        );
        for &(upper, n) in buckets {
            let bar = "#".repeat((n * 50).div_ceil(most) as usize);
            let _ = writeln!(out, "  < {upper:>7.0} µs {n:>8}  {bar}");
        }
        out
    }
}
