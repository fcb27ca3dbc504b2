//! CPU time and memory of processes, and how busy the machine is otherwise, from `/proc`.

use std::fs;
use std::time::Duration;

use anyhow::Context;

/// CPU time that a process has used, user and system, all threads; `None` when it is gone.
pub fn cpu_time(pid: i32) -> Option<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_cpu_time(&text)
}

/// Fields 14 and 15, in ticks. The name in brackets may contain anything, so fields are counted from its last bracket on.
fn parse_cpu_time(stat: &str) -> Option<Duration> {
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(ticks(user + system))
}

/// `USER_HZ`: Linux shows times to programs in hundredths of a second, whatever it counts in itself.
const TICKS_PER_SECOND: f64 = 100.0;

fn ticks(count: u64) -> Duration {
    Duration::from_secs_f64(count as f64 / TICKS_PER_SECOND)
}

/// The most memory that a process ever had resident, in bytes; `None` when it is gone.
pub fn resident_bytes_max(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

/// What the whole machine has spent, at one moment.
#[derive(Debug, Clone, Copy)]
pub struct MachineClock {
    busy: Duration,
    /// Average number of runnable processes over the last minute.
    pub load_average: f64,
}

impl MachineClock {
    /// Reads it.
    ///
    /// # Errors
    /// When `/proc` does not look as on Linux.
    pub fn now() -> anyhow::Result<MachineClock> {
        let stat = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let busy = parse_busy(&stat).context("/proc/stat has no cpu line")?;
        let load = fs::read_to_string("/proc/loadavg").context("reading /proc/loadavg")?;
        let load_average = load.split_ascii_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(0.0);
        Ok(MachineClock { busy, load_average })
    }

    /// CPU time of everything on the machine since `before`.
    pub fn busy_since(&self, before: &MachineClock) -> Duration {
        self.busy.saturating_sub(before.busy)
    }
}

/// user, nice, system, irq, softirq and steal; not idle and iowait.
fn parse_busy(stat: &str) -> Option<Duration> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
    let busy = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| fields.get(*index)).sum();
    Some(ticks(busy))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn names_with_brackets_and_spaces_do_not_move_the_fields() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 1 0 5 1 1";
        assert_eq!(parse_cpu_time(stat).unwrap(), Duration::from_secs(3));
    }

    #[test]
    fn our_own_figures_grow() {
        let own = i32::try_from(std::process::id()).unwrap();
        let (cpu, machine) = (cpu_time(own).unwrap(), MachineClock::now().unwrap());
        let mut sum = 0_u64;
        while cpu_time(own).unwrap() < cpu + Duration::from_millis(50) {
            sum = sum.wrapping_mul(31).wrapping_add(1);
        }
        assert!(MachineClock::now().unwrap().busy_since(&machine) >= Duration::from_millis(40), "{sum}");
        assert!(resident_bytes_max(own).unwrap() > 1 << 20);
    }
}
