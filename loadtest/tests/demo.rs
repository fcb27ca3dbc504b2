//! The demo driver leaves nothing behind, and says what is wrong.
//!
//! WALlaby's own programs are stood in for by a process that only waits: these tests are about what the driver starts and ends.
//! The story itself is `make demo`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use wallaby_testkit::Seeded;

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// A folder with programs that run `script`.
    fn with_programs(script: &str) -> Place {
        let folder = tempfile::tempdir().unwrap();
        for name in ["wallaby-controller", "wallaby-worker", "wallaby"] {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Place { folder }
    }

    fn demo_folder(&self) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join("demo")
    }

    fn start(&self) -> Child {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        Command::new(env!("CARGO_BIN_EXE_wallaby-demo"))
            .arg("--folder")
            .arg(self.demo_folder())
            .arg("--programs")
            .arg(self.folder.path())
            .arg("--flow")
            .arg(root.join("examples/shop/flow.yaml"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Everything that works in the demo's folder.
    fn processes(&self) -> Vec<String> {
        let demo = self.demo_folder();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let here = entries
            .filter(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&demo)));
        let name = |entry: std::fs::DirEntry| {
            let line = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            line.replace('\0', " ")
        };
        here.map(name).filter(|line| !line.is_empty()).collect()
    }

    async fn wait_for(&self, what: &str, is_so: impl Fn(&[String]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let processes = self.processes();
            if is_so(&processes) {
                return;
            }
            assert!(Instant::now() < deadline, "waited for {what}; there are {processes:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Two Postgres, three NATS, etcd, and three programs of ours that wait.
    async fn wait_until_all_run(&self) {
        let count = |lines: &[String], what: &str| lines.iter().filter(|line| line.contains(what)).count();
        self.wait_for("everything to run", |lines| {
            count(lines, "nats-server") == 3 && count(lines, "etcd ") == 1 && count(lines, "sleep 1000") == 3
        })
        .await;
    }
}

fn signal(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[tokio::test]
async fn ctrl_c_leaves_no_process_behind_and_a_second_start_is_refused() {
    let place = Place::with_programs("exec sleep 1000");
    let first = place.start();
    place.wait_until_all_run().await;
    let second = place.start().wait_with_output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(said(&second).contains(&format!("is in use by process {}", first.id())), "{}", said(&second));
    signal(&first, "-INT");
    let output = first.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", said(&output));
    assert_eq!(place.processes(), Vec::<String>::new(), "all is gone when the driver is");
}

/// Wherever it is on its way: before it listens for the signal, while servers start, while it waits for its programs.
#[tokio::test]
async fn ctrl_c_at_any_moment_leaves_no_process_behind() {
    let place = Place::with_programs("exec sleep 1000");
    let mut rng = StdRng::seeded();
    for _ in 0..5 {
        let delay = Duration::from_millis(rng.random_range(0..3_000));
        let driver = place.start();
        tokio::time::sleep(delay).await;
        signal(&driver, "-INT");
        let output = driver.wait_with_output().unwrap();
        let (code, by_signal) = (output.status.code(), output.status.signal());
        let is_interrupted = code == Some(130) || by_signal == Some(2);
        assert!(is_interrupted, "SIGINT after {delay:?}: {}: {}", output.status, said(&output));
        assert_eq!(place.processes(), Vec::<String>::new(), "SIGINT after {delay:?}: {}", said(&output));
    }
}

#[tokio::test]
async fn a_killed_driver_leaves_no_process_behind() {
    let place = Place::with_programs("exec sleep 1000");
    let mut driver = place.start();
    place.wait_until_all_run().await;
    driver.kill().unwrap();
    driver.wait().unwrap();
    place.wait_for("nothing to run", <[String]>::is_empty).await;
}

#[test]
fn a_program_that_dies_is_named_with_its_last_words() {
    let place = Place::with_programs("echo the last words; exit 7");
    let output = place.start().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = said(&output);
    assert!(said.contains("ended (exit code 7)") && said.contains("the last words"), "{said}");
    assert_eq!(place.processes(), Vec::<String>::new());
}

#[test]
fn missing_programs_are_named_with_the_remedy() {
    let place = Place::with_programs("");
    std::fs::remove_file(place.folder.path().join("wallaby-worker")).unwrap();
    let output = place.start().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = said(&output);
    assert!(said.contains("wallaby-worker is not in") && said.contains("make demo"), "{said}");
}

#[test]
fn a_time_that_no_clock_can_count_is_refused() {
    let seconds = u64::MAX.to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_wallaby-demo"))
        .args(["--programs", "/nowhere", "--seconds", &seconds])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("--seconds"), "{}", said(&output));
}
