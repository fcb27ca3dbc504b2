//! Where our programs are: beside the test binary's folder, built when they are missing or older than their sources.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The programs that a system is made of, and the demo.
const NAMES: [&str; 4] = ["wallaby-controller", "wallaby-worker", "wallaby", "wallaby-demo"];

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// The path of one of our programs.
pub fn program(name: &str) -> PathBuf {
    FOLDER.get_or_init(find).join(name)
}

fn find() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    // <target>/<profile>/deps/<test binary>
    let folder = own.parent().and_then(Path::parent).unwrap().to_path_buf();
    if let Some(why) = NAMES.iter().find_map(|name| stale(&folder, name)) {
        println!("building our programs once: {why}");
        build(&folder);
    }
    folder
}

/// Why a program has to be built; `None` when it is newer than every source that went into it.
fn stale(folder: &Path, name: &str) -> Option<String> {
    let built = std::fs::metadata(folder.join(name)).and_then(|file| file.modified());
    let Ok(built) = built else { return Some(format!("{name} is not in {}", folder.display())) };
    let list = std::fs::read_to_string(folder.join(format!("{name}.d"))).unwrap_or_default();
    let sources = list.split_once(": ").map_or("", |(_, sources)| sources);
    let is_newer =
        |source: &&str| std::fs::metadata(source).and_then(|file| file.modified()).map_or(true, |at| at > built);
    sources.split_whitespace().find(is_newer).map(|source| format!("{source} is newer than {name}"))
}

fn build(folder: &Path) {
    let target = folder.parent().unwrap();
    let mut cargo = Command::new("cargo");
    // The runner sets it for the test binaries' own sake; with it cargo would build everything anew.
    cargo.env_remove("RUSTC_BOOTSTRAP");
    cargo.args([
        "build",
        "--locked",
        "--bins",
        "-p",
        "wallaby-controller",
        "-p",
        "wallaby-pool-worker",
        "-p",
        "wallaby-cli",
        "-p",
        "wallaby-loadtest",
    ]);
    if folder.file_name().is_some_and(|profile| profile == "release") {
        cargo.arg("--release");
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let status = cargo.arg("--target-dir").arg(target).current_dir(workspace).status();
    let is_built = status.as_ref().is_ok_and(std::process::ExitStatus::success);
    assert!(is_built, "our programs cannot be built ({status:?}); see cargo's messages above, or run `make build`");
}
