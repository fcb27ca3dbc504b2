//! The first load under fire, in a small form; `wallaby-loadtest first-load` is the full one.

use std::time::Duration;

use wallaby_loadtest::first_load::{FirstLoadOptions, run};
use wallaby_loadtest::system::Programs;
use wallaby_stack::Folder;
use wallaby_tests::programs::program;
use wallaby_tests::{alone, is_full_size};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m1_rows_are_loaded_by_two_workers_while_they_are_killed_and_the_sink_restarts() {
    let _alone = alone().await;
    let programs = Programs::find(program("wallaby-worker").parent()).unwrap();
    let folder = Folder::temporary("first-load").unwrap();
    let options = FirstLoadOptions {
        rows: if is_full_size() { 5_000_000 } else { 40_000 },
        per_second: if is_full_size() { 1_000 } else { 100 },
        kills: if is_full_size() { 2 } else { 1 },
        restart_sink: true,
        nodes: if is_full_size() { 3 } else { 1 },
        seed: 7,
        // Small chunks, so that there are many in the small form too.
        chunks_max: if is_full_size() { "4Gi" } else { "4Mi" }.to_owned(),
        // Short enough that a long load gives snapshots up on the way. A short one must not: a table of which no chunk is done when the
        // next snapshot is taken is planned anew, and would be counted as read again.
        snapshot_max: Duration::from_secs(if is_full_size() { 60 } else { 1800 }),
    };
    let outcome = run(&options, &programs, folder.path(), |line| println!("{line}")).await.unwrap();
    println!("{outcome}");
    assert!(outcome.comparison.is_equal(), "{outcome}");
    assert_eq!(outcome.watched.read_again, 0, "chunks that were done were read again: {outcome}");
    assert!(outcome.watched.readers.len() >= 2, "one worker read it all: {outcome}");
    assert!(outcome.watched.leaves_writers_alone(), "{outcome}");
    assert_eq!(outcome.killed, options.kills, "{outcome}");
    assert!(outcome.lets_go_of_xmin(options.snapshot_max), "{outcome}");
    if is_full_size() {
        assert!(outcome.keeps_pace(options.per_second), "the transactions did not go on: {outcome}");
    }
}
