//! The one process that outlives us long enough to clean up.
//!
//! Values end their servers when dropped, but statics are not dropped, and nobody drops anything in a process that is killed with
//! SIGKILL. So the first server that is started also starts a small shell that reads a pipe of ours. The system closes the pipe when we
//! end, in whatever way; the shell then kills the process groups it was told about and removes their temporary folders.
//! (`PR_SET_PDEATHSIG` would not do: it fires when the *thread* that spawned ends, and each test is a thread.)

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::process::Signal;

use crate::{Error, Result};

/// Lines: `+ <pgid>` watch a group, `- <pgid>` it is gone, `d <folder>` remove this folder at the end, `s <pgid>` end this one by
/// SIGQUIT first. Children are listed too, since a group does not hold all of a server; a stopped leader cannot fork meanwhile.
const SCRIPT: &str = r#"
trap '' INT TERM HUP QUIT PIPE
groups=' '
gentle=''
folders=''
while read -r op arg; do
  case $op in
    +) groups="$groups$arg " ;;
    -) case $groups in *" $arg "*) groups="${groups%% "$arg" *} ${groups#* "$arg" }" ;; esac ;;
    s) gentle="$gentle $arg" ;;
    d) folders="$folders$arg
" ;;
  esac
done
runs() { read -r stat <"/proc/$1/stat" 2>/dev/null || return 1; case $stat in *') Z '*) return 1 ;; esac; }
asked=''
for g in $gentle; do
  case $groups in *" $g "*) kill -CONT "$g" 2>/dev/null; kill -QUIT "$g" 2>/dev/null; asked="$asked $g" ;; esac
done
for g in $asked; do
  for try in 1 2 3 4 5 6 7 8 9 10; do runs "$g" || break; sleep 0.1; done
done
for g in $groups; do
  runs "$g" || continue
  kill -STOP "$g" 2>/dev/null || continue
  children=$(cat /proc/"$g"/task/*/children 2>/dev/null)
  kill -KILL "-$g" 2>/dev/null
  for c in $children; do kill -KILL "$c" 2>/dev/null; done
done
printf '%s' "$folders" | while read -r folder; do
  for try in 1 2 3 4 5; do rm -rf -- "$folder" 2>/dev/null && break; sleep 0.2; done
done
"#;

static PIPE: Mutex<Option<ChildStdin>> = Mutex::new(None);

/// Has the process group killed when we end, its leader asked by `end_signal` first (SIGQUIT is the one that is known).
pub(crate) fn watch_group(leader: i32, end_signal: Option<Signal>) -> Result<()> {
    if end_signal == Some(Signal::QUIT) {
        tell(&format!("s {leader}\n"))?;
    }
    tell(&format!("+ {leader}\n"))
}

/// The group has ended: its number may be given to somebody else.
pub(crate) fn forget_group(leader: i32) {
    // A reaper that is gone kills nobody, so there is nothing to forget.
    let _ = tell(&format!("- {leader}\n"));
}

/// Has the folder removed when we end. Only for folders with a fresh name of our own.
pub(crate) fn remove_folder(folder: &Path) -> Result<()> {
    match folder.to_str() {
        Some(path) if folder.is_absolute() && !path.contains('\n') => tell(&format!("d {path}\n")),
        _ => Ok(()),
    }
}

fn tell(line: &str) -> Result<()> {
    let mut pipe = PIPE.lock().unwrap_or_else(PoisonError::into_inner);
    let stdin = match pipe.as_mut() {
        Some(stdin) => stdin,
        None => pipe.insert(spawn()?),
    };
    stdin.write_all(line.as_bytes()).map_err(Error::io(|| "telling the reaper about a server"))
}

fn spawn() -> Result<ChildStdin> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", SCRIPT, "wallaby-reaper"])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Its own group: Ctrl-C is meant for us, not for the one who cleans up behind us.
        .process_group(0)
        .spawn()
        .map_err(Error::io(|| "starting the reaper shell"))?;
    child.stdin.take().ok_or_else(|| Error::State { server: "reaper".into(), what: "has no stdin".into() })
}
