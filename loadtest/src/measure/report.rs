//! The figures as a Markdown page. No I/O.

use std::fmt::Write as _;

use super::figures::{Figures, Kind, Run, spread};

/// A demand: what is measured, over what, and the bounds of limits.md.
struct Demand {
    what: &'static str,
    values: Vec<f64>,
    good: f64,
    wanted: f64,
    /// Whether less is better.
    is_cost: bool,
    unit: &'static str,
}

/// The report.
pub fn markdown(figures: &Figures) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(out, "Made by `{}`.\n", figures.command);
    let machine: Vec<_> = figures.machine.iter().map(|(what, value)| format!("{what} {value}")).collect();
    let _ = writeln!(out, "Machine: {}.\n", machine.join(", "));
    demands_table(&mut out, figures);
    runs_table(&mut out, figures);
    latency_table(&mut out, figures);
    for skipped in &figures.skipped {
        let _ = writeln!(out, "Skipped: {}: {}.\n", skipped.what, skipped.why);
    }
    raw_table(&mut out, &figures.runs);
    out
}

fn demands(figures: &Figures) -> Vec<Demand> {
    let ratio = |what, kind, base, good, wanted| Demand {
        what,
        values: figures.ratios(kind, base),
        good,
        wanted,
        is_cost: false,
        unit: "",
    };
    let cost = |what, values, good, wanted, unit| Demand { what, values, good, wanted, is_cost: true, unit };
    let latency = |path: &str, of: fn(&super::figures::Latency) -> u64| {
        let found = figures.latencies.iter().filter(|latency| latency.path == path);
        found.map(|latency| of(latency) as f64 / 1_000.0).collect::<Vec<_>>()
    };
    let resident = figures.of(Kind::R1).filter_map(|run| run.resident_bytes_max.get("worker"));
    let resident = resident.map(|bytes| *bytes as f64 / f64::from(1 << 20)).collect();
    vec![
        ratio("pipeline R1 ÷ S1", Kind::R1, Kind::S1, 0.65, 0.95),
        ratio("pipeline R1 ÷ S0", Kind::R1, Kind::S0, 1.0, 1.6),
        ratio("pipeline R3 ÷ S1", Kind::R3, Kind::S1, 0.4, 0.55),
        ratio("pipeline R3, sync always ÷ S1", Kind::R3Always, Kind::S1, 0.3, 0.45),
        ratio("pipeline R1 ÷ S1, 1-row transactions", Kind::R1OneRow, Kind::S1OneRow, 0.6, 0.85),
        ratio("Postgres sink ÷ bulk by hand", Kind::Drain, Kind::Bulk, 0.7, 0.85),
        ratio("first load, 1 reader ÷ COPY out, 1 connection", Kind::Chunks, Kind::CopyOut, 0.6, 0.85),
        ratio("first load, 2 readers ÷ COPY out, 2 connections", Kind::ChunksTwo, Kind::CopyOutTwo, 0.6, 0.85),
        ratio("first load, R3, sync always, 1 reader ÷ COPY out", Kind::ChunksAlways, Kind::CopyOut, 0.3, 0.45),
        ratio("Postgres sink, loading ÷ COPY in, 1 connection", Kind::Load, Kind::CopyIn, 0.6, 0.85),
        ratio("Postgres sink, loading ÷ COPY in, 2 connections", Kind::Load, Kind::CopyInTwo, 0.6, 0.85),
        cost("worker CPU per row, capture to staged", figures.cpu(Kind::R1, "worker"), 2.0, 0.9, " µs"),
        cost("worker memory at full speed", resident, 256.0, 100.0, " MiB"),
        cost("commit to reader of the log, p50", latency(TO_READER, |l| l.p50), 2.0, 1.0, " ms"),
        cost("commit to reader of the log, p99", latency(TO_READER, |l| l.p99), 10.0, 4.0, " ms"),
    ]
}

/// The path of latencies to a reader of the log.
pub const TO_READER: &str = "commit to a reader of the log";
/// The path of latencies to the Postgres sink.
pub const TO_SINK: &str = "commit to commit at the Postgres sink";

fn demands_table(out: &mut String, figures: &Figures) {
    out.push_str("| figure | median | lowest to highest | good | wanted | |\n|---|---|---|---|---|---|\n");
    for demand in demands(figures) {
        let Demand { what, good, wanted, unit, .. } = &demand;
        let Some((median, low, high)) = spread(&demand.values) else {
            let _ = writeln!(out, "| {what} | not measured | | {good}{unit} | {wanted}{unit} | |");
            continue;
        };
        let reaches = |bound: f64| if demand.is_cost { median <= bound } else { median >= bound };
        let word = match (reaches(*wanted), reaches(*good)) {
            (true, _) => "wanted",
            (false, true) => "good",
            (false, false) => "**missed**",
        };
        let _ = writeln!(
            out,
            "| {what} | {median:.2}{unit} | {low:.2} to {high:.2} | {good}{unit} | {wanted}{unit} | {word} |"
        );
    }
    out.push('\n');
}

const KINDS: [Kind; 17] = [
    Kind::S0,
    Kind::S1,
    Kind::R1,
    Kind::R3,
    Kind::R3Always,
    Kind::S1OneRow,
    Kind::R1OneRow,
    Kind::Drain,
    Kind::Bulk,
    Kind::CopyOut,
    Kind::Chunks,
    Kind::ChunksAlways,
    Kind::CopyOutTwo,
    Kind::ChunksTwo,
    Kind::Load,
    Kind::CopyIn,
    Kind::CopyInTwo,
];

