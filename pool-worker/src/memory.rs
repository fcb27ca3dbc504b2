//! How much memory this worker may take, and what it makes of it.
//!
//! The limit of a cgroup is enforced by killing, so what is kept for speed (the cache) and what is read ahead are sized by it.
//! Without a limit, or with a large one, the sizes are those at which more brings nothing.

use std::path::{Path, PathBuf};

use wallaby_model::flow::ByteSize;

use crate::options::Options;

/// What stands for "no limit" in a cgroup of version 1: page counters end a little below 2⁶³.
const UNLIMITED_FROM: u64 = 1 << 62;

/// What the parts of the worker may hold, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Segments that several sinks of a flow read; one cache for all flows.
    pub cache: usize,
    /// What one sink has read and not applied.
    pub sink_buffer: usize,
    /// Parts of one capture on their way to the side store.
    pub puts: u32,
    /// Parts of chunks on their way there, of all chunks that are read here.
    pub chunk_puts: u32,
    /// Open parts of the transactions that one capture is sent while they are in progress.
    pub open_parts: usize,
    /// Chunks that are read here at a time, and that are loaded into each sink.
    pub chunks: usize,
}

const CACHE_MOST: u64 = 64 << 20;
const SINK_BUFFER_MOST: u64 = 16 << 20;
/// Parts of large transactions that are on their way.
pub(crate) const PUTS_MOST: u64 = 8 << 20;
const CHUNK_PUTS_MOST: u64 = 32 << 20;
const OPEN_PARTS_MOST: u64 = 16 << 20;
/// What is left for a chunk: the rows being copied, those fetched meanwhile, and two connections' buffers, with room to spare.
const CHUNK_BYTES: u64 = 48 << 20;

impl Sizes {
    /// For a worker that may take `limit` bytes. What the settings say counts.
    pub fn new(options: &Options, limit: Option<u64>) -> Sizes {
        let share = |part: u64, most: u64| limit.map_or(most, |limit| (limit / part).min(most));
        let budget = |part: u64, most: u64| u32::try_from(share(part, most)).unwrap_or(u32::MAX);
        let set = |size: Option<ByteSize>, otherwise: u64| fit(size.map_or(otherwise, |size| size.0));
        Sizes {
            cache: set(options.cache_bytes, share(8, CACHE_MOST)),
            sink_buffer: set(options.sink_buffer_bytes, share(16, SINK_BUFFER_MOST)),
            puts: budget(32, PUTS_MOST),
            chunk_puts: budget(16, CHUNK_PUTS_MOST),
            open_parts: fit(share(16, OPEN_PARTS_MOST)),
            chunks: limit.map_or(usize::MAX, |limit| fit(limit / CHUNK_BYTES)).clamp(1, options.capacity as usize),
        }
    }
}

/// What a worker takes by itself. Below it the shares would be too small to hold anything.
const LIMIT_LEAST: ByteSize = ByteSize(64 << 20);

/// A limit that somebody sets.
///
/// # Errors
/// When it is no size, or less than a worker takes by itself.
pub fn limit_of_flag(text: &str) -> Result<ByteSize, String> {
    let limit: ByteSize = text.parse()?;
    if limit < LIMIT_LEAST {
        return Err(format!("too little for a worker: at least {LIMIT_LEAST}, and eight times the largest row more"));
    }
    Ok(limit)
}

fn fit(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The smallest limit of the cgroups that this process is in, of either version; `None` when there is none.
pub fn limit() -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    limit_of(&read(Path::new("/proc/self/cgroup"))?, &read(Path::new("/proc/self/mounts"))?, read)
}

/// From the contents of `/proc/self/cgroup` and `/proc/self/mounts`, and of files below the mount points.
fn limit_of(cgroups: &str, mounts: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut limits = Vec::new();
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => (mount(mounts, "cgroup2", None), "memory.max"),
            _ if has(controllers, "memory") => (mount(mounts, "cgroup", Some("memory")), "memory.limit_in_bytes"),
            _ => continue,
        };
        let Some(root) = root else { continue };
        // A container may not see where in the tree it is: what does not exist below its mount point is passed over.
        let path = if path.contains("..") { "/" } else { path };
        let folders = Path::new(path).ancestors().map(|folder| folder.strip_prefix("/").unwrap_or(folder));
        limits.extend(folders.filter_map(|folder| read(&root.join(folder).join(file))?.trim().parse::<u64>().ok()));
    }
    limits.into_iter().filter(|limit| *limit < UNLIMITED_FROM).min()
}

