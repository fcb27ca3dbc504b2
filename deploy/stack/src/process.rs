//! One supervised child process: leader of its own process group, output in a log file, gone when the value is dropped.

use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use tokio::sync::watch;

use crate::error::LogTail;
use crate::process_tree::{Member, descendants, member};
use crate::{Error, Result, reaper};

/// Longest wait for a process to be gone after SIGKILL. It takes milliseconds, unless the process hangs in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// Longest wait for a process to end by its own signal when it is dropped.
const END_DEADLINE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(5);
/// How much of a log's end is read to find its last lines, in bytes.
const LOG_TAIL_BYTES: u64 = 64 << 10;

/// How to start a process.
#[derive(Debug, Clone)]
pub struct ProcessSpec {
    /// What it is called in messages.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables added to our own environment.
    pub env: Vec<(String, String)>,
    /// Where it runs.
    pub folder: PathBuf,
    /// Where its output is appended.
    pub log: PathBuf,
    /// A signal that makes the program end at once together with its own children. Tried before SIGKILL when the value is dropped: a
    /// parent that is killed leaves its children to the system, which on some machines never collects them.
    pub end_signal: Option<Signal>,
    /// The program refuses to run as root: if we are root, it runs under our own user, seen from inside as an ordinary one.
    pub refuses_root: bool,
}

impl ProcessSpec {
    /// A program that runs in `folder` and logs to `<folder>/<name>.log`.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>, folder: impl Into<PathBuf>) -> Self {
        let (name, folder) = (name.into(), folder.into());
        let log = folder.join(format!("{name}.log"));
        Self {
            name,
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            folder,
            log,
            end_signal: None,
            refuses_root: false,
        }
    }

    /// With these arguments.
    pub fn args<A: Into<String>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// The program and its arguments, behind `unshare` where root has to be hidden: a user namespace in which our own user has the
    /// number 1000. Unlike a change of user it keeps the owner of files, so it works in folders that only we may enter.
    pub(crate) fn command(&self) -> Vec<String> {
        let mut command = Vec::new();
        if self.refuses_root && rustix::process::geteuid().is_root() {
            command.extend(["unshare", "-U", "--map-user=1000", "--map-group=1000", "--"].map(String::from));
        }
        command.push(self.program.display().to_string());
        command.extend(self.args.iter().cloned());
        command
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code, if it exited.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit code {code}"),
            (None, Some(signal)) => write!(f, "signal {signal}"),
            (None, None) => write!(f, "unknown"),
        }
    }
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        Self { code: status.code(), signal: status.signal() }
    }
}

/// A running (or ended) child process. Not bound to any tokio runtime.
///
/// Dropping it kills the process, its group and all its descendants, and waits until they are gone.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: i32,
    log: PathBuf,
    end_signal: Option<Signal>,
    exit: watch::Receiver<Option<Exit>>,
    /// Locked to send a signal and to reap, so that no signal ever goes to a number that was given to somebody else.
    reaped: Arc<Mutex<bool>>,
}

