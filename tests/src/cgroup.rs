//! A bound on the memory of one program: a cgroup of its own, of whichever version the machine has, and what the kernel counted.
//!
//! The program is put in before its first instruction, so nothing of it is counted elsewhere. Where no cgroup can be made, what the
//! kernel says of the process itself is left: [`Memory::of`].

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const V2_ROOT: &str = "/sys/fs/cgroup";
/// How long the last process of a cgroup may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

static MADE: AtomicU32 = AtomicU32::new(0);

/// The names that the two versions have for the same things.
#[derive(Debug)]
struct Names {
    limit: &'static str,
    /// Memory and swap together in version 1, swap alone in version 2.
    swap: &'static str,
    peak: &'static str,
    now: &'static str,
    /// The file with a line `oom_kill <count>`.
    kills: &'static str,
}

const V1: Names = Names {
    limit: "memory.limit_in_bytes",
    swap: "memory.memsw.limit_in_bytes",
    peak: "memory.max_usage_in_bytes",
    now: "memory.usage_in_bytes",
    kills: "memory.oom_control",
};
const V2: Names = Names {
    limit: "memory.max",
    swap: "memory.swap.max",
    peak: "memory.peak",
    now: "memory.current",
    kills: "memory.events",
};

/// See the module. Dropping it kills what is still in it and removes it.
#[derive(Debug)]
pub struct Cgroup {
    folder: PathBuf,
    names: &'static Names,
}

impl Cgroup {
    /// Makes one whose processes get at most `bytes`, without swap. Needs root.
    ///
    /// # Errors
    /// Why there can be none: no rights, or no memory controller.
    pub fn limited_to(bytes: u64) -> Result<Cgroup, String> {
        let (parent, names) = match memory_of_version_1()? {
            Some(parent) => (parent, &V1),
            None => (version_2()?, &V2),
        };
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("wallaby-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&folder).map_err(|error| format!("making {}: {error}", folder.display()))?;
        let cgroup = Cgroup { folder, names };
        if !cgroup.folder.join(names.limit).exists() {
            return Err(format!("{} has no memory controller", parent.display()));
        }
        cgroup.write(names.limit, &bytes.to_string())?;
        let swap = if cgroup.is_version_1() { bytes } else { 0 };
        // A kernel that counts no swap has no such file, and then none is used beyond what is counted.
        if cgroup.folder.join(names.swap).exists() {
            cgroup.write(names.swap, &swap.to_string())?;
        }
        Ok(cgroup)
    }

    fn is_version_1(&self) -> bool {
        self.names.limit == V1.limit
    }

    fn write(&self, file: &str, text: &str) -> Result<(), String> {
        let path = self.folder.join(file);
        std::fs::write(&path, text).map_err(|error| format!("writing {text} to {}: {error}", path.display()))
    }

    fn read(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.folder.join(file)).ok()
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.read(file)?.trim().parse().ok()
    }

    /// The command that starts a program inside: its own last arguments.
    pub fn launcher(&self) -> Vec<String> {
        let script = r#"echo $$ > "$0/cgroup.procs" && exec "$@""#;
        ["/bin/sh", "-c", script, &self.folder.display().to_string()].map(str::to_owned).to_vec()
    }

    /// The most that its processes ever had, the pages of files that they read included; `None` when the kernel does not say.
    pub fn peak_bytes(&self) -> Option<u64> {
        self.number(self.names.peak)
    }

    /// What its processes have now.
    pub fn now_bytes(&self) -> Option<u64> {
        self.number(self.names.now)
    }

    /// How many of its processes the kernel killed because of the bound.
    pub fn kills(&self) -> u64 {
        let events = self.read(self.names.kills).unwrap_or_default();
        events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Whether the process is in it.
    pub fn holds(&self, pid: i32) -> bool {
        self.processes().contains(&pid)
    }

    fn processes(&self) -> Vec<i32> {
        let listed = self.read("cgroup.procs").unwrap_or_default();
        listed.lines().filter_map(|pid| pid.trim().parse().ok()).collect()
    }
}

impl Drop for Cgroup {
    #[expect(clippy::disallowed_methods, reason = "a destructor cannot await")]
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for pid in self.processes().into_iter().filter_map(Pid::from_raw) {
                let _it_may_be_gone = kill_process(pid, Signal::KILL);
            }
            match std::fs::remove_dir(&self.folder) {
                Ok(()) => return,
                Err(error) if Instant::now() > deadline => {
                    eprintln!("a test's cgroup stays: {}: {error}", self.folder.display());
                    return;
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// Our own cgroup of version 1, where that version has the memory; the mount point when ours is not below it.
fn memory_of_version_1() -> Result<Option<PathBuf>, String> {
    let read = |path: &str| std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let (mounts, cgroups) = (read("/proc/self/mounts")?, read("/proc/self/cgroup")?);
    let root = mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, place, "cgroup", options, ..] = fields[..] else { return None };
        options.split(',').any(|option| option == "memory").then(|| PathBuf::from(place))
    });
    let own = cgroups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|controller| controller == "memory").then(|| path.trim_start_matches('/'))
    });
    Ok(root.map(|root| {
        let below = own.map(|own| root.join(own)).filter(|below| below.is_dir());
        below.unwrap_or(root)
    }))
}

/// The root of version 2, with memory handed to its children.
fn version_2() -> Result<PathBuf, String> {
    let root = PathBuf::from(V2_ROOT);
    let control = root.join("cgroup.subtree_control");
    let now = std::fs::read_to_string(&control).map_err(|error| format!("{}: {error}", control.display()))?;
    if !now.split_whitespace().any(|controller| controller == "memory") {
        std::fs::write(&control, "+memory").map_err(|error| format!("no memory controller for children: {error}"))?;
    }
    Ok(root)
}

/// What the kernel says of one process, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The most it ever had resident.
    pub peak: u64,
    /// What it has resident now.
    pub now: u64,
    /// Of that: what it allocated.
    pub allocated: u64,
    /// Of that: pages of its program.
    pub program: u64,
}

impl Memory {
    /// Of a process that lives.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: i32) -> Result<Memory, String> {
        let path = format!("/proc/{pid}/status");
        let status = std::fs::read_to_string(Path::new(&path)).map_err(|error| format!("{path}: {error}"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kilobytes = line.and_then(|rest| rest.trim_start_matches(':').split_whitespace().next()?.parse().ok());
            kilobytes.map(|kilobytes: u64| kilobytes << 10).ok_or_else(|| format!("{path} has no {name}"))
        };
        Ok(Memory {
            peak: field("VmHWM")?,
            now: field("VmRSS")?,
            allocated: field("RssAnon")?,
            program: field("RssFile")?,
        })
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (peak, now) = (megabytes(self.peak), megabytes(self.now));
        let (allocated, program) = (megabytes(self.allocated), megabytes(self.program));
        write!(f, "peak {peak:.1} MiB resident; now {now:.1}: {allocated:.1} allocated, {program:.1} of its program")
    }
}
