//! The small form of `make loadtest`: every kind of run happens, and its counts are right. Its times mean nothing.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use wallaby_loadtest::measure::figures::{Figures, Kind};

#[test]
fn the_quick_form_measures_everything_and_counts_right() {
    let out = tempfile::tempdir().unwrap();
    let nowhere = out.path().join("no-programs");
    let output = Command::new(env!("CARGO_BIN_EXE_wallaby-loadtest"))
        .args(["run", "--quick", "--out"])
        .arg(out.path())
        .arg("--programs")
        .arg(nowhere)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = std::fs::read_to_string(out.path().join("figures.json")).unwrap();
    let figures: Figures = serde_json::from_str(&text).unwrap();
    let is_skipped = |what: &str| figures.skipped.iter().any(|skipped| skipped.what == what);
    for kind in [Kind::S1, Kind::R1, Kind::R3, Kind::R3Always, Kind::S1OneRow, Kind::R1OneRow] {
        let run = figures.of(kind).next().unwrap_or_else(|| panic!("no run of {kind:?}: {said}"));
        let wanted = if matches!(kind, Kind::S1OneRow | Kind::R1OneRow) { 500 } else { 4_000 };
        assert!(run.rows >= wanted && run.rows <= wanted + 500, "{kind:?}: {} rows", run.rows);
        assert!(run.seconds > 0.0 && run.rate().is_finite());
        let parts = if matches!(kind, Kind::S1 | Kind::S1OneRow) { 2 } else { 4 };
        assert_eq!(run.cpu_micros_per_row.len(), parts, "{kind:?}: {:?}", run.cpu_micros_per_row);
        let ours = if parts == 2 { vec!["client"] } else { vec!["reader", "worker"] };
        let memory = &run.resident_bytes_max;
        assert_eq!(memory.keys().map(String::as_str).collect::<Vec<_>>(), ours, "{kind:?}");
        assert!(memory.values().all(|bytes| (1 << 20..1 << 34).contains(bytes)), "{kind:?}: {memory:?}");
        assert!(run.load_average > 0.0 && run.load_average.is_finite(), "{kind:?}: {}", run.load_average);
        let cores = std::thread::available_parallelism().unwrap().get() as f64;
        assert!((0.0..=cores).contains(&run.cores_busy_elsewhere), "{kind:?}: {}", run.cores_busy_elsewhere);
    }
    assert!(figures.runs.iter().any(|run| run.cores_busy_elsewhere > 0.0), "servers and this test took no time at all");
    assert!(figures.of(Kind::S0).count() == 1 || is_skipped(Kind::S0.title()), "{said}");
    for what in ["the Postgres sink", "the first load"] {
        assert!(is_skipped(what), "{what}: the programs are not where they were said to be");
    }
    assert_eq!(figures.latencies.len(), 1);
    let latency = &figures.latencies[0];
    assert_eq!(latency.count, 400, "200 transactions a second for a second, and as many to warm up");
    assert!(latency.p50 > 0 && latency.p50 <= latency.p99 && latency.p99 <= latency.max, "{latency:?}");
    let page = std::fs::read_to_string(out.path().join("figures.md")).unwrap();
    assert!(page.contains("wallaby-loadtest -- run --quick"), "{page}");
}

/// One run of a kind says nothing: as many as the design asks for are made when nobody says a number.
#[test]
fn five_pairs_are_run_where_nobody_says_how_many() {
    let output = Command::new(env!("CARGO_BIN_EXE_wallaby-loadtest")).args(["run", "--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let (_, after) = help.split_once("--pairs <PAIRS>").unwrap_or_else(|| panic!("{help}"));
    let (text, _) = after.split_once("--rows").unwrap();
    assert!(text.contains("[default: 5]"), "{text}");
}
