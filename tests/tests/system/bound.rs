//! One worker, which captures and applies, under a limit of memory.
//!
//! It runs in a cgroup of its own. Where there can be none, that half counts as skipped, and what the kernel says of the process is still
//! held against the limit.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use wallaby_loadtest::compare;
use wallaby_testkit::{NatsOptions, eventually, is_root, skipped};
use wallaby_tests::PATIENCE;
use wallaby_tests::cgroup::{Cgroup, Memory};
use wallaby_tests::flow::FlowFile;
use wallaby_tests::program::Program;
use wallaby_tests::system::{Plan, System};

pub const MIB: u64 = 1 << 20;
/// How long a transaction may take from its commit to the sink: the machine may be busy with a build.
pub const PATIENCE_LARGE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 3600 } else { 1800 });

/// One controller, one log server, no worker yet.
pub fn small(flow: FlowFile) -> Plan {
    let flow = FlowFile { replicas: 1, ..flow };
    Plan { workers: Vec::new(), nats: NatsOptions::default(), flow, ..Plan::default() }
}

/// The one worker of a system, which gets no more memory than the limit. Outlives the system.
pub struct Bound {
    limit: u64,
    cgroup: Option<Cgroup>,
}

impl Bound {
    pub fn new(limit: u64) -> Bound {
        let cgroup = if is_root() { Cgroup::limited_to(limit) } else { Err("needs root".to_owned()) };
        let cgroup = match cgroup {
            Ok(cgroup) => Some(cgroup),
            Err(why) => {
                skipped!("no cgroup bounds the worker ({why}): only what it had at its peak is checked");
                None
            }
        };
        Bound { limit, cgroup }
    }

    /// Starts the worker, and makes sure that it is bounded and knows it.
    pub async fn start_worker(&self, system: &mut System) {
        let name = match &self.cgroup {
            Some(cgroup) => system.start_worker_behind(&cgroup.launcher(), &[]),
            None => system.start_worker_with(&[("WALLABY_MEMORY_LIMIT", &self.limit.to_string())]),
        };
        let worker = system.worker(&name);
        eventually(PATIENCE, "the worker sizes itself by its limit", async || {
            let said = worker.metric("wallaby_memory_limit_bytes", &[]).await?;
            if said == self.limit as f64 { Ok(()) } else { Err(format!("{said}: {:?}", worker.process().exit())) }
        })
        .await;
        if let Some(cgroup) = &self.cgroup {
            assert!(cgroup.holds(worker.process().pid()), "the worker is not in its cgroup");
        }
        self.check(system, "at its start");
    }

    /// That the worker lives, and never had more than the limit.
    pub fn check(&self, system: &System, when: &str) {
        let worker: &Program = system.workers.first().unwrap();
        let kills = self.cgroup.as_ref().map_or(0, Cgroup::kills);
        assert_eq!(kills, 0, "{when}: the kernel killed the worker, which wanted more than {} MiB", self.limit / MIB);
        let exit = worker.process().exit();
        assert!(exit.is_none(), "{when}: the worker ended by itself: {exit:?}");
        let memory = Memory::of(worker.process().pid()).unwrap();
        let counted = self.cgroup.as_ref().and_then(Cgroup::peak_bytes);
        let counted = counted.map_or_else(String::new, |peak| {
            format!("; the cgroup's peak, files included, {:.1} MiB", peak as f64 / MIB as f64)
        });
        println!("{when}: limit {} MiB, {memory}{counted}", self.limit / MIB);
        assert!(memory.peak <= self.limit, "{when}: more than the limit of {} MiB: {memory}", self.limit / MIB);
    }

    /// Waits until the target has what `sql` asks for; ends early when the worker did.
    pub async fn until(&self, system: &System, target: &Client, what: &str, sql: &str) {
        let at = Instant::now();
        eventually(PATIENCE_LARGE, what, async || {
            let kills = self.cgroup.as_ref().map_or(0, Cgroup::kills);
            let exit = system.workers.first().and_then(|worker| worker.process().exit());
            if kills > 0 || exit.is_some() {
                self.check(system, what);
            }
            match target.query(sql, &[]).await {
                Ok(rows) if !rows.is_empty() => Ok(()),
                other => Err(format!("{:?}", other.map(|rows| rows.len()))),
            }
        })
        .await;
        println!("{what} after {:.1} s", at.elapsed().as_secs_f64());
        self.check(system, what);
    }
}

/// Source and target have the same rows, of which there are as many as printed.
pub async fn are_equal(system: &System, tables: &[&str]) {
    let comparison = compare(&system.source_dsn(), &system.target_dsn(), tables).await.unwrap();
    assert!(comparison.is_equal(), "{comparison}");
    println!("{comparison}");
}
