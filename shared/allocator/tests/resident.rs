//! Alone in its process: what it measures is the whole of it.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

const MIB: usize = 1 << 20;

fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim_end_matches("kB").trim().parse::<usize>().unwrap() * 1024
}

/// As a row is passed on: several copies of it at a time, in several threads, each a few times.
fn pass_rows(bytes: usize) {
    std::thread::scope(|threads| {
        for _ in 0..4 {
            threads.spawn(|| {
                for _ in 0..4 {
                    let first = std::hint::black_box(vec![1_u8; bytes]);
                    let second = std::hint::black_box(first.clone());
                    drop(first);
                    let small = std::hint::black_box(vec![1_u8; 1024]);
                    drop(second);
                    drop(small);
                }
            });
        }
    });
}

#[test]
fn large_blocks_are_given_back() {
    assert!(wallaby_allocator::give_large_blocks_back());
    let before = resident_bytes();
    pass_rows(12 * MIB);
    let kept = resident_bytes().saturating_sub(before);
    assert!(kept < 8 * MIB, "{kept} bytes are kept");
}
