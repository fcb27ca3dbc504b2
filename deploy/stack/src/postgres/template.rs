//! `initdb` takes seconds, a copy of its result a tenth of one: it runs once for each version, into the tool cache.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::fs::{FlockOperation, flock};
use tokio::process::Command;

use crate::process::ProcessSpec;
use crate::{Error, Result, Toolbox, folder};

/// The superuser's password in the template. Each cluster made from it gets its own before it is handed out.
pub(super) const PASSWORD: &str = "template";
/// Raised when the options below change, so that old templates are not used.
const GENERATION: u32 = 1;

/// The template's data folder for the binaries in `bin`, made now if it is missing.
pub(super) async fn prepare(toolbox: &Toolbox, bin: &Path) -> Result<PathBuf> {
    let version = run(bin, "postgres", ["-V"]).await?;
    let version: String =
        version.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    let home = toolbox.cache().join("postgres-template");
    folder::make(&home)?;
    let template = home.join(format!("{version}-{GENERATION}"));
    let lock_path = home.join(format!("{version}-{GENERATION}.lock"));
    if template.join("PG_VERSION").exists() {
        return Ok(template);
    }
    let lock =
        OpenOptions::new().create(true).append(true).open(&lock_path).map_err(Error::at("opening", &lock_path))?;
    let lock = tokio::task::spawn_blocking(move || flock(&lock, FlockOperation::LockExclusive).map(|()| lock)).await;
    let _lock =
        lock.map_err(std::io::Error::other).and_then(|lock| Ok(lock?)).map_err(Error::at("locking", &lock_path))?;
    if template.join("PG_VERSION").exists() {
        return Ok(template);
    }
    let work = tempfile::Builder::new().prefix(".making-").tempdir_in(&home).map_err(Error::at("writing", &home))?;
    let (data, password) = (work.path().join("data"), work.path().join("password"));
    fs::write(&password, PASSWORD).map_err(Error::at("writing", &password))?;
    let password_file = format!("--pwfile={}", password.display());
    let data_text = data.display().to_string();
    let options =
        ["-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"];
    run(bin, "initdb", options.into_iter().chain([password_file.as_str(), "-D", &data_text])).await?;
    let conf = data.join("postgresql.conf");
    let text = fs::read_to_string(&conf).map_err(Error::at("reading", &conf))?;
    fs::write(&conf, text + "\ninclude 'wallaby.conf'\n").map_err(Error::at("writing", &conf))?;
    fs::rename(&data, &template).map_err(Error::at("moving the template to", &template))?;
    Ok(template)
}

/// Copies the template to a new data folder, sharing blocks where the file system can.
pub(super) async fn copy(template: &Path, data: &Path) -> Result<()> {
    let copied = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .arg(template)
        .arg(data)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await;
    let copied = copied.map_err(Error::at("copying the template to", data))?;
    if copied.status.success() {
        return Ok(());
    }
    Err(Error::State {
        server: "postgres".into(),
        what: format!("copying the template failed: {}", String::from_utf8_lossy(&copied.stderr).trim()),
    })
}

/// Runs a program of Postgres to its end and returns what it printed.
async fn run<'a>(bin: &Path, program: &str, args: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let mut spec = ProcessSpec::new(program, bin.join(program), "/").args(args);
    spec.refuses_root = true;
    let command = spec.command();
    let (first, rest) = command
        .split_first()
        .ok_or_else(|| Error::State { server: program.to_owned(), what: "has no command".into() })?;
    let output =
        Command::new(first).args(rest).env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = output.map_err(Error::io(|| format!("running {program}")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let mut text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if text.contains("unshare") {
        text.push_str(
            "\nAs root, Postgres is run in a user namespace. Where those are not allowed, run as an ordinary user.",
        );
    }
    Err(Error::State { server: program.to_owned(), what: format!("failed ({}):\n{}", output.status, text.trim()) })
}
