//! A status for people: a line in a list, or a page.

use crate::report;
use belay_vmm_glue::migrate::status::{Distribution, Status};
use std::fmt::Write;

/// A column heading or cell, as wide as the widest in it.
pub fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

/// The heading of a list.
pub fn heading() -> Vec<String> {
    ["ID", "ROLE", "STATE", "FOR", "PAGES LEFT", "COMMIT AGE", "PEER", "MIGRATION"].map(str::to_owned).to_vec()
}

/// One process's line in a list.
pub fn line(status: &Status) -> Vec<String> {
    let or_none = |cell: Option<String>| cell.unwrap_or_else(|| "-".to_owned());
    vec![
        status.id.clone(),
        status.role.clone(),
        status.state.clone(),
        report::time(status.in_state_us),
        or_none(status.pages.map(|pages| format!("{} of {}", pages.left, pages.total))),
        or_none(status.checkpoints.as_ref().and_then(|known| known.commit_age_us).map(report::time)),
        or_none(status.peer.clone()),
        or_none(status.migration.clone()),
    ]
}

/// p50, p99 and the longest of a distribution.
fn distribution(of: &Distribution) -> String {
    let time = |ns: u64| report::time(ns / 1000);
    format!("p50 {}, p99 {}, max {} of {}", time(of.p50_ns), time(of.p99_ns), time(of.max_ns), of.count)
}

/// Everything, a fact a line.
pub fn page(status: &Status) -> String {
    let mut rows: Vec<(&str, String)> = Vec::new();
    let mut row = |name, text: String| rows.push((name, text));
    let time = report::time;
    row("id", format!("{} ({}, process {})", status.id, status.role, status.pid));
    let because = if status.why.is_empty() { String::new() } else { format!(": {}", status.why) };
    row("state", format!("{} for {}{because}", status.state, time(status.in_state_us)));
    if let Some(migration) = &status.migration {
        let epoch = status.owner_epoch.map_or_else(String::new, |epoch| format!(", owner epoch {epoch}"));
        row("migration", format!("{migration}{epoch}"));
    }
    if let Some(peer) = &status.peer {
        let tls = if status.tls == Some(true) { "TLS" } else { "no TLS" };
        row("peer", format!("{peer} over {} ({tls})", status.fabric.as_deref().unwrap_or("?")));
    }
    if let Some(memory) = status.memory_bytes {
        row("memory", report::bytes(memory));
    }
    if let Some(pages) = &status.pages {
        let landed = pages.total - pages.left.min(pages.total);
        let percent = landed * 100 / pages.total.max(1);
        let pulled =
            format!("{} pulled, {}/s", report::bytes(pages.bytes_pulled), report::bytes(pages.bytes_per_second as u64));
        row(
            "pages",
            format!("{} left of {} ({percent} % here, {} of them zero); {pulled}", pages.left, pages.total, pages.zero),
        );
        row("faults", format!("{} served, {} of them by a read", pages.faults, pages.demand_reads));
    }
    if let Some(latency) = &status.fault_latency {
        row("fault latency", distribution(latency));
    }
    if let Some(known) = &status.checkpoints {
        let age = known.commit_age_us.map_or_else(String::new, |age| format!(", {} old", time(age)));
        let folded = known.folded_epoch.map_or_else(String::new, |epoch| format!(", {epoch} folded"));
        row("checkpoint", format!("{} committed{age}{folded}; {} pages in all", known.committed_epoch, known.pages));
        if let Some(rate) = known.dirty_pages_per_second {
            row("dirty rate", format!("{rate:.0} pages/s"));
        }
        if let Some(pause) = &known.pause {
            row("pause", distribution(pause));
        }
        if known.held_back_us > 0 {
            row("held back", format!("{}: the guest writes more than the link carries", time(known.held_back_us)));
        }
        if let Some(age) = &known.age_at_commit {
            row("commit age", distribution(age));
        }
    }
    if let Some(output) = &status.output {
        let failed = if output.failed_emissions > 0 {
            format!(", {} tries failed", output.failed_emissions)
        } else {
            String::new()
        };
        let held = format!("{} packets held ({})", output.held_packets, report::bytes(output.held_bytes));
        row("output", format!("{held}, {} sent{failed}", output.sent_packets));
        if let Some(delay) = &output.delay {
            row("output delay", distribution(delay));
        }
    }
    if let Some(left) = status.lease_left_us {
        row("lease left", if left == 0 { "none: it has run out".to_owned() } else { time(left) });
    }
    if let Some(blackout) = status.blackout_us {
        row("blackout", time(blackout));
    }
    if let Some(turned) = status.loop_turned_us.filter(|&turned| turned > 1_000_000 && is_under_way(status)) {
        row("attention", format!("its loop has not turned for {}: it is in the middle of a step", time(turned)));
    }
    if let Some(error) = &status.last_error {
        row("last error", format!("{} ago: {}", time(error.ago_us), error.what));
        if !error.advice.is_empty() {
            row("", error.advice.clone());
        }
        for seen in &error.story {
            if let Some(sentence) = report::sentence(&seen.kind) {
                let first = sentence.lines().next().unwrap_or_default();
                row("  led to it", format!("{}  {first}", seen.id.0));
            }
        }
    }
    let lines = rows.into_iter().map(|(name, text)| format!("{name:14} {}\n", report::printable(&text)));
    lines.collect()
}

/// Whether a role runs its loop in this state.
fn is_under_way(status: &Status) -> bool {
    [
        "switching",
        "serving",
        "revoking",
        "awaiting-operator",
        "awaiting-fence",
        "cannot-revoke",
        "catch-stuck",
        "preparing",
        "tethered",
        "fenced",
    ]
    .contains(&&*status.state)
}
