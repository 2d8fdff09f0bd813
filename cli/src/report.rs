//! How observations reach the person or the program that runs belay: sentences on a terminal, JSON lines for programs.

use crate::exit::Exit;
use crate::logs::{self, Logs};
use belay_transport::explain;
use belay_vmm_glue::migrate::observation::{Kind, Observation, Observer};
use belay_vmm_glue::migrate::status::Board;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// An observer that prints what is noted: one JSON object a line on stdout with `json`, else a sentence a line on stderr, with a
/// progress bar under them on a terminal.
pub fn reporter(role: &'static str, json: bool) -> Observer {
    watched(role, json, None, None)
}

/// The same, where what is noted is shown on `board` too, and logged. Log lines take the place of sentences.
pub fn watched(role: &'static str, json: bool, board: Option<Arc<Board>>, logs: Option<Logs>) -> Observer {
    let logged = logs.is_some_and(Logs::on);
    let also = move |observation: &Observation| {
        if let Some(board) = &board {
            board.heard(observation);
        }
        if logged {
            logs::observed(observation);
        }
    };
    if json {
        return Observer::new(role, move |observation| {
            also(observation);
            let line = serde_json::to_string(observation).expect("an observation is plain data");
            // A reader that went away must not end the migration; the exit code still tells how it went.
            let _ = writeln!(std::io::stdout().lock(), "{line}");
        });
    }
    let started = Instant::now();
    let bar = Mutex::new(None);
    Observer::new(role, move |observation| {
        also(observation);
        if logged {
            return;
        }
        let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
        advance(&mut bar, &observation.kind);
        let Some(sentence) = sentence(&observation.kind) else { return };
        let line = format!("{:>10.3} s  {}", started.elapsed().as_secs_f64(), printable(&sentence));
        match &*bar {
            Some(bar) => bar.suspend(|| drop(writeln!(std::io::stderr().lock(), "{line}"))),
            None => drop(writeln!(std::io::stderr().lock(), "{line}")),
        }
    })
}

/// Shows how far a long piece of work is, or takes the bar away when it is done. Nothing where stderr is no terminal.
fn advance(bar: &mut Option<ProgressBar>, kind: &Kind) {
    let (what, done, total) = match *kind {
        Kind::Allocating { done_bytes, total_bytes } => ("allocating", done_bytes >> 20, total_bytes >> 20),
        Kind::Registering { done_bytes, total_bytes, .. } => ("registering", done_bytes >> 20, total_bytes >> 20),
        Kind::Pull { landed_frames, absent_frames, .. } if absent_frames > 0 => {
            ("pulling", landed_frames, landed_frames + absent_frames)
        }
        Kind::Allocated { .. }
        | Kind::Registered { .. }
        | Kind::AllLanded { .. }
        | Kind::Failed { .. }
        | Kind::Ended { .. } => {
            if let Some(bar) = bar.take() {
                bar.finish_and_clear();
            }
            return;
        }
        _ => return,
    };
    let bar = bar.get_or_insert_with(|| progress_bar(what, if what == "pulling" { "pages" } else { "MiB" }));
    bar.set_length(total);
    bar.set_position(done);
}

/// A bar on stderr, hidden where that is no terminal.
pub fn progress_bar(what: &'static str, unit: &str) -> ProgressBar {
    let template = format!("{{msg:>12}} [{{bar:40}}] {{pos}}/{{len}} {unit}");
    let style = ProgressStyle::with_template(&template).expect("the template has only known keys");
    ProgressBar::no_length().with_style(style.progress_chars("=> ")).with_message(what)
}

