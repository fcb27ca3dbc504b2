//! What can go wrong with a local server, said so that a person can act on it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a server could not be started, reached or ended. Carries the last lines of the server's log where there is one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A binary is not in the tool cache.
    #[error("{tool} is not at {}: run `make tools` (WALLABY_CACHE moves the folder)", path.display())]
    ToolMissing {
        /// The program, as a person calls it.
        tool: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the path.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The server ended while it was waited for.
    #[error("{server} ended ({exit}) before it was ready{log}")]
    Exited {
        /// The server's name.
        server: String,
        /// How it ended.
        exit: String,
        /// Its last words.
        log: LogTail,
    },
    /// The server runs, but did not become ready, or did not do what was asked, in time.
    #[error("{server} was not ready after {waited:?}; last seen: {last}{log}")]
    NotReady {
        /// The server's name.
        server: String,
        /// How long it was waited for.
        waited: Duration,
        /// The last answer to the readiness question.
        last: String,
        /// The server's last words.
        log: LogTail,
    },
    /// A port was taken by somebody else.
    #[error("{server} cannot listen on 127.0.0.1:{port}, which is taken by {holder}{log}")]
    PortTaken {
        /// The server's name.
        server: String,
        /// The port.
        port: u16,
        /// The process that listens there, as far as it can be known.
        holder: String,
        /// The server's last words.
        log: LogTail,
    },
    /// Somebody answered, but it is not the server that was started.
    #[error("another server answers at {address}: expected {expected}, found {found}")]
    Impostor {
        /// Where it answered.
        address: String,
        /// The nonce of the server that was started.
        expected: String,
        /// What answered instead.
        found: String,
    },
    /// Another process works in this folder.
    #[error("{} is in use by process {holder}; end it, or choose another folder", path.display())]
    FolderInUse {
        /// The folder.
        path: PathBuf,
        /// The process id that holds the lock, or `unknown`.
        holder: String,
    },
    /// A server was asked to do something that its state does not allow.
    #[error("{server}: {what}")]
    State {
        /// The server's name.
        server: String,
        /// What is wrong.
        what: String,
    },
    /// A query to a local Postgres failed.
    #[error("postgres: {what}: {source}")]
    Query {
        /// What was asked.
        what: String,
        /// The client's error.
        source: tokio_postgres::Error,
    },
}

impl Error {
    /// An I/O error with its context: `Error::io(|| format!("reading {path}"))` as an argument of `map_err`.
    pub(crate) fn io<S: Into<String>>(what: impl FnOnce() -> S) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Io { what: what().into(), source }
    }

    /// An I/O error about a path.
    pub(crate) fn at(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { what: format!("{what} {}", path.display()), source }
    }
}

/// The last lines of a server's log. Displays as nothing when empty, else as an indented block on lines of its own.
#[derive(Debug, Clone, Default)]
pub struct LogTail(pub Vec<String>);

impl fmt::Display for LogTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, "; its last log lines:")?;
        self.0.iter().try_for_each(|line| write!(f, "\n    {line}"))
    }
}
