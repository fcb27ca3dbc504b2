//! A disk of its own that can lose its power: ext4 on a loop device, ended by its shutdown ioctl. What was not synced is gone.

use std::path::{Path, PathBuf};
use std::process::Command;

use wallaby_stack::Folder;

/// `EXT4_IOC_SHUTDOWN` with `NOLOGFLUSH`, through perl: the call is unsafe in Rust, and perl is on every Debian.
const POWER_CUT: &str = r#"open(my $disk, "<", $ARGV[0]) or die "open: $!"; my $flags = pack("I", 2); ioctl($disk, 0x8004587d, $flags) or die "ioctl: $!""#;

/// A mounted disk. Dropping it unmounts it.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mounted_at: PathBuf,
    _folder: Folder,
}

impl Disk {
    /// Makes a disk of `megabytes` and mounts it. Needs root.
    ///
    /// # Errors
    /// When a tool is missing or the kernel has no loop devices.
    pub fn make(megabytes: u32) -> Result<Disk, String> {
        let folder = Folder::temporary("disk").map_err(|error| error.to_string())?;
        let (image, mounted_at) = (folder.path().join("image"), folder.path().join("mounted"));
        std::fs::create_dir(&mounted_at).map_err(|error| error.to_string())?;
        run("truncate", &["-s", &format!("{megabytes}M"), &text(&image)])?;
        run("mkfs.ext4", &["-q", "-E", "lazy_itable_init=1", &text(&image)])?;
        let disk = Disk { image, mounted_at, _folder: folder };
        disk.mount()?;
        Ok(disk)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mounted_at
    }

    /// Puts everything written so far on the disk, as the servers do now and then.
    ///
    /// # Errors
    /// When the disk is gone.
    pub fn sync(&self) -> Result<(), String> {
        run("sync", &["-f", &text(&self.mounted_at)])
    }

    /// Cuts the power: nothing that was not synced reaches the disk any more, every write fails.
    ///
    /// # Errors
    /// When the file system does not take the ioctl.
    pub fn cut_power(&self) -> Result<(), String> {
        run("perl", &["-e", POWER_CUT, &text(&self.mounted_at)])
    }

    /// Power is back: mounts what survived. Whoever used the disk must be gone.
    ///
    /// # Errors
    /// When it is still in use.
    pub fn power_on(&self) -> Result<(), String> {
        run("umount", &[&text(&self.mounted_at)])?;
        self.mount()
    }

    fn mount(&self) -> Result<(), String> {
        run("mount", &["-o", "loop", &text(&self.image), &text(&self.mounted_at)])
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &["-l", &text(&self.mounted_at)]) {
            eprintln!("a test's disk stays mounted: {error}");
        }
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program} {args:?}: {}", said.trim())) }
}
