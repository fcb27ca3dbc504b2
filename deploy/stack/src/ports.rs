//! Ports that stay ours, also while the server that uses them is down.
//!
//! A port from `bind(0)` lies in the range from which the system takes the local ports of outgoing connections: while a server is
//! restarted, its port can be taken by somebody's connection, or a client that retries even connects to itself. So ports are
//! chosen below that range, and each is reserved by a locked file in the tool cache for as long as the value lives.

use std::fs::{self, File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddrV4};

use rand::Rng;
use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

use crate::toolbox::Toolbox;
use crate::{Error, Result};

const LOWEST: u16 = 12_000;
const HIGHEST: u16 = 32_000;
/// How many ports are tried before giving up; nearly all are free.
const TRIES: usize = 200;

/// A TCP port on 127.0.0.1 that nobody listens on and that no other user of this crate is given while the value lives.
#[derive(Debug)]
pub struct PortLease {
    port: u16,
    lock: Option<File>,
}

impl PortLease {
    /// A free port.
    pub fn free() -> Result<Self> {
        let folder = Toolbox::find()?.cache().join("ports");
        fs::create_dir_all(&folder).map_err(Error::at("creating", &folder))?;
        let highest = outgoing_ports_start().clamp(LOWEST + 1000, HIGHEST);
        for _ in 0..TRIES {
            let port = rand::rng().random_range(LOWEST..highest);
            let path = folder.join(port.to_string());
            let lock = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::at("opening", &path))?;
            let is_ours = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
            if is_ours && is_free(port) {
                return Ok(Self { port, lock: Some(lock) });
            }
        }
        Err(Error::State {
            server: "ports".into(),
            what: format!("no free port between {LOWEST} and {highest} in {TRIES} tries"),
        })
    }

    /// A port that the user chose. It is not checked: the server says when it is taken.
    pub fn fixed(port: u16) -> Self {
        Self { port, lock: None }
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// Whether nobody listens on a port. It is bound and not listened on: a child that another thread is just starting holds a copy of this
/// socket until it executes, and one that listens would keep the port from the server that it is for.
fn is_free(port: u16) -> bool {
    let bound = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).and_then(|socket| {
        sockopt::set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
    });
    bound.is_ok()
}

impl Drop for PortLease {
    fn drop(&mut self) {
        // Closing is not enough: a child that another thread is just starting holds a copy of the file until it executes.
        if let Some(lock) = &self.lock {
            let _ = flock(lock, FlockOperation::Unlock);
        }
    }
}

/// The lowest port that the system gives to outgoing connections.
fn outgoing_ports_start() -> u16 {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    text.split_ascii_whitespace().next().and_then(|port| port.parse().ok()).unwrap_or(HIGHEST)
}

/// Who listens on a TCP port of this machine, for messages: `process 4711 (nats-server -c ...)`.
pub(crate) fn holder(port: u16) -> String {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"].into_iter().find_map(|table| listening_inode(table, port));
    let Some(inode) = inode else { return "nobody any more".to_owned() };
    let socket = format!("socket:[{inode}]");
    let owns = |pid: i32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        fds.into_iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target.as_os_str() == socket.as_str()))
    };
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    match pids.find(|pid| owns(*pid)) {
        Some(pid) => format!("process {pid} ({})", crate::process_tree::command_line(pid)),
        None => "a process that we may not see".to_owned(),
    }
}

fn listening_inode(table: &str, port: u16) -> Option<String> {
    let text = fs::read_to_string(table).ok()?;
    let wanted = format!(":{port:04X}");
    text.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_listening = fields.get(3) == Some(&"0A");
        (is_listening && fields.get(1)?.ends_with(&wanted))
            .then(|| fields.get(9).map(|inode| (*inode).to_owned()))
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_port_is_free_when_nobody_listens_on_it() {
        let lease = PortLease::free().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, lease.port())).unwrap();
        assert!(!is_free(lease.port()));
        drop(listener);
        assert!(is_free(lease.port()));
    }
}
