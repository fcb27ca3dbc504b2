//! One of our own processes: killed, paused, asked for its counters.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wallaby_stack::{PortLease, Process, ProcessSpec};

use crate::programs::program;

/// A running program of ours with a metrics port of its own. Dropping it kills it.
#[derive(Debug)]
pub struct Program {
    name: String,
    process: Process,
    metrics: PortLease,
}

impl Program {
    /// Starts `binary` under `name` with `args` and `env`, logging into `folder`.
    pub fn spawn(name: &str, binary: &str, folder: &Path, args: &[String], env: &[(String, String)]) -> Program {
        Program::spawn_behind(&[], name, binary, folder, args, env)
    }

    /// The same, started by `launcher`: a command that becomes the program which its last arguments say.
    pub fn spawn_behind(
        launcher: &[String],
        name: &str,
        binary: &str,
        folder: &Path,
        args: &[String],
        env: &[(String, String)],
    ) -> Program {
        let metrics = PortLease::free().unwrap();
        let mut command: Vec<String> = launcher.to_vec();
        command.push(program(binary).display().to_string());
        command.extend_from_slice(args);
        let mut spec = ProcessSpec::new(name, command.remove(0), folder).args(command);
        spec.env.extend(env.iter().cloned());
        spec.env.push(("WALLABY_METRICS".to_owned(), format!("127.0.0.1:{}", metrics.port())));
        let process = Process::spawn(&spec).unwrap();
        Program { name: name.to_owned(), process, metrics }
    }

    /// The name it was started under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Where it serves its metrics.
    pub fn metrics_address(&self) -> String {
        format!("127.0.0.1:{}", self.metrics.port())
    }

    /// Kills it with SIGKILL; it is gone when this returns.
    pub async fn kill9(&self) {
        assert!(self.process.is_alive(), "{} was dead already{}", self.name, self.process.log_tail(20));
        self.process.kill().await.unwrap();
        assert!(!self.process.is_alive());
    }

    /// Stops it with SIGSTOP; it runs no instruction any more when this returns.
    pub async fn pause(&self) {
        self.process.pause().await.unwrap();
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.process.resume();
    }

    /// Asks it to end (SIGTERM).
    pub fn terminate(&self) {
        assert!(self.process.signal(Signal::TERM), "{} is gone", self.name);
    }

    /// A worker with the failpoint `hold-append` keeps its next segment at hand from here on.
    pub fn hold_append(&self) {
        assert!(self.process.signal(Signal::USR1), "{} is gone", self.name);
    }

    /// Lets it hand the segment to the log.
    pub fn release_append(&self) {
        assert!(self.process.signal(Signal::USR2), "{} is gone", self.name);
    }

    /// The sum of all series of a metric that carry all of `labels`; 0 when there is none.
    ///
    /// # Errors
    /// When the process does not answer.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64, String> {
        let text = self.metrics().await;
        let text = text.map_err(|error| format!("{} does not serve its metrics: {error}", self.name))?;
        Ok(sum(&text, name, labels))
    }

    /// What the process serves at /metrics, whole.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn metrics(&self) -> Result<String, String> {
        let text = tokio::time::timeout(Duration::from_secs(5), self.scrape()).await;
        text.map_err(|_| "no answer".to_owned())?.map_err(|error| error.to_string())
    }

    async fn scrape(&self) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.metrics.port())).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }
}

/// The sum of the series `name` in Prometheus' text form that carry all `labels`.
fn sum(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let wanted: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
    let of_line = |line: &str| {
        let rest = line.strip_prefix(name)?;
        let (series, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.split_once("} ")?,
            None => ("", rest.strip_prefix(' ')?),
        };
        let fits = wanted.iter().all(|label| series.contains(label.as_str()));
        fits.then(|| value.trim().parse::<f64>().ok()).flatten()
    };
    text.lines().filter_map(of_line).fold(0.0, |sum, value| sum + value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_name_and_label() {
        let text = "# HELP a x\na{flow=\"f\",reason=\"chain\"} 2\na{flow=\"f\",reason=\"full\"} 5\na_b 7\nb 1\n";
        assert_eq!(sum(text, "a", &[("reason", "chain")]), 2.0);
        assert_eq!(sum(text, "a", &[]), 7.0);
        assert_eq!(sum(text, "b", &[]), 1.0);
        assert_eq!(sum(text, "c", &[]), 0.0);
    }
}
