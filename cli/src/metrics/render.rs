//! A status in Prometheus' text exposition format, version 0.0.4: base units, a HELP and a TYPE for each name.
//!
//! Where a figure means what QEMU's `query-migrate` means by a name, it has that name here: `postcopy-latency` is the mean of
//! `belay_postcopy_latency_seconds`, `postcopy-latency-dist` its buckets (powers of two of a microsecond), `postcopy-requests` counts
//! the reads that faults asked for. `postcopy-vcpu-latency` and `postcopy-blocktime` are not here: a fault is not known by its vCPU.

use belay_vmm_glue::migrate::status::{Distribution, Status};
use std::fmt::{Display, Write};

/// What Prometheus is told the text is.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// States a role can be in, by its name in `belay status`.
pub const STATES: [&str; 20] = [
    "starting",
    "filling",
    "listening",
    "running",
    "switching",
    "serving",
    "revoking",
    "awaiting-operator",
    "awaiting-fence",
    "cannot-revoke",
    "catch-stuck",
    "released",
    "lost",
    "preparing",
    "tethered",
    "fenced",
    "owner",
    "aborted",
    "retired",
    "ended",
];

struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: Option<impl Display>) {
        let Some(value) = value else { return };
        self.head(name, kind, help);
        let _ = writeln!(self.0, "{name} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: Option<impl Display>) {
        self.one(name, "gauge", help, value);
    }

    fn counter(&mut self, name: &str, help: &str, value: Option<u64>) {
        self.one(name, "counter", help, value);
    }

    fn seconds(&mut self, name: &str, help: &str, us: Option<u64>) {
        self.gauge(name, help, us.map(|us| us as f64 / 1e6));
    }

    fn seconds_total(&mut self, name: &str, help: &str, us: Option<u64>) {
        self.one(name, "counter", help, us.map(|us| us as f64 / 1e6));
    }

    fn histogram(&mut self, name: &str, help: &str, of: Option<&Distribution>) {
        let Some(of) = of else { return };
        self.head(name, "histogram", help);
        let mut below = 0;
        let (_, closed) = of.buckets.split_last().unwrap_or((&0, &[]));
        for (power, count) in closed.iter().enumerate() {
            below += count;
            let le = (1_u64 << (power + 1)) as f64 / 1e6;
            let _ = writeln!(self.0, "{name}_bucket{{le=\"{le}\"}} {below}");
        }
        let _ = writeln!(self.0, "{name}_bucket{{le=\"+Inf\"}} {}", of.count);
        let _ = writeln!(self.0, "{name}_sum {}\n{name}_count {}", of.sum_ns as f64 / 1e9, of.count);
    }
}

/// A label's value; what a peer may have said is in some.
fn label(text: &str) -> String {
    text.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}

