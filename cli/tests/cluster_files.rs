//! The files in cluster-configs/ that other programs read: Slurm's scripts and systemd's unit, as these programs would use them.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const BELAY: &str = env!("CARGO_BIN_EXE_belay");

fn cluster_configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster-configs")
}

fn script(name: &str) -> PathBuf {
    cluster_configs().join("slurm").join(name)
}

/// A node of a cluster: programs of its own in PATH, its own /run/belay, and a log of what they were called with.
struct Node {
    directory: tempfile::TempDir,
}

impl Node {
    /// One whose `belay check` prints `says` and ends with `code`.
    fn new(says: &str, code: i32) -> Self {
        let node = Self { directory: tempfile::tempdir().expect("tempdir") };
        std::fs::write(node.path("answer"), says).expect("write");
        let answer = node.path("answer").display().to_string();
        node.program("belay", &format!("[ \"$1 $2\" = 'check --json' ] || exit 99\ncat '{answer}'\nexit {code}"));
        for name in ["scontrol", "logger"] {
            let log = node.path(name).display().to_string();
            node.program(name, &format!("echo \"$*\" >>'{log}.log'"));
        }
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn program(&self, name: &str, body: &str) {
        let bin = self.path("bin");
        std::fs::create_dir_all(&bin).expect("directory");
        let path = bin.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("write");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("mode");
    }

    /// Runs a script as slurmd would, for job 42, which asked for the feature belay.
    fn run(&self, script: &Path, more: &[(&str, &str)]) -> Output {
        let path = format!("{}:/usr/bin:/bin", self.path("bin").display());
        let mut command = Command::new("/bin/sh");
        command.arg(script).env_clear().env("PATH", path).env("SLURM_JOB_ID", "42").env("SLURMD_NODENAME", "n7");
        command.env("SLURM_JOB_CONSTRAINTS", "rack1&belay").env("BELAY_RUN", self.path("run"));
        command.env("BELAY", self.path("bin/belay")).env("BELAY_CHECK_SECONDS", "10");
        command.envs(more.iter().copied()).output().expect("sh runs")
    }

    fn drained(&self) -> Option<String> {
        std::fs::read_to_string(self.path("scontrol.log")).ok()
    }

    fn job_directory(&self) -> PathBuf {
        self.path("run/job-42")
    }
}

/// As `belay check --json` prints it.
fn findings(of: &[(&str, &str, &str)]) -> String {
    let one = |(name, verdict, detail): &(&str, &str, &str)| serde_json::json!({ "name": name, "verdict": verdict, "detail": detail, "mend": ["sudo x \"y\""] });
    let all: Vec<_> = of.iter().map(one).collect();
    format!("{:#}\n", serde_json::json!({ "missing": 0, "findings": all }))
}

/// A node whose first port works and whose second has no cable.
const FINE: &[(&str, &str, &str)] = &[
    ("kvm", "ok", "opens"),
    ("huge pages", "degraded", "none"),
    ("rdma libraries", "ok", "libibverbs 44"),
    ("rdma device", "ok", "mlx5_0: InfiniBand"),
    ("rdma gid", "ok", "mlx5_0 port 1 GID 0: fe80::1 InfiniBand"),
    ("rdma port", "degraded", "mlx5_0 port 2 is \"DOWN\""),
    ("memlock", "ok", "no limit"),
];

#[test]
fn slurm_lets_a_job_onto_a_node_whose_rdma_works_and_gives_it_a_directory() {
    let node = Node::new(&findings(FINE), 0);
    let done = node.run(&script("prolog.sh"), &[("BELAY_IB_DEV", "mlx5_0")]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(node.drained(), None, "a second port without a cable is no fault");
    let mode = std::fs::metadata(node.job_directory()).expect("made").permissions().mode();
    assert_eq!(mode & 0o7777, 0o700);
    let told = node.run(&script("task-prolog.sh"), &[]);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert_eq!(told, format!("export BELAY_RUN_DIR={}\n", node.job_directory().display()));
}

#[test]
fn slurm_drains_a_node_whose_rdma_is_broken_and_says_why() {
    let but = |name: &str, verdict: &str, detail: &str| {
        let others = FINE.iter().filter(|finding| finding.0 != name).copied();
        findings(&others.chain([(name, verdict, detail)]).collect::<Vec<_>>())
    };
    let broken = [
        (but("rdma gid", "degraded", "none"), 0, "belay: rdma port: mlx5_0 port 2 is \"DOWN\""),
        (but("memlock", "degraded", "8192 KiB may be locked"), 0, "belay: memlock: 8192 KiB may be locked"),
        (but("rdma libraries", "degraded", "no libibverbs"), 0, "belay: rdma libraries: no libibverbs"),
        (but("kvm", "missing", "no /dev/kvm"), 3, "belay: kvm: no /dev/kvm"),
        (findings(&[("kvm", "ok", "opens")]), 0, "belay: no RDMA port that can be used was found"),
        ("belay: something else".to_owned(), 1, "belay: check ended with 1: belay: something else"),
    ];
    for (says, code, reason) in &broken {
        let node = Node::new(says, *code);
        let done = node.run(&script("prolog.sh"), &[]);
        assert_eq!(done.status.code(), Some(1), "the job goes back into the queue: {done:?}");
        let expected = format!("update NodeName=n7 State=DRAIN Reason={reason}\n");
        assert_eq!(node.drained().as_deref(), Some(&*expected));
        assert!(!node.job_directory().exists());
    }
}

#[test]
fn slurm_drains_a_node_whose_other_device_works() {
    let node = Node::new(&findings(FINE), 0);
    assert_eq!(node.run(&script("prolog.sh"), &[("BELAY_IB_DEV", "mlx5_1")]).status.code(), Some(1));
    assert!(node.drained().expect("drained").contains("no RDMA port that can be used on mlx5_1"));
}

#[test]
fn slurm_drains_a_node_where_belay_hangs_or_is_not_there() {
    let node = Node::new("", 0);
    node.program("belay", "exec sleep 30");
    assert_eq!(node.run(&script("prolog.sh"), &[("BELAY_CHECK_SECONDS", "0.2")]).status.code(), Some(1));
    assert!(node.drained().expect("drained").contains("no answer within 0.2 s"));
    let node = Node::new("", 0);
    assert_eq!(node.run(&script("prolog.sh"), &[("BELAY", "/nonexistent/belay")]).status.code(), Some(1));
    assert!(node.drained().expect("drained").contains("/nonexistent/belay cannot be run"));
}

#[test]
fn slurm_leaves_jobs_alone_that_did_not_ask_for_belay() {
    for constraints in ["", "rack1", "notbelay", "belay2&gpu"] {
        let node = Node::new("", 1);
        let done = node.run(&script("prolog.sh"), &[("SLURM_JOB_CONSTRAINTS", constraints)]);
        assert!(done.status.success() && node.drained().is_none(), "{constraints:?}: {done:?}");
        let told = node.run(&script("task-prolog.sh"), &[]);
        assert!(told.stdout.is_empty(), "{told:?}");
    }
}

#[test]
fn slurm_reads_what_belay_check_really_prints() {
    let node = Node::new("", 0);
    let checked = Command::new(BELAY).args(["check", "--json"]).output().expect("belay runs");
    let report: serde_json::Value = serde_json::from_slice(&checked.stdout).expect("JSON");
    let is = |finding: &serde_json::Value, name: &str, ok: bool| {
        finding["name"] == name && (finding["verdict"] == "ok") == ok
    };
    let findings = report["findings"].as_array().expect("findings");
    let lacks = |name: &str| findings.iter().find(|finding| is(finding, name, false));
    let missing = findings.iter().find(|finding| finding["verdict"] == "missing");
    let first = missing.or(lacks("rdma libraries")).or(lacks("rdma connections")).or(lacks("memlock"));
    let fit = first.is_none() && findings.iter().any(|finding| is(finding, "rdma gid", true));
    let done = node.run(&script("prolog.sh"), &[("BELAY", BELAY)]);
    assert_eq!((done.status.success(), node.drained().is_none()), (fit, fit), "{done:?}");
    if let (false, Some(reason)) = (fit, node.drained()) {
        // Which of several it is depends on their order; each is told as it was found.
        let told = |finding: &serde_json::Value| {
            let start = finding["detail"].as_str().unwrap_or_default().chars().take(60).collect::<String>();
            reason.contains(&format!("{}: {start}", finding["name"].as_str().unwrap_or_default()))
        };
        assert!(findings.iter().any(told) || reason.contains("was found"), "{reason}");
    }
}

#[test]
fn slurm_removes_a_jobs_directory_and_nothing_else() {
    let node = Node::new("", 0);
    let outside = node.path("precious");
    std::fs::write(&outside, "kept").expect("write");
    std::fs::create_dir_all(node.path("run/job-421")).expect("another job's");
    std::fs::create_dir_all(node.job_directory().join("pages")).expect("the job's");
    std::os::unix::fs::symlink(&outside, node.job_directory().join("link")).expect("link");
    std::os::unix::fs::symlink(node.directory.path(), node.job_directory().join("pages/up")).expect("link");
    let done = node.run(&script("epilog.sh"), &[]);
    assert!(done.status.success(), "{done:?}");
    assert!(!node.job_directory().exists());
    assert!(outside.exists() && node.path("run/job-421").exists(), "only what is the job's goes");
    // Nothing there: nothing to do.
    assert!(node.run(&script("epilog.sh"), &[]).status.success());
}

#[test]
fn slurm_removes_nothing_through_a_link_without_a_job_or_under_a_process_that_still_runs() {
    let node = Node::new("", 0);
    let elsewhere = node.path("elsewhere");
    std::fs::create_dir_all(&elsewhere).expect("directory");
    std::fs::create_dir_all(node.path("run")).expect("directory");
    std::os::unix::fs::symlink(&elsewhere, node.job_directory()).expect("link");
    assert_eq!(node.run(&script("epilog.sh"), &[]).status.code(), Some(1));
    assert!(elsewhere.exists());
    for job in ["", "../..", "4 2", "*"] {
        assert_eq!(node.run(&script("epilog.sh"), &[("SLURM_JOB_ID", job)]).status.code(), Some(1), "{job:?}");
    }
    std::fs::remove_file(node.job_directory()).expect("the link");
    std::fs::create_dir(node.job_directory()).expect("directory");
    // A belay of job 42 and a belay of another job, as /proc shows them.
    let proc = node.path("proc");
    let process = |pid: &str, job: &str| {
        std::fs::create_dir_all(proc.join(pid)).expect("directory");
        std::os::unix::fs::symlink("/usr/bin/belay", proc.join(pid).join("exe")).expect("link");
        std::fs::write(proc.join(pid).join("environ"), format!("A=1\0SLURM_JOB_ID={job}\0B=2\0")).expect("write");
    };
    process("700", "42");
    let with_proc = [("BELAY_PROC", proc.to_str().expect("UTF-8"))];
    assert_eq!(node.run(&script("epilog.sh"), &with_proc).status.code(), Some(1));
    assert!(node.job_directory().exists());
    std::fs::remove_dir_all(proc.join("700")).expect("it ended");
    process("701", "43");
    assert!(node.run(&script("epilog.sh"), &with_proc).status.success());
    assert!(!node.job_directory().exists());
}

/// Runs a checker, or says that this machine lacks it.
fn checked(program: &str, arguments: &[&str]) -> Option<Output> {
    match Command::new(program).args(arguments).output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: {program} is not installed");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

#[test]
fn shellcheck_finds_nothing_in_the_slurm_scripts() {
    let scripts = ["prolog.sh", "epilog.sh", "task-prolog.sh"].map(script);
    let paths: Vec<_> = scripts.iter().map(|path| path.to_str().expect("UTF-8")).collect();
    if let Some(output) = checked("shellcheck", &paths) {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    for path in &scripts {
        assert_ne!(std::fs::metadata(path).expect("there").permissions().mode() & 0o111, 0, "{path:?} can be run");
    }
}

#[test]
fn systemd_takes_the_unit_as_it_is_and_rates_its_exposure_low() {
    let text = std::fs::read_to_string(cluster_configs().join("systemd/belay@.service")).expect("the unit");
    let directory = tempfile::tempdir().expect("tempdir");
    let unit = directory.path().join("belay@there.service");
    // Installed elsewhere; all else is as it is.
    std::fs::write(&unit, text.replace("/usr/bin/belay ", &format!("{BELAY} "))).expect("write");
    let unit = unit.to_str().expect("UTF-8");
    let Some(verified) = checked("systemd-analyze", &["verify", unit]) else { return };
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    // Warnings about other units of this machine are not ours.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("belay@there.service")).collect();
    assert!(verified.status.success() && ours.is_empty(), "{said}");
    // 0 is nothing exposed, 10 everything; a unit without hardening has 9.6. The threshold is in tenths.
    let rated = checked("systemd-analyze", &["security", "--offline=true", "--threshold=20", "--no-pager", unit]);
    let rated = rated.expect("it was there a moment ago");
    assert!(rated.status.success(), "{}", String::from_utf8_lossy(&rated.stdout));
}

#[test]
fn the_units_command_line_is_one_that_belay_takes() {
    let text = std::fs::read_to_string(cluster_configs().join("systemd/belay@.service")).expect("the unit");
    let line = text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/belay ")).expect("ExecStart");
    let directory = tempfile::tempdir().expect("tempdir");
    let place = directory.path().to_str().expect("UTF-8");
    let profile = cluster_configs().join("plain-tcp.toml");
    let line =
        line.replace("/etc/belay/%i.toml", profile.to_str().expect("UTF-8")).replace("%d/", &format!("{place}/"));
    let line = line.replace("%t", place).replace("%i", "there").replace("$BELAY_ARGS", "--listen 127.0.0.1:0 --json");
    let output = Command::new(BELAY).args(line.split_whitespace()).output().expect("belay runs");
    // The certificates are not there, which is the first thing it says once it has understood everything else.
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains(&format!("{place}/cert")) && said.contains("belay keygen"), "{said}");
}

#[test]
fn the_units_restart_rules_are_about_exit_codes_there_are() {
    let text = std::fs::read_to_string(cluster_configs().join("systemd/belay@.service")).expect("the unit");
    let help = Command::new(BELAY).arg("--help").output().expect("belay runs");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let table = help.split("Exit codes:").nth(1).expect("the table").to_owned();
    let known: Vec<_> = table.split_whitespace().filter_map(|word| word.parse::<u8>().ok()).collect();
    for key in ["RestartPreventExitStatus=", "SuccessExitStatus="] {
        let codes = text.lines().find_map(|line| line.strip_prefix(key)).expect("the rule");
        for code in codes.split_whitespace() {
            assert!(known.contains(&code.parse().expect("a number")), "{key}{code} is not in the table:\n{table}");
        }
    }
}
