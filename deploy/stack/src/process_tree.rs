//! Which processes descend from a process, read from `/proc`.
//!
//! Signals to a process group do not reach all of a server: each Postgres backend leads a session of its own.

use std::collections::HashMap;
use std::fs;

use rustix::process::{Pid, Signal, kill_process};

/// A process that is told apart from a later one with the same id by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Member {
    pub(crate) pid: i32,
    started_ticks: u64,
}

impl Member {
    /// Whether this very process still runs (a zombie does not).
    pub(crate) fn is_alive(self) -> bool {
        read_stat(self.pid).is_some_and(|stat| stat.member == self && stat.state != 'Z')
    }

    /// Sends a signal, unless the process is gone.
    pub(crate) fn signal(self, signal: Signal) {
        if self.is_alive()
            && let Some(pid) = Pid::from_raw(self.pid)
        {
            // It may end in between: then there is nothing left to signal.
            let _ = kill_process(pid, signal);
        }
    }

    /// Whether a SIGSTOP has taken effect.
    pub(crate) fn is_stopped(self) -> bool {
        read_stat(self.pid).is_none_or(|stat| stat.member != self || matches!(stat.state, 'T' | 't' | 'Z'))
    }
}

struct Stat {
    member: Member,
    parent: i32,
    state: char,
}

fn read_stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in brackets and may contain anything, so fields are counted from its last bracket on.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let started_ticks = fields.nth(17)?.parse().ok()?;
    Some(Stat { member: Member { pid, started_ticks }, parent, state })
}

/// This process, if it exists.
pub(crate) fn member(pid: i32) -> Option<Member> {
    read_stat(pid).map(|stat| stat.member)
}

/// Everything that descends from `root` now, without `root`.
pub(crate) fn descendants(root: i32) -> Vec<Member> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut children: HashMap<i32, Vec<Member>> = HashMap::new();
    for entry in entries.flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(stat) = pid.and_then(read_stat) {
            children.entry(stat.parent).or_default().push(stat.member);
        }
    }
    let mut found = Vec::new();
    let mut open = vec![root];
    while let Some(parent) = open.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            open.push(child.pid);
            found.push(child);
        }
    }
    found
}

/// The command line of a process, its arguments joined by spaces; empty when it is gone.
pub(crate) fn command_line(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).replace('\0', " ");
    text.trim_end().to_owned()
}
