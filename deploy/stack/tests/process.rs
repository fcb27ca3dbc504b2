//! Supervised processes: nothing survives what should end it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, test_kill_process};
use wallaby_stack::{Error, Folder, FolderLock, PortLease, Process, ProcessSpec};

fn shell(folder: &Folder, script: &str) -> ProcessSpec {
    ProcessSpec::new("shell", "/bin/sh", folder.path()).args(["-c", script])
}

/// Runs, as far as the process table says; a zombie that nobody collects does not.
fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    test_kill_process(Pid::from_raw(pid).unwrap()).is_ok() && !stat.contains(") Z ")
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn pid_in(folder: &Folder, file: &str) -> i32 {
    let path = folder.path().join(file);
    until(file, || std::fs::read_to_string(&path).is_ok_and(|text| text.ends_with('\n'))).await;
    std::fs::read_to_string(&path).unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn a_kill_takes_descendants_in_other_sessions_with_it() {
    let folder = Folder::temporary("process").unwrap();
    // The grandchild leads a session of its own, as Postgres backends do.
    let process = Process::spawn(&shell(&folder, "setsid sh -c 'echo $$ >pid; exec sleep 100' & wait")).unwrap();
    let grandchild = pid_in(&folder, "pid").await;
    assert!(runs(process.pid()) && runs(grandchild));
    process.kill().await.unwrap();
    assert!(!runs(process.pid()) && !runs(grandchild));
    assert_eq!(process.exit().unwrap().signal, Some(Signal::KILL.as_raw()));
}

#[tokio::test]
async fn a_drop_takes_descendants_with_it() {
    let folder = Folder::temporary("process").unwrap();
    let process = Process::spawn(&shell(&folder, "setsid sh -c 'echo $$ >pid; exec sleep 100' & wait")).unwrap();
    let (pid, grandchild) = (process.pid(), pid_in(&folder, "pid").await);
    drop(process);
    assert!(!runs(pid) && !runs(grandchild));
}

#[tokio::test]
async fn a_paused_process_stands_and_goes_on() {
    let folder = Folder::temporary("process").unwrap();
    let process =
        Process::spawn(&shell(&folder, "echo $$ >pid; while :; do echo x >>beats; sleep 0.01; done")).unwrap();
    pid_in(&folder, "pid").await;
    let beats = || std::fs::metadata(folder.path().join("beats")).map_or(0, |file| file.len());
    until("the first beat", || beats() > 0).await;
    process.pause().await.unwrap();
    let before = beats();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(beats(), before, "a paused process wrote");
    process.resume();
    until("a beat after the pause", || beats() > before).await;
}

#[tokio::test]
async fn one_that_does_not_stop_is_killed() {
    let folder = Folder::temporary("process").unwrap();
    let process = Process::spawn(&shell(&folder, "trap '' TERM; echo $$ >pid; while :; do sleep 0.01; done")).unwrap();
    pid_in(&folder, "pid").await;
    let exit = process.stop(Signal::TERM, Duration::from_millis(100)).await.unwrap();
    assert_eq!(exit.signal, Some(Signal::KILL.as_raw()));
    let process =
        Process::spawn(&shell(&folder, "trap 'exit 3' TERM; echo $$ >pid2; while :; do sleep 0.01; done")).unwrap();
    pid_in(&folder, "pid2").await;
    let exit = process.stop(Signal::TERM, Duration::from_secs(20)).await.unwrap();
    assert_eq!(exit.code, Some(3));
}

#[tokio::test]
async fn its_last_words_are_kept() {
    let folder = Folder::temporary("process").unwrap();
    let process = Process::spawn(&shell(&folder, "seq 1 5; echo oops >&2; exit 7")).unwrap();
    assert_eq!(process.wait().await.code, Some(7));
    assert_eq!(process.log_tail(3).0, ["4", "5", "oops"]);
    assert!(process.pause().await.is_err(), "a fault that cannot land is an error");
}

#[test]
fn a_folder_has_one_owner() {
    let folder = Folder::temporary("lock").unwrap();
    let path = folder.path().join("state");
    let lock = FolderLock::acquire(&path).unwrap();
    let error = FolderLock::acquire(&path).unwrap_err();
    assert!(
        matches!(&error, Error::FolderInUse { holder, .. } if *holder == std::process::id().to_string()),
        "{error}"
    );
    drop(lock);
    FolderLock::acquire(&path).unwrap();
}

#[test]
fn ports_are_given_once() {
    let leases: Vec<_> = (0..50).map(|_| PortLease::free().unwrap()).collect();
    let ports: std::collections::BTreeSet<_> = leases.iter().map(PortLease::port).collect();
    assert_eq!(ports.len(), leases.len());
}
