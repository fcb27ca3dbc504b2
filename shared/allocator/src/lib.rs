//! What a process keeps of the memory it freed.
//!
//! glibc maps a block of 128 KiB or more by itself and gives it back when it is freed, but at the first such free it raises that bound to
//! the block's size, up to 32 MiB, and the bound of what it keeps at a heap's end to twice that (`mallopt(3)`, "dynamic mmap threshold").
//! From then on the next large blocks come out of the heaps, of which there are up to eight for each processor, and stay there. A worker
//! that had passed rows of 12 MiB stood at 76 to 98 MiB when it was idle; with fixed bounds, at 7 to 10.

/// Blocks of so many bytes or more are mapped by themselves. Those of segments and parts, which come and go all the time, are smaller: to
/// map each would cost a page fault for every 4 KiB of it.
pub const LARGE_BLOCK_BYTES: i32 = 4 << 20;

/// So many free bytes at the end of a heap are kept.
pub const KEPT_BYTES: i32 = 8 << 20;

/// Has the allocator give [large blocks](LARGE_BLOCK_BYTES) back when they are freed. To be called first in `main`. Does nothing where the
/// allocator is not glibc's: musl's gives such blocks back anyway. Returns whether the allocator took it.
#[cfg_attr(
    all(target_os = "linux", target_env = "gnu"),
    allow(unsafe_code, reason = "glibc has no other way but the environment")
)]
pub fn give_large_blocks_back() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: mallopt takes two integers, locks the main arena, and says 0 to what it does not know; it invalidates no pointer.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES) == 1
                && libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES) == 1
        }
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    {
        true
    }
}
