//! What `wallaby-loadtest` measures with a whole WALlaby, in small forms: everything runs, and every row is counted. Times mean nothing here;
//! in the full form only what an added table costs the others is held to its bound, which a debug build meets less easily than a release.

use std::time::Duration;

use wallaby_loadtest::first_load::add_table::{self, AddTableOptions, RISE_MAX_MS};
use wallaby_loadtest::measure::figures::{Figures, Kind};
use wallaby_loadtest::measure::report::TO_SINK;
use wallaby_loadtest::measure::sink::{SinkBench, SinkOptions};
use wallaby_loadtest::measure::snapshot::{SnapshotBench, SnapshotOptions};
use wallaby_loadtest::system::Programs;
use wallaby_stack::Folder;
use wallaby_tests::programs::program;
use wallaby_tests::{alone, is_full_size};

fn programs() -> Programs {
    Programs::find(program("wallaby-worker").parent()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m2_reads_and_loads_are_measured_beside_copy() {
    let _alone = alone().await;
    let folder = Folder::temporary("m2").unwrap();
    let rows = if is_full_size() { 2_000_000 } else { 5_000 };
    let options = SnapshotOptions { pairs: 1, rows, nodes: 1, sync_always: false, first_pair: 0 };
    let bench = SnapshotBench::prepare(options, &programs(), folder.path()).await.unwrap();
    let mut figures = Figures::default();
    let outcome = bench.run_pairs(&mut figures, |run| println!("{}: {:.0} rows/s", run.kind.title(), run.rate())).await;
    outcome.unwrap_or_else(|error| panic!("{error:#}{}", bench.last_words()));
    for kind in
        [Kind::Chunks, Kind::ChunksTwo, Kind::Load, Kind::CopyOut, Kind::CopyOutTwo, Kind::CopyIn, Kind::CopyInTwo]
    {
        let runs: Vec<_> = figures.of(kind).collect();
        assert_eq!(runs.len(), 1, "{kind:?}");
        assert_eq!(runs[0].rows, rows, "{kind:?}");
        assert!(runs[0].seconds > 0.0 && runs[0].rate().is_finite(), "{kind:?}");
    }
    assert_eq!(figures.ratios(Kind::Load, Kind::CopyIn).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn m3_the_lag_of_ten_tables_is_watched_while_one_is_added() {
    let _alone = alone().await;
    let folder = Folder::temporary("m3").unwrap();
    let options = AddTableOptions {
        rows: if is_full_size() { 1_000_000 } else { 20_000 },
        per_second: if is_full_size() { 200 } else { 50 },
        calm: Duration::from_secs(if is_full_size() { 10 } else { 2 }),
        nodes: 1,
        fsync: true,
    };
    let outcome = add_table::run(&options, &programs(), folder.path()).await.unwrap();
    assert!(outcome.comparison.is_equal(), "{}", outcome.comparison);
    assert!(outcome.done_s > outcome.added_s);
    let during = outcome.samples.iter().filter(|(at, _)| (outcome.added_s..=outcome.done_s).contains(at)).count();
    assert!(during > 0, "the lag was not looked at while the table was added: {:?}", outcome.samples.len());
    for moment in ["table added", "P", "run done"] {
        assert!(outcome.plot().contains(&format!(">{moment} ")), "the plot names what happened: {moment}");
    }
    assert!((outcome.added_s..=outcome.done_s + 1.0).contains(&outcome.handed_over_s), "{}", outcome.handed_over_s);
    println!("{:.0} ms further behind, {} times", outcome.rise_ms(), outcome.excursions());
    if is_full_size() {
        assert!(outcome.rise_ms() <= RISE_MAX_MS, "the other tables fell {:.0} ms further behind", outcome.rise_ms());
        assert!(outcome.excursions() <= 1, "the other tables fell behind {} times", outcome.excursions());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sink_is_drained_beside_copies_by_hand_and_the_latency_to_it_is_measured() {
    let _alone = alone().await;
    let folder = Folder::temporary("sink").unwrap();
    let rows = if is_full_size() { 500_000 } else { 5_000 };
    let (per_second, seconds) = if is_full_size() { (1_000, 20) } else { (200, 1) };
    // Two sinks: the second one is paused again before latencies are measured.
    let options = SinkOptions { pairs: 2, rows, per_second, latency_for: Duration::from_secs(seconds) };
    let bench = SinkBench::prepare(options, &programs(), folder.path()).await.unwrap();
    let mut figures = Figures::default();
    let measured = async {
        bench.run_pairs(&mut figures, |run| println!("{}: {:.0} rows/s", run.kind.title(), run.rate())).await?;
        bench.latency(&mut figures).await
    };
    measured.await.unwrap_or_else(|error| panic!("{error:#}{}", bench.last_words()));
    for kind in [Kind::Drain, Kind::Bulk] {
        let runs: Vec<_> = figures.of(kind).collect();
        assert_eq!(runs.iter().map(|run| (run.pair, run.rows)).collect::<Vec<_>>(), [(0, rows), (1, rows)], "{kind:?}");
        assert!(runs.iter().all(|run| run.seconds > 0.0 && run.rate().is_finite()), "{kind:?}: {runs:?}");
    }
    assert!(figures.of(Kind::Drain).all(|run| run.cpu_micros_per_row.contains_key("worker")), "what the worker cost");
    assert_eq!(figures.ratios(Kind::Drain, Kind::Bulk).len(), 2);
    let [latency] = figures.latencies.as_slice() else { panic!("{:?}", figures.latencies) };
    assert_eq!((latency.path.as_str(), latency.per_second), (TO_SINK, per_second));
    assert_eq!(latency.count, u64::from(per_second) * seconds, "what came to warm up is not counted");
    assert!(latency.p50 > 0 && latency.p50 <= latency.p99 && latency.p99 <= latency.max, "{latency:?}");
}