/// The whole text.
pub fn text(status: &Status) -> String {
    let mut out = Text(String::with_capacity(8192));
    out.head("belay_info", "gauge", "Which process this is; always 1.");
    let or_none = |text: &Option<String>| label(text.as_deref().unwrap_or(""));
    let _ = writeln!(
        out.0,
        "belay_info{{id=\"{}\",role=\"{}\",migration=\"{}\",fabric=\"{}\",version=\"{}\"}} 1",
        label(&status.id),
        label(&status.role),
        or_none(&status.migration),
        or_none(&status.fabric),
        env!("CARGO_PKG_VERSION")
    );
    out.head("belay_state", "gauge", "1 for the state this role is in, 0 for every other.");
    for state in STATES {
        let _ = writeln!(out.0, "belay_state{{state=\"{state}\"}} {}", u8::from(status.state == state));
    }
    out.seconds("belay_state_age_seconds", "Time since that state was entered.", Some(status.in_state_us));
    out.seconds("belay_up_seconds", "Time since this process began.", Some(status.up_us));
    out.seconds(
        "belay_loop_age_seconds",
        "Time since the role's loop last turned; large: it stands still.",
        status.loop_turned_us,
    );
    out.gauge("belay_owner_epoch", "Owners the guest has had: each revocation adds one.", status.owner_epoch);
    out.gauge("belay_memory_bytes", "Guest RAM.", status.memory_bytes);
    out.seconds("belay_lease_left_seconds", "How long the lease last granted still lasts.", status.lease_left_us);
    out.seconds("belay_blackout_seconds", "What the guest went without at the switch.", status.blackout_us);
    let pages = status.pages.as_ref();
    out.gauge("belay_pages", "Frames of guest RAM.", pages.map(|pages| pages.total));
    out.gauge("belay_pages_left", "Frames that have not landed.", pages.map(|pages| pages.left));
    out.gauge("belay_pages_zero", "Frames that were zero and never read.", pages.map(|pages| pages.zero));
    out.counter("belay_pulled_bytes_total", "Bytes read from the source.", pages.map(|pages| pages.bytes_pulled));
    out.counter("belay_faults_total", "Fault events handled, of every kind.", pages.map(|pages| pages.faults));
    out.counter(
        "belay_postcopy_requests_total",
        "Reads that a fault asked for (QEMU: postcopy-requests).",
        pages.map(|pages| pages.demand_reads),
    );
    out.histogram(
        "belay_postcopy_latency_seconds",
        "Fault read from the userfaultfd to page shown (QEMU: postcopy-latency, postcopy-latency-dist).",
        status.fault_latency.as_ref(),
    );
    let known = status.checkpoints.as_ref();
    out.gauge(
        "belay_checkpoint_epoch",
        "Newest checkpoint that has committed.",
        known.map(|known| known.committed_epoch),
    );
    out.gauge(
        "belay_checkpoint_folded_epoch",
        "Newest checkpoint in the source's RAM.",
        known.and_then(|known| known.folded_epoch),
    );
    out.counter("belay_checkpoints_total", "Checkpoints committed.", known.map(|known| known.commits));
    out.counter("belay_checkpoint_pages_total", "Pages in them.", known.map(|known| known.pages));
    out.counter(
        "belay_checkpoint_bytes_total",
        "Bytes of them.",
        known.filter(|_| status.role == "destination").map(|known| known.bytes),
    );
    out.seconds(
        "belay_checkpoint_age_seconds",
        "How old the newest committed checkpoint is: what a catch now would lose.",
        known.and_then(|known| known.commit_age_us),
    );
    out.gauge(
        "belay_dirty_pages_per_second",
        "Pages that checkpoints found written, over the last second.",
        known.and_then(|known| known.dirty_pages_per_second),
    );
    out.histogram(
        "belay_checkpoint_pause_seconds",
        "How long a checkpoint stopped the guest.",
        known.and_then(|known| known.pause.as_ref()),
    );
    out.histogram(
        "belay_checkpoint_commit_age_seconds",
        "How old a checkpoint was when it had committed.",
        known.and_then(|known| known.age_at_commit.as_ref()),
    );
    out.seconds_total(
        "belay_guest_held_back_seconds_total",
        "How long the guest was held back because it wrote more than the link carried.",
        known.filter(|_| status.role == "destination").map(|known| known.held_back_us),
    );
    let output = status.output.as_ref();
    out.gauge("belay_output_held_packets", "Packets that may not leave yet.", output.map(|output| output.held_packets));
    out.gauge("belay_output_held_bytes", "Bytes of them.", output.map(|output| output.held_bytes));
    out.counter(
        "belay_output_sent_packets_total",
        "Packets the world has taken.",
        output.map(|output| output.sent_packets),
    );
    out.counter(
        "belay_output_failed_emissions_total",
        "Tries to show a packet that failed.",
        output.map(|output| output.failed_emissions),
    );
    out.histogram(
        "belay_output_delay_seconds",
        "Packet emitted by the guest to packet taken by the world.",
        output.and_then(|output| output.delay.as_ref()),
    );
    out.seconds(
        "belay_last_error_age_seconds",
        "Time since something last failed; `belay status` tells what.",
        status.last_error.as_ref().map(|error| error.ago_us),
    );
    out.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use belay_vmm_glue::migrate::status::{BUCKETS, Checkpoints, Output, Pages};
    use std::collections::HashSet;

    fn full() -> Status {
        let mut buckets = vec![0; BUCKETS];
        (buckets[0], buckets[3], buckets[BUCKETS - 1]) = (2, 5, 1);
        let some = Distribution {
            count: 8,
            sum_ns: 12_345_678,
            p50_ns: 9000,
            p99_ns: 20_000_000,
            max_ns: 20_000_000,
            buckets,
        };
        Status {
            id: "v\"m\n".into(),
            role: "destination".into(),
            state: "tethered".into(),
            pages: Some(Pages { total: 100, left: 40, bytes_pulled: 4096, ..Pages::default() }),
            checkpoints: Some(Checkpoints {
                commit_age_us: Some(1500),
                pause: Some(some.clone()),
                ..Checkpoints::default()
            }),
            output: Some(Output { delay: Some(some.clone()), ..Output::default() }),
            fault_latency: Some(some),
            lease_left_us: Some(999_000),
            ..Status::default()
        }
    }

    #[test]
    fn every_line_is_of_the_format_and_every_name_has_help_and_type_before_it() {
        let text = text(&full());
        let (mut helped, mut typed, mut samples) = (HashSet::new(), HashSet::new(), HashSet::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                assert!(helped.insert(rest.split(' ').next().unwrap()), "twice: {line}");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(helped.contains(name) && ["gauge", "counter", "histogram"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                typed.insert(name);
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                assert!(samples.insert(series), "twice: {line}");
                assert!(value.parse::<f64>().is_ok(), "{line}");
                let name = series.split('{').next().unwrap();
                let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
                assert!(typed.contains(name) || base.is_some_and(|base| typed.contains(base)), "{line}");
            }
        }
        assert!(text.contains("belay_info{id=\"v\\\"m\\n\",") && text.ends_with('\n'), "{text}");
    }

    #[test]
    fn a_histogram_grows_and_ends_in_its_count() {
        let text = text(&full());
        let of = |line: &&str| line.starts_with("belay_postcopy_latency_seconds_bucket");
        let counts: Vec<u64> =
            text.lines().filter(of).map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        assert_eq!(counts.len(), BUCKETS);
        assert!(counts.is_sorted() && counts[0] == 2 && counts[3] == 7 && counts[BUCKETS - 1] == 8, "{counts:?}");
        assert!(text.contains("belay_postcopy_latency_seconds_bucket{le=\"0.000002\"} 2\n"), "{text}");
        assert!(text.contains("\nbelay_postcopy_latency_seconds_sum 0.012345678\n"));
    }

    #[test]
    fn what_is_not_known_is_left_out_and_not_said_to_be_zero() {
        let text = text(&Status { state: "listening".into(), ..Status::default() });
        for absent in ["belay_pages", "belay_checkpoint", "belay_output", "belay_lease_left", "belay_postcopy"] {
            assert!(!text.contains(&format!("\n{absent}")), "{absent} in {text}");
        }
        assert!(
            text.contains("belay_state{state=\"listening\"} 1\n") && text.contains("belay_state{state=\"fenced\"} 0\n")
        );
    }
}
