//! Where the servers' binaries are.

use std::env;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The PostgreSQL that is used when nothing else is asked for.
pub const POSTGRES_VERSION: &str = "18.4";

/// The folder into which `make tools` puts pinned binaries: `$WALLABY_CACHE`, by default `~/.cache/wallaby`.
#[derive(Debug, Clone)]
pub struct Toolbox {
    cache: PathBuf,
}

impl Toolbox {
    /// Finds the folder. That a binary is in it is checked when it is asked for.
    pub fn find() -> Result<Self> {
        let named = env::var_os("WALLABY_CACHE").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/wallaby"));
        let missing = || Error::State {
            server: "toolbox".into(),
            what: "neither WALLABY_CACHE nor HOME is set, so there is no tool cache".into(),
        };
        named.or_else(home).map(|cache| Self { cache }).ok_or_else(missing)
    }

    /// The folder itself.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// `nats-server`.
    pub fn nats_server(&self) -> Result<PathBuf> {
        self.present("nats-server", self.cache.join("bin/nats-server"))
    }

    /// `etcd`.
    pub fn etcd(&self) -> Result<PathBuf> {
        self.present("etcd", self.cache.join("bin/etcd"))
    }

    /// `etcdctl`.
    pub fn etcdctl(&self) -> Result<PathBuf> {
        self.present("etcdctl", self.cache.join("bin/etcdctl"))
    }

    /// `etcdutl`, which restores snapshots.
    pub fn etcdutl(&self) -> Result<PathBuf> {
        self.present("etcdutl", self.cache.join("bin/etcdutl"))
    }

    /// The folder with `initdb`, `pg_ctl` and `postgres` of a version, such as `18.4`.
    pub fn postgres_bin(&self, version: &str) -> Result<PathBuf> {
        let bin = self.cache.join("postgres").join(version).join("bin");
        self.present(&format!("PostgreSQL {version}"), bin.join("postgres")).map(|_| bin)
    }

    fn present(&self, tool: &str, path: PathBuf) -> Result<PathBuf> {
        if path.is_file() { Ok(path) } else { Err(Error::ToolMissing { tool: tool.to_owned(), path }) }
    }
}
