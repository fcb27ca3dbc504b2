//! An S3 server of its own: versitygw, which keeps files on disk and survives a kill.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use wallaby_testkit::eventually;

pub const ACCESS: &str = "wallaby";
pub const SECRET: &str = "wallaby-secret-of-the-tests";
pub const BUCKET: &str = "side";

pub struct Gateway {
    child: Child,
    binary: PathBuf,
    port: u16,
    folder: tempfile::TempDir,
}

impl Gateway {
    /// `None` when it is not installed; says so.
    pub async fn start() -> Option<Gateway> {
        let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/wallaby"));
        let cache = std::env::var_os("WALLABY_CACHE").map(PathBuf::from).or(home)?;
        let binary = cache.join("bin/versitygw");
        if !binary.exists() {
            println!("skipped: S3 is not tested, because versitygw is not installed: run `tools/install.sh versitygw`");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        // A bucket is a folder of the data.
        std::fs::create_dir_all(folder.path().join("data").join(BUCKET)).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = launch(&binary, port, folder.path());
        let mut gateway = Gateway { child, binary, port, folder };
        gateway.ready().await;
        Some(gateway)
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Kills it and starts it again on the same data.
    pub async fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = launch(&self.binary, self.port, self.folder.path());
        self.ready().await;
    }

    async fn ready(&mut self) {
        let port = self.port;
        eventually(Duration::from_secs(30), "versitygw", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.map(|_| ())
        })
        .await;
    }
}

fn launch(binary: &PathBuf, port: u16, folder: &std::path::Path) -> Child {
    let log = std::fs::File::create(folder.join("log")).unwrap();
    Command::new(binary)
        .args(["--port", &format!("127.0.0.1:{port}"), "posix"])
        .arg(folder.join("data"))
        .env("ROOT_ACCESS_KEY", ACCESS)
        .env("ROOT_SECRET_KEY", SECRET)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
