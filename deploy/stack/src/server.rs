//! A server: one process at a time, started again with the same ports and data after it was stopped or killed.

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::error::LogTail;
use crate::process::{Exit, Process, ProcessSpec, log_tail};
use crate::{Error, Result, ports};

/// How many log lines an error carries.
const LOG_LINES: usize = 15;
const POLL: Duration = Duration::from_millis(10);

/// A process that can be ended and started again. All methods take `&self`: faults are injected while others use the server.
#[derive(Debug)]
pub struct Server {
    spec: ProcessSpec,
    current: Mutex<Option<Arc<Process>>>,
}

impl Server {
    /// A server that is not running yet.
    pub fn new(spec: ProcessSpec) -> Self {
        Self { spec, current: Mutex::new(None) }
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.spec.log
    }

    /// Starts the process, which must not be running. Does not wait until it is ready.
    pub(crate) fn launch(&self) -> Result<()> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|process| process.is_alive()) {
            return Err(self.state("is running already"));
        }
        *current = Some(Arc::new(Process::spawn(&self.spec)?));
        Ok(())
    }

    /// The process of the latest start, running or not.
    pub fn process(&self) -> Result<Arc<Process>> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.clone().ok_or_else(|| self.state("was never started"))
    }

    /// The process id; an error when it does not run.
    pub fn pid(&self) -> Result<i32> {
        let process = self.process()?;
        if process.is_alive() { Ok(process.pid()) } else { Err(self.state("is not running")) }
    }

    /// Whether the process runs (a paused one does).
    pub fn is_alive(&self) -> bool {
        self.process().is_ok_and(|process| process.is_alive())
    }

    /// Waits until the process ends.
    pub async fn wait(&self) -> Result<Exit> {
        Ok(self.process()?.wait().await)
    }

    /// SIGKILL to the process and all its descendants; returns when they are gone. Errs when it was not running: a fault must land.
    pub async fn kill9(&self) -> Result<()> {
        self.pid()?;
        self.process()?.kill().await
    }

    /// Asks it to end with `signal`, kills it when it has not within `patience`.
    pub async fn stop_with(&self, signal: Signal, patience: Duration) -> Result<Exit> {
        self.process()?.stop(signal, patience).await
    }

    /// SIGSTOP to the process and all its descendants; returns when they stand.
    pub async fn pause(&self) -> Result<()> {
        self.process()?.pause().await
    }

    /// SIGCONT to the process and all its descendants.
    pub fn resume(&self) -> Result<()> {
        self.process().map(|process| process.resume())
    }

    /// The last lines of its log.
    pub fn log_tail(&self, lines: usize) -> LogTail {
        log_tail(&self.spec.log, lines)
    }

    /// Asks `probe` until it answers `Ok`. Ends early, with the log, when the process ends or says that one of `ports` is taken.
    pub(crate) async fn ready<T, P, F>(&self, patience: Duration, ports: &[u16], mut probe: P) -> Result<T>
    where
        P: FnMut() -> F,
        F: Future<Output = Result<T, Probe>>,
    {
        let started = Instant::now();
        loop {
            let last = match probe().await {
                Ok(ready) => return Ok(ready),
                Err(Probe::Never(error)) => return Err(error),
                Err(Probe::NotYet(last)) => last,
            };
            if let Some(exit) = self.process()?.exit() {
                return Err(self.ended(exit, ports));
            }
            if started.elapsed() > patience {
                let log = self.log_tail(LOG_LINES);
                return Err(Error::NotReady { server: self.spec.name.clone(), waited: started.elapsed(), last, log });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Why the process ended: a taken port if its log says so.
    fn ended(&self, exit: Exit, ports: &[u16]) -> Error {
        let (server, log) = (self.spec.name.clone(), self.log_tail(LOG_LINES));
        let is_about_port = |line: &String| line.to_ascii_lowercase().contains("address already in use");
        let told = |port: &&u16| log.0.iter().any(|line| is_about_port(line) && line.contains(&port.to_string()));
        let is_taken = log.0.iter().any(is_about_port);
        let guess = || ports.iter().find(|port| ports::holder(**port).starts_with("process"));
        match ports.iter().find(told).or_else(guess) {
            Some(port) if is_taken => Error::PortTaken { server, port: *port, holder: ports::holder(*port), log },
            _ => Error::Exited { server, exit: exit.to_string(), log },
        }
    }

    pub(crate) fn state(&self, what: &str) -> Error {
        Error::State { server: self.spec.name.clone(), what: what.to_owned() }
    }
}

/// Why a readiness question was not answered with yes.
#[derive(Debug)]
pub(crate) enum Probe {
    /// Ask again; this was seen.
    NotYet(String),
    /// It will never be.
    Never(Error),
}

impl From<String> for Probe {
    fn from(last: String) -> Self {
        Self::NotYet(last)
    }
}
