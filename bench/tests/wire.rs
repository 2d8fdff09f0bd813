//! `belay-bench wire` between two processes, over TCP: what it measures is moved, checked and reported.

use belay_transport::session::keygen;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};

const BENCH: &str = env!("CARGO_BIN_EXE_belay-bench");

/// A server, killed when a test fails.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(options: &[&str]) -> Self {
        let mut command = Command::new(BENCH);
        command.args(["wire", "--listen", "127.0.0.1:0", "--idle", "20s"]).args(options);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the server starts");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("a line");
        let address = line.trim().strip_prefix("listening on ").expect("it says where it listens").to_owned();
        Self { child, address }
    }

    fn measure(&self, options: &[&str]) -> Output {
        let mut command = Command::new(BENCH);
        command.args(["wire", "--to", &self.address, "-F", "--out-json", "-"]).args(options);
        if !options.contains(&"--memory") {
            command.args(["--memory", "4M"]);
        }
        command.output().expect("the client runs")
    }

    fn report(&self, options: &[&str]) -> Value {
        let output = self.measure(options);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON alone on stdout")
    }

    /// Waits for its end: whether it ended well, and what it said.
    fn end(mut self) -> (bool, String) {
        let (mut said, mut stderr) = (String::new(), self.child.stderr.take().expect("piped"));
        stderr.read_to_string(&mut said).expect("text");
        (self.child.wait().expect("it ends").success(), said)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn userfaultfd() -> bool {
    use belay_transport::uffd::{Features, OpenMode, Uffd};
    let there = Uffd::open(OpenMode::All, Features::MINOR_SHMEM).is_ok();
    if !there {
        eprintln!("skipped: no userfaultfd that holds faults of the kernel's (root, or access to /dev/userfaultfd)");
    }
    there
}

#[test]
fn every_raw_test_moves_what_it_says_and_the_source_says_what_that_cost_it() {
    let server = Server::start(&["--clients", "1"]);
    let report =
        server.report(&["read-lat", "read-bw", "write-bw", "commit-lat", "-s", "512,64K", "-n", "50", "-t", "16"]);
    let tests = report["tests"].as_array().expect("tests");
    let names: Vec<_> = tests.iter().map(|test| test["test"].as_str().unwrap()).collect();
    assert_eq!(names, ["read-lat", "read-bw", "write-bw", "commit-lat"]);
    for test in tests {
        assert_eq!(test["fabric"], "tcp");
        let rows = [&test["latency"], &test["bandwidth"]].map(|rows| rows.as_array().unwrap());
        let rows: Vec<_> = rows.into_iter().flatten().collect();
        let sizes: Vec<_> = rows.iter().map(|row| (row["bytes"].as_u64(), row["iterations"].as_u64())).collect();
        assert_eq!(sizes, [(Some(512), Some(50)), (Some(65536), Some(50))]);
        for row in rows {
            let figure = row.get("t_typical_us").or(row.get("average_bytes_per_s")).and_then(Value::as_f64);
            assert!(figure.is_some_and(|figure| figure > 0.0), "{row}");
        }
        // Over tcp the owner's thread does the work, so the source cannot have done nothing.
        for used in test["source"].as_array().unwrap() {
            assert!(used["usage"]["process"]["cpu_ns"].as_u64().is_some_and(|ns| ns > 0), "{used}");
        }
    }
    let (well, said) = server.end();
    assert!(well && said.contains("4 measurements"), "{said}");
}

#[test]
fn uffd_faults_and_pulls_over_the_wire_are_right_and_are_reported_with_their_bounds() {
    if !userfaultfd() {
        return;
    }
    let server = Server::start(&["--clients", "1"]);
    let report = server.report(&["fault", "pull", "cpu", "-n", "100", "--rounds", "1"]);
    let ratio = |test: usize, name: &str| {
        let ratios = report["tests"][test]["ratios"].as_array().expect("ratios");
        let found = ratios.iter().find(|ratio| ratio["name"] == name).expect("a ratio of that name");
        found["value"].as_f64().expect("a number")
    };
    assert!(ratio(0, "fault_over_read_and_uffd") > 0.0);
    assert!(ratio(1, "pull_over_reads") > 0.0);
    // What a page costs is a difference of two small times, and may come out below nothing; what both took may not.
    assert!(ratio(2, "source_cpu_ns_per_page").is_finite());
    let took = |at: usize| report["tests"][2]["source"][at]["usage"]["process"]["cpu_ns"].as_u64().expect("ns");
    assert!(took(1) > 0 && took(2) > 0, "tcp costs the source CPU, and this would show it");
    let pages: Vec<_> = report["tests"][2]["source"].as_array().unwrap().iter().map(|u| &u["operations"]).collect();
    assert_eq!(pages, [0, 256, 1024]);
    assert!(server.end().0);
}

#[test]
fn a_server_goes_on_after_a_stranger_and_after_a_client_that_died() {
    let server = Server::start(&["--clients", "3"]);
    let mut stranger = TcpStream::connect(&server.address).expect("connects");
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sends");
    let mut dies = TcpStream::connect(&server.address).expect("connects");
    // Nobody listens at that port: the server is told to dial, and the client is gone.
    dies.write_all(b"belay-bench 1 dial 1\n").expect("sends");
    drop(dies);
    server.report(&["read-lat", "-n", "10"]);
    let (well, said) = server.end();
    assert!(well, "{said}");
    assert!(said.contains("not a belay-bench") && said.contains("1 measurements"), "{said}");
}

#[test]
fn what_cannot_be_had_is_said_before_anything_is_moved() {
    let server = Server::start(&["--clients", "2"]);
    let refused = |options: &[&str], words: &str| {
        let output = server.measure(options);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(words), "{options:?}: {said}");
    };
    refused(&["read-lat", "--fabric", "verbs"], "--trusted-fabric");
    refused(&["read-bw", "-s", "32M"], "--size");
    refused(&["pull", "--memory", "16G"], "not to be had");
    let (well, said) = server.end();
    assert!(well && said.contains("not to be had"), "{said}");
}

#[test]
fn with_certificates_both_sides_prove_themselves_and_a_stranger_s_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["server", "client", "stranger"] {
        keygen(dir.path(), name).expect("keys");
    }
    let path = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    let who = |own: &str, peer: &str| {
        [
            "--cert".to_owned(),
            path(&format!("{own}.crt")),
            "--key".into(),
            path(&format!("{own}.key")),
            "--peer-cert".into(),
            path(&format!("{peer}.crt")),
        ]
    };
    fn borrowed(options: &[String]) -> Vec<&str> {
        options.iter().map(String::as_str).collect()
    }
    let server_is = who("server", "client");
    let server = Server::start(&[&borrowed(&server_is)[..], &["--clients", "2"]].concat());
    let stranger_is = who("stranger", "server");
    let output = server.measure(&[&borrowed(&stranger_is)[..], &["read-lat", "-n", "10"]].concat());
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let client_is = who("client", "server");
    let report = server.report(&[&borrowed(&client_is)[..], &["read-lat", "-n", "10"]].concat());
    assert_eq!(report["tests"][0]["encrypted"], true);
    assert!(server.end().0);
}
