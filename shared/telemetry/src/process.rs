//! What this process takes of the machine, under the names that dashboards know.

use metrics::{Unit, describe_gauge, gauge};

const RESIDENT: &str = "process_resident_memory_bytes";
const CPU: &str = "process_cpu_seconds_total";
const FDS: &str = "process_open_fds";
const THREADS: &str = "process_threads";

pub(crate) fn describe() {
    describe_gauge!(RESIDENT, Unit::Bytes, "Resident memory of this process.");
    describe_gauge!(CPU, Unit::Seconds, "CPU time of this process, user and system.");
    describe_gauge!(FDS, Unit::Count, "Open file descriptors of this process.");
    describe_gauge!(THREADS, Unit::Count, "Threads of this process.");
}

/// Reads /proc. Called for each scrape: nobody asks more often than that.
pub(crate) async fn record() {
    if let Ok(status) = tokio::fs::read_to_string("/proc/self/status").await {
        if let Some(kilobytes) = field(&status, "VmRSS:") {
            gauge!(RESIDENT).set(kilobytes * 1024.0);
        }
        if let Some(threads) = field(&status, "Threads:") {
            gauge!(THREADS).set(threads);
        }
    }
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    #[allow(clippy::cast_precision_loss, reason = "seconds of a process fit a float")]
    gauge!(CPU).set(cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9);
    if let Ok(mut entries) = tokio::fs::read_dir("/proc/self/fd").await {
        let mut count = 0_u32;
        while let Ok(Some(_)) = entries.next_entry().await {
            count += 1;
        }
        // One of them is the listing itself.
        gauge!(FDS).set(f64::from(count.saturating_sub(1)));
    }
}

/// The number behind a name in /proc/self/status.
fn field(status: &str, name: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_status_are_found() {
        let status = "Name:\tx\nVmRSS:\t   12345 kB\nThreads:\t4\n";
        assert_eq!(field(status, "VmRSS:"), Some(12_345.0));
        assert_eq!(field(status, "Threads:"), Some(4.0));
        assert_eq!(field(status, "VmPeak:"), None);
    }
}