/// Where a file system of this kind, with this option, is mounted.
fn mount(mounts: &str, kind: &str, option: Option<&str>) -> Option<PathBuf> {
    let of_line = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let (place, is_kind) = (fields.next()?, fields.next()? == kind);
        let options = fields.next()?;
        (is_kind && option.is_none_or(|option| has(options, option))).then(|| PathBuf::from(place))
    };
    mounts.lines().find_map(of_line)
}

fn has(list: &str, name: &str) -> bool {
    list.split(',').any(|item| item == name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use std::collections::HashMap;

    use clap::Parser;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn options(arguments: &[&str]) -> Options {
        Options::try_parse_from(std::iter::once("wallaby-worker").chain(arguments.iter().copied())).unwrap()
    }

    fn found(cgroups: &str, mounts: &str, files: &[(&str, &str)]) -> Option<u64> {
        let files: HashMap<PathBuf, String> =
            files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect();
        limit_of(cgroups, mounts, |path| files.get(path).cloned())
    }

    const V2: &str = "sysfs /sys sysfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
    const V1: &str = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";

    #[test]
    fn the_smallest_limit_on_the_way_up_counts() {
        let files = [
            ("/sys/fs/cgroup/pods/memory.max", "268435456\n"),
            ("/sys/fs/cgroup/pods/a/memory.max", "max\n"),
            ("/sys/fs/cgroup/other/memory.max", "1\n"),
        ];
        assert_eq!(found("0::/pods/a\n", V2, &files), Some(256 * MIB));
        assert_eq!(found("0::/pods/a\n", V2, &files[1..]), None);
        // In a container that sees only its own cgroup, at the mount point, under whatever path.
        let own = [("/sys/fs/cgroup/memory.max", "134217728")];
        assert_eq!(found("0::/\n", V2, &own), Some(128 * MIB));
        assert_eq!(found("0::/../../b\n", V2, &own), Some(128 * MIB));
    }

    #[test]
    fn version_1_is_read_too_and_its_largest_number_is_no_limit() {
        let cgroups = "5:cpu:/a\n4:memory:/a/b\n0::/\n";
        let unlimited = ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        let limited = ("/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "134217728\n");
        assert_eq!(found(cgroups, V1, &[unlimited, limited]), Some(128 * MIB));
        assert_eq!(found(cgroups, V1, &[unlimited]), None);
        assert_eq!(found("", "", &[]), None);
    }

    #[test]
    fn sizes_shrink_with_the_limit_and_never_exceed_the_usual_ones() {
        let usual = Sizes::new(&options(&[]), None);
        assert_eq!((usual.cache, usual.sink_buffer), (64 << 20, 16 << 20));
        assert_eq!((usual.puts, usual.chunk_puts, usual.open_parts), (8 << 20, 32 << 20, 16 << 20));
        assert_eq!(usual.chunks, 64);
        let roomy = Sizes::new(&options(&[]), Some(8 << 30));
        assert_eq!(roomy, usual);
        let small = Sizes::new(&options(&[]), Some(128 * MIB));
        assert_eq!((small.cache, small.sink_buffer), (16 << 20, 8 << 20));
        assert_eq!((small.puts, small.chunk_puts, small.open_parts), (4 << 20, 8 << 20, 8 << 20));
        assert_eq!(small.chunks, 2);
        assert_eq!(Sizes::new(&options(&[]), Some(MIB)).chunks, 1);
        let said = Sizes::new(&options(&["--cache-bytes", "1Mi", "--sink-buffer-bytes", "2Mi"]), Some(128 * MIB));
        assert_eq!((said.cache, said.sink_buffer), (1 << 20, 2 << 20));
    }
}
