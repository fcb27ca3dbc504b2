//! The folder that a server owns: a temporary one that goes with it, or a lasting one that only one owner may use at a time.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::{Error, Result, reaper};

/// A folder for a server's data, configuration and log.
#[derive(Debug)]
pub enum Folder {
    /// Removed when the value is dropped, or when we end in whatever way.
    Temporary(TempDir),
    /// Kept, and locked against a second owner while the value lives.
    Kept(FolderLock),
}

impl Folder {
    /// A new folder in the system's place for temporary files. Its path is short enough for a Unix socket in it.
    pub fn temporary(hint: &str) -> Result<Self> {
        let prefix = format!("wallaby-{hint}-");
        let folder =
            tempfile::Builder::new().prefix(&prefix).tempdir().map_err(Error::io(|| "creating a temporary folder"))?;
        reaper::remove_folder(folder.path())?;
        Ok(Self::Temporary(folder))
    }

    /// A folder that stays; it is made when it is missing.
    pub fn kept(path: impl Into<PathBuf>) -> Result<Self> {
        FolderLock::acquire(path).map(Self::Kept)
    }

    /// `kept` if there is a path, else `temporary`.
    pub(crate) fn open(path: Option<&Path>, hint: &str) -> Result<Self> {
        path.map_or_else(|| Self::temporary(hint), Self::kept)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Temporary(folder) => folder.path(),
            Self::Kept(lock) => lock.path(),
        }
    }
}

/// The sole right to use a folder, held until dropped, or until we end in whatever way.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    lock: File,
}

impl FolderLock {
    /// Makes the folder if it is missing and locks it; `FolderInUse` says which process holds it.
    pub fn acquire(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        make(&path)?;
        let path = path.canonicalize().map_err(Error::at("opening", &path))?;
        let file = path.join(".lock");
        let mut lock = OpenOptions::new().create(true).append(true).open(&file).map_err(Error::at("opening", &file))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let holder = fs::read_to_string(&file).unwrap_or_default();
            let holder = if holder.trim().is_empty() { "unknown" } else { holder.trim() }.to_owned();
            return Err(Error::FolderInUse { path, holder });
        }
        let io = |source| Error::Io { what: format!("writing {}", file.display()), source };
        lock.set_len(0).map_err(io)?;
        writeln!(lock, "{}", std::process::id()).map_err(io)?;
        Ok(Self { path, lock })
    }

    /// The locked folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Closing is not enough: a child that another thread is just starting holds a copy of the file until it executes.
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}

/// A folder, with its parents, that only we may enter. One that is there already is left as it is.
pub(crate) fn make(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::at("creating", path))
}
