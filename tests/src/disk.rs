//! A disk of its own that can lose its power: ext4 on a loop device, ended by its shutdown ioctl. What was not synced is gone.

use std::fs::File;
use std::io::ErrorKind;
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

    /// Puts everything written so far on the disk, but for what stands below folders of this name: a power cut takes that.
    ///
    /// # Errors
    /// When the disk is gone.
    pub fn sync_all_but(&self, name: &str) -> std::io::Result<()> {
        let of_others = files(&self.mounted_at, &|folder| folder.file_name().is_none_or(|found| found != name))?;
        of_others.iter().try_for_each(|file| match File::open(file).and_then(|file| file.sync_all()) {
            // Gone meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            synced => synced,
        })
    }

    /// The bytes of the files below folders of this name.
    ///
    /// # Errors
    /// When the disk is gone.
    pub fn bytes_below(&self, name: &str) -> std::io::Result<u64> {
        let all = files(&self.mounted_at, &|_| true)?;
        let below = all.iter().filter(|file| file.iter().any(|part| part == name));
        Ok(below.filter_map(|file| file.metadata().ok()).map(|found| found.len()).sum())
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

/// The files below a folder and those of its folders that are to be looked into.
fn files(folder: &Path, looks_into: &dyn Fn(&Path) -> bool) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
        if kind.is_file() {
            found.push(path);
        } else if kind.is_dir() && looks_into(&path) {
            found.extend(files(&path, looks_into)?);
        }
    }
    Ok(found)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program} {args:?}: {}", said.trim())) }
}