/// Text that may have come from the peer, without what would steer a terminal.
pub fn printable(text: &str) -> String {
    let steers = |c: char| c.is_control() && c != '\n';
    text.chars().map(|c| if steers(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Notes a failure with all that caused it.
pub fn failed(observer: &Observer, error: &dyn std::error::Error, advice: &str) {
    failed_text(observer, &explain(error), advice);
}

/// Notes a failure.
pub fn failed_text(observer: &Observer, what: &str, advice: &str) {
    observer.note(observer.latest().as_ref(), Kind::Failed { what: what.to_owned(), advice: advice.to_owned() });
}

/// Notes the end of a command, and gives its exit code back.
pub fn ended(observer: &Observer, exit: Exit) -> Exit {
    observer.note(observer.latest().as_ref(), Kind::Ended { outcome: format!("{exit:?}"), exit_code: exit.code() });
    exit
}

/// Reads one JSON line back.
pub fn parse(line: &str) -> Option<Observation> {
    serde_json::from_str(line).ok()
}

/// Microseconds for people: µs below a millisecond, ms below ten seconds.
pub fn time(us: u64) -> String {
    match us {
        0..1000 => format!("{us} µs"),
        1000..10_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

/// A count and what is counted: `1 vCPU`, `2 vCPUs`.
pub fn counted(count: u64, one: &str, several: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { several })
}

/// Bytes for people, powers of 1024.
pub fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", n as f64 / 1_073_741_824.0),
    }
}

/// What a person is told, or nothing for what only programs want.
pub fn sentence(kind: &Kind) -> Option<String> {
    Some(match kind {
        // An event's name, or a sentence for people.
        Kind::State { state, why } if !why.contains(' ') => format!("now {state} ({why})"),
        Kind::State { why, .. } => why.clone(),
        Kind::Operable { name, socket } => format!("`belay status {name}` tells how it stands ({socket})"),
        Kind::Metrics { address } => format!("metrics at http://{address}/metrics"),
        Kind::Relay { gate, why } => format!("{why}; the gate is {gate}"),
        Kind::Listening { address } => format!("listening on {address}"),
        Kind::GuestStarted { driven_by, spec, .. } => {
            let vcpus = counted(u64::from(spec.vcpus), "vCPU", "vCPUs");
            format!("guest runs: {} of RAM, {vcpus}, driven by {driven_by}", bytes(spec.memory_bytes))
        }
        Kind::VmmReady { pid } => format!("VMM waits for its guest as process {pid}"),
        Kind::TapGated { tap } => format!(
            "what a tethered guest sends through {tap} is held by the kernel and no checkpoint: frames that have committed and are lost with this host are not sent again"
        ),
        Kind::VmmStarted { pid } => format!("VMM runs as process {pid}"),
        Kind::QemuFound { pid, version, machine, vcpus, ram_bytes } => {
            format!("QEMU {version} found, process {pid}: {machine}, {vcpus} vCPUs, {}", bytes(*ram_bytes))
        }
        Kind::StandbyStarted { pid, monitor, took_us } => {
            format!("the standby waits, process {pid} (QMP: {monitor}), after {}", time(*took_us))
        }
        Kind::QemuLeft { pid, monitor } => {
            let monitor = monitor.as_ref().map(|monitor| format!(" (QMP: {monitor})")).unwrap_or_default();
            format!("the guest goes on in the QEMU of process {pid}{monitor}")
        }
        Kind::TookOver { pid, landed_frames, missing_frames, held_packets } => format!(
            "took over VMM {pid}: {landed_frames} pages are here, {missing_frames} missing, {held_packets} packets held; the guest is stopped"
        ),
        Kind::Connected { peer, fabric, tls, protocol, without_verbs } => {
            let how = match (&**fabric, *tls) {
                ("verbs", true) => "control by TLS 1.3, memory in clear",
                ("verbs", false) => "all in clear",
                (_, true) => "TLS 1.3",
                (_, false) => "no TLS",
            };
            let why = without_verbs.as_ref().map_or_else(String::new, |why| format!("; not over verbs: {why}"));
            format!("connected to {peer} over {fabric} ({how}, protocol {protocol}){why}")
        }
        Kind::Fabric(details) => format!("RDMA through {details}"),
        Kind::Allocated { bytes: n, took_us } => format!("allocated {} in {}", bytes(*n), time(*took_us)),
        Kind::Registered { bytes: n, regions, pinned_bytes, stale_bytes, took_us } => {
            let anew = match stale_bytes {
                0 => String::new(),
                _ => format!(", {} of it anew: the guest had given it up", bytes(*stale_bytes)),
            };
            format!(
                "registered {} with the device in {}: {regions} memory regions, {} pinned in all{anew}",
                bytes(*n),
                time(*took_us),
                bytes(*pinned_bytes)
            )
        }
        Kind::Placed { what, .. } => what.clone(),
        Kind::Prepared { took_us } => format!("prepared in {}; the guest has not been touched", time(*took_us)),
        Kind::Paused { .. } => "guest paused for the switch".to_owned(),
        Kind::SwitchSent { peer_frames, zero_frames, device_state_bytes } => format!(
            "switch sent: {peer_frames} pages to pull, {zero_frames} zero, {} of device state",
            bytes(*device_state_bytes)
        ),
        Kind::Loaded { took_us } => format!("state loaded in {}", time(*took_us)),
        Kind::Resumed { .. } => "guest runs at the destination".to_owned(),
        Kind::Blackout { took_us } => format!("blackout {}", time(*took_us)),
        Kind::AllLanded { took_us, bytes: n, faults } => {
            format!("all pages landed after {}: {} pulled, {faults} faults served", time(*took_us), bytes(*n))
        }
        Kind::Noticed { by } => format!("the destination is lost: {by}"),
        Kind::Revoked { took_us } => format!("the old destination is shut out ({})", time(*took_us)),
        Kind::Recovered { epoch, total_pages, took_us, resent_packets, .. } => format!(
            "checkpoint {epoch} is in RAM ({total_pages} pages in all; the last of it took {}); {resent_packets} packets sent again",
            time(*took_us)
        ),
        Kind::Caught { epoch, noticed_to_running_us, .. } => {
            format!(
                "caught at checkpoint {epoch}: guest runs here again {} after the loss was noticed",
                time(*noticed_to_running_us)
            )
        }
        Kind::TakenOver { migration, was } => format!("took over migration {migration}, whose process died {was}"),
        Kind::Kept { migration, memory: Some(path) } => {
            format!(
                "migration {migration}: memory is kept in {path}; if this process dies, `belay send --takeover` goes on"
            )
        }
        Kind::Kept { migration, memory: None } => format!(
            "migration {migration}: guest memory is anonymous, so nobody can take over if this process dies (--memory-dir)"
        ),
        Kind::TetheredAgain { committed } => {
            format!("the destination is back and tethered again, from checkpoint {committed}")
        }
        Kind::ReleaseRecorded { path } => format!("release written to {path}: this host will never resume this guest"),
        Kind::Released { total_us } => format!("released; the migration took {}", time(*total_us)),
        Kind::Checked { pages, not_compared: Some(left), wrong_pages: 0, took_us, .. } => format!(
            "checked the {pages} pages that the fenced guest has (of {left} nothing can be said) in {}: every byte is what it must be",
            time(*took_us)
        ),
        Kind::Checked { pages, wrong_pages: 0, took_us, .. } => {
            format!("checked all {pages} pages of RAM in {}: every byte is what it must be", time(*took_us))
        }
        Kind::Checked { detail, .. } => format!("CHECK FAILED: {detail}"),
        Kind::TetherSummary {
            epochs,
            pages,
            pause_p50_us,
            pause_p99_us,
            age_p99_us,
            held_back_us,
            output_delay_p99_us,
            ..
        } => {
            let delay = output_delay_p99_us.map_or(String::new(), |us| format!("; output delay p99 {us:.0} µs"));
            let held_back = match held_back_us {
                0 => String::new(),
                us => format!("; held back for {}", time(*us)),
            };
            format!(
                "tether: {epochs} checkpoints, {pages} pages; pause p50 {pause_p50_us:.0} µs, p99 {pause_p99_us:.0} µs; commit age p99 {age_p99_us:.0} µs{delay}{held_back}"
            )
        }
        Kind::Failed { what, advice } => format!("FAILED: {what}\n              {advice}"),
        Kind::Ended { outcome, exit_code } => format!("ended: {outcome} (exit code {exit_code})"),
        Kind::Unknown => "something that this version of belay has no words for".to_owned(),
        Kind::Allocating { .. }
        | Kind::Registering { .. }
        | Kind::Pull { .. }
        | Kind::Committed { .. }
        | Kind::Folded { .. }
        | Kind::Latency { .. }
        | Kind::CpuTime { .. } => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_says_cannot_steer_the_terminal() {
        let sentence = printable("the source failed: \u{1b}[2Jall is well\r\u{9b}31m\nnext");
        assert!(sentence.chars().all(|c| c == '\n' || !c.is_control()), "{sentence:?}");
        assert!(sentence.contains("all is well") && sentence.ends_with("\nnext"));
    }
}