fn runs_table(out: &mut String, figures: &Figures) {
    out.push_str("| what | rows/s, median | lowest to highest | CPU µs/row, medians | memory, highest |\n|---|---|---|---|---|\n");
    for kind in KINDS {
        let rates: Vec<f64> = figures.of(kind).map(Run::rate).collect();
        let Some((median, low, high)) = spread(&rates) else { continue };
        let (cpu, memory) = (cpu_cell(figures, kind), memory_cell(figures, kind));
        let k = 1_000.0;
        let title = kind.title();
        let _ =
            writeln!(out, "| {title} | {:.0}k | {:.0}k to {:.0}k | {cpu} | {memory} |", median / k, low / k, high / k);
    }
    out.push('\n');
}

fn cpu_cell(figures: &Figures, kind: Kind) -> String {
    let mut names: Vec<&String> = figures.of(kind).flat_map(|run| run.cpu_micros_per_row.keys()).collect();
    names.sort();
    names.dedup();
    let cell = |name: &&String| spread(&figures.cpu(kind, name)).map(|(median, ..)| format!("{name} {median:.2}"));
    names.iter().filter_map(cell).collect::<Vec<_>>().join(", ")
}

fn memory_cell(figures: &Figures, kind: Kind) -> String {
    let mut highest = std::collections::BTreeMap::new();
    for (name, bytes) in figures.of(kind).flat_map(|run| &run.resident_bytes_max) {
        let entry = highest.entry(name).or_insert(0);
        *entry = *bytes.max(entry);
    }
    highest.iter().map(|(name, bytes)| format!("{name} {} MiB", bytes >> 20)).collect::<Vec<_>>().join(", ")
}

fn latency_table(out: &mut String, figures: &Figures) {
    if figures.latencies.is_empty() {
        return;
    }
    out.push_str(
        "| latency | tx/s | p50 ms | p90 | p99 | p99.9 | highest | source commit p50 | load late by at most |\n",
    );
    out.push_str("|---|---|---|---|---|---|---|---|---|\n");
    for l in &figures.latencies {
        let ms = |micros: u64| format!("{:.2}", micros as f64 / 1_000.0);
        let cells = [l.p50, l.p90, l.p99, l.p999, l.max, l.commit_p50, l.late_max].map(ms).join(" | ");
        let _ = writeln!(out, "| {} | {} | {cells} |", l.path, l.per_second);
    }
    out.push('\n');
}

fn raw_table(out: &mut String, runs: &[Run]) {
    out.push_str("Every run, in the order made:\n\n");
    out.push_str("| pair | what | rows | seconds | rows/s | load average before | cores busy elsewhere |\n|---|---|---|---|---|---|---|\n");
    for run in runs {
        let Run { pair, rows, seconds, load_average, cores_busy_elsewhere, .. } = run;
        let (title, rate) = (run.kind.title(), run.rate());
        let _ = writeln!(
            out,
            "| {pair} | {title} | {rows} | {seconds:.2} | {rate:.0} | {load_average:.2} | {cores_busy_elsewhere:.2} |"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::run;
    use super::super::figures::{Latency, Skipped};
    use super::*;

    fn figures() -> Figures {
        let mut runs = Vec::new();
        for pair in 0..3 {
            runs.extend([run(Kind::S1, pair, 2.0), run(Kind::R1, pair, 2.5), run(Kind::R3, pair, 10.0)]);
        }
        let latency = Latency {
            path: TO_READER.to_owned(),
            count: 10,
            per_second: 1_000,
            p50: 900,
            p90: 1_500,
            p99: 12_000,
            p999: 15_000,
            max: 20_000,
            commit_p50: 700,
            late_max: 100,
        };
        let skipped = Skipped { what: "S0".to_owned(), why: "pg_recvlogical is not installed".to_owned() };
        let mut figures = Figures { runs, latencies: vec![latency], skipped: vec![skipped], ..Figures::default() };
        figures.command = "make loadtest".to_owned();
        figures
    }

    #[test]
    fn each_demand_says_what_it_reached() {
        let page = markdown(&figures());
        assert!(page.contains("| pipeline R1 ÷ S1 | 0.80 | 0.80 to 0.80 | 0.65 | 0.95 | good |"), "{page}");
        assert!(page.contains("| pipeline R3 ÷ S1 | 0.20 | 0.20 to 0.20 | 0.4 | 0.55 | **missed** |"), "{page}");
        assert!(page.contains("| pipeline R1 ÷ S0 | not measured |"), "{page}");
        assert!(
            page.contains("| commit to reader of the log, p50 | 0.90 ms | 0.90 to 0.90 | 2 ms | 1 ms | wanted |"),
            "{page}"
        );
        assert!(
            page.contains(
                "| commit to reader of the log, p99 | 12.00 ms | 12.00 to 12.00 | 10 ms | 4 ms | **missed** |"
            ),
            "{page}"
        );
        assert!(page.contains("| worker CPU per row, capture to staged | 2.50 µs |"), "{page}");
        assert!(page.contains("Skipped: S0: pg_recvlogical is not installed."), "{page}");
        assert!(page.contains("Made by `make loadtest`."), "{page}");
    }

    #[test]
    fn every_run_is_in_the_page() {
        let page = markdown(&figures());
        let raw = page.lines().filter(|line| line.contains("| 1000000 |")).count();
        assert_eq!(raw, 9);
        assert!(
            page.contains(
                "| S1: our client, discarding | 500k | 500k to 500k | walsender 2.00, worker 2.00 | worker 50 MiB |"
            ),
            "{page}"
        );
    }
}