impl Process {
    /// Starts the process. It is watched from its first instruction on: if we end, it ends.
    pub fn spawn(spec: &ProcessSpec) -> Result<Self> {
        let io = |what: &'static str| Error::io(move || format!("{what} {}", spec.name));
        let log =
            OpenOptions::new().create(true).append(true).open(&spec.log).map_err(Error::at("opening", &spec.log))?;
        let log_too = log.try_clone().map_err(Error::at("opening", &spec.log))?;
        // The program starts only after the reaper knows it: a shell waits for our word, and exits if we die before it comes.
        let mut child = Command::new("/bin/sh")
            .args(["-c", r#"read -r go || exit 1; exec "$@" </dev/null"#, &spec.name])
            .args(spec.command())
            .envs(spec.env.iter().map(|(key, value)| (key, value)))
            .current_dir(&spec.folder)
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(log_too)
            .process_group(0)
            .spawn()
            .map_err(io("starting"))?;
        let pid = i32::try_from(child.id())
            .map_err(|_| Error::State { server: spec.name.clone(), what: "has an impossible process id".into() })?;
        let mut go = child.stdin.take();
        let (publish, exit) = watch::channel(None);
        let end_signal = spec.end_signal;
        let (name, log) = (spec.name.clone(), spec.log.clone());
        let process = Self { name, pid, log, end_signal, exit, reaped: Arc::default() };
        reaper::watch_group(pid, end_signal)?;
        process.supervise(child, publish)?;
        if let Some(go) = go.as_mut() {
            go.write_all(b"go\n").map_err(io("starting"))?;
        }
        tracing::debug!(server = %process.name, pid, "started");
        Ok(process)
    }

    /// A thread that waits for the end, then ends what is left of the group, reaps, and tells everybody.
    fn supervise(&self, mut child: Child, publish: watch::Sender<Option<Exit>>) -> Result<()> {
        let (pid, reaped, name) = (self.pid, self.reaped.clone(), self.name.clone());
        let wait = move || {
            if let Some(leader) = Pid::from_raw(pid) {
                // NOWAIT leaves a zombie, which keeps the number taken until it is reaped under the lock.
                while let Err(rustix::io::Errno::INTR) =
                    waitid(WaitId::Pid(leader), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
                {}
            }
            let mut reaped = reaped.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(leader) = Pid::from_raw(pid) {
                let _ = kill_process_group(leader, Signal::KILL);
            }
            reaper::forget_group(pid);
            let exit = child.wait().map(Exit::from).unwrap_or(Exit { code: None, signal: None });
            *reaped = true;
            drop(reaped);
            tracing::debug!(server = %name, pid, %exit, "ended");
            publish.send_replace(Some(exit));
        };
        thread::Builder::new()
            .name(format!("wait-{pid}"))
            .spawn(wait)
            .map(|_| ())
            .map_err(Error::io(|| "starting a waiting thread"))
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.reaped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, which is also the number of its group.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, or `None` while it runs.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Whether it runs (a paused process does).
    pub fn is_alive(&self) -> bool {
        self.exit().is_none()
    }

    /// Waits until it ends.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit { code: None, signal: None }),
            Err(_) => Exit { code: None, signal: None },
        }
    }

    /// Sends a signal to the process alone; false when it has ended.
    pub fn signal(&self, signal: Signal) -> bool {
        let reaped = self.lock();
        !*reaped && Pid::from_raw(self.pid).is_some_and(|pid| kill_process(pid, signal).is_ok())
    }

    /// The process and everything that descends from it now.
    pub(crate) fn tree(&self) -> Vec<Member> {
        let reaped = self.lock();
        if *reaped {
            return Vec::new();
        }
        let mut tree: Vec<_> = member(self.pid).into_iter().collect();
        tree.extend(descendants(self.pid));
        tree
    }

    /// Stops all its threads and descendants where they are (SIGSTOP), and waits until they stand.
    pub async fn pause(&self) -> Result<()> {
        // The parents first, then again, until nothing is found that still runs: a stopped process starts no child.
        let deadline = Instant::now() + KILL_DEADLINE;
        loop {
            let running: Vec<_> = self.tree().into_iter().filter(|member| !member.is_stopped()).collect();
            if running.is_empty() {
                return self.is_alive().then_some(()).ok_or_else(|| self.state("cannot be paused: it has ended"));
            }
            if Instant::now() > deadline {
                return Err(self.state("could not be paused: it hangs in the kernel"));
            }
            running.into_iter().for_each(|member| member.signal(Signal::STOP));
            tokio::time::sleep(POLL).await;
        }
    }

    /// Lets a paused process and its descendants go on (SIGCONT).
    pub fn resume(&self) {
        self.tree().into_iter().rev().for_each(|member| member.signal(Signal::CONT));
    }

    /// Kills the process, its group and its descendants (SIGKILL), and waits until all are gone. Fine when it has ended already.
    pub async fn kill(&self) -> Result<()> {
        let members = self.send_kill();
        let deadline = Instant::now() + KILL_DEADLINE;
        while self.is_alive() || members.iter().any(|member| member.is_alive()) {
            if Instant::now() > deadline {
                return Err(self.state("is still there after SIGKILL"));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Asks the process to end with `signal`, and kills it when it has not within `patience`. Returns how it ended.
    pub async fn stop(&self, signal: Signal, patience: Duration) -> Result<Exit> {
        let members = self.tree();
        self.resume();
        self.signal(signal);
        if !self.wait_until(Instant::now() + patience).await {
            tracing::warn!(server = %self.name, ?patience, "did not stop when asked, killing it");
            self.kill().await?;
        }
        // A server that is asked nicely ends its own children; one that forgets some is not left with them.
        members.into_iter().for_each(|member| member.signal(Signal::KILL));
        Ok(self.wait().await)
    }

    /// Waits for the end by a clock that tests cannot stop.
    async fn wait_until(&self, deadline: Instant) -> bool {
        while self.is_alive() {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }

    /// SIGKILL to all of it. The leader is stopped first, so that nothing is born while its descendants are listed.
    fn send_kill(&self) -> Vec<Member> {
        if !self.signal(Signal::STOP) {
            return Vec::new();
        }
        let members = self.tree();
        let reaped = self.lock();
        if !*reaped && let Some(pid) = Pid::from_raw(self.pid) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        drop(reaped);
        members.iter().for_each(|member| member.signal(Signal::KILL));
        members
    }

    /// The last `lines` lines of its output.
    pub fn log_tail(&self, lines: usize) -> LogTail {
        log_tail(&self.log, lines)
    }

    fn state(&self, what: &str) -> Error {
        Error::State { server: self.name.clone(), what: what.to_owned() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(signal) = self.end_signal.filter(|_| self.is_alive()) {
            self.resume();
            self.signal(signal);
            block_while(END_DEADLINE, || self.is_alive());
        }
        let members = self.send_kill();
        block_while(KILL_DEADLINE, || self.is_alive() || members.iter().any(|member| member.is_alive()));
    }
}

/// Waits while `goes_on`, at most for `patience`. Blocks the thread: for destructors, which cannot await.
#[expect(clippy::disallowed_methods, reason = "a destructor cannot await, and its folder is removed right after it")]
fn block_while(patience: Duration, goes_on: impl Fn() -> bool) {
    let deadline = Instant::now() + patience;
    while goes_on() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}

/// The last lines of a log file; empty when there is none.
pub(crate) fn log_tail(path: &Path, lines: usize) -> LogTail {
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    LogTail(all.iter().skip(all.len().saturating_sub(lines)).map(|line| (*line).to_owned()).collect())
}
