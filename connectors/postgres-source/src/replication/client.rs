//! Commands of a replication connection.

use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::time::timeout;
use wallaby_model::Lsn;
use wallaby_model::schema::{quote_identifier, quote_literal};

use super::feedback::{self, Feedback};
use super::reader::FrameReader;
use super::startup::{self, MessageStream, server_error};
use crate::config::ConnectConfig;
use crate::error::SourceError;
use crate::transport::{Transport, attempts, tries_next};

/// Answer of IDENTIFY_SYSTEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    /// Names the cluster; the same on a primary and its standbys.
    pub system_identifier: String,
    /// The timeline.
    pub timeline: u32,
    /// Where WAL is written, or replayed on a standby.
    pub wal_end: Lsn,
}

/// A line of a timeline's history file: where it left its ancestor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineSwitch {
    /// The ancestor.
    pub timeline: u32,
    /// The ancestor's last LSN in this history.
    pub at: Lsn,
}

/// Whether transactions are sent while they are in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streaming {
    /// When they commit.
    Off,
    /// Those that outgrow the server's memory for them (protocol 2 and up).
    On,
    /// The same; an abort says where and when (protocol 4).
    Parallel,
}

/// What is asked of START_REPLICATION.
#[derive(Clone, Debug)]
pub struct StartOptions {
    /// The slot.
    pub slot: String,
    /// The publication.
    pub publication: String,
    /// Transactions with a commit LSN before it are not sent.
    pub start: Lsn,
    /// pgoutput's protocol version, 1 to 4.
    pub protocol: u8,
    /// Whether transactions are sent while they are in progress.
    pub streaming: Streaming,
    /// Whether logical messages are sent.
    pub messages: bool,
    /// What status updates confirm until told otherwise: the slot's `confirmed_flush_lsn`.
    pub confirmed: Lsn,
    /// Time between unprompted status updates.
    pub status_every: Duration,
}

/// A replication connection that takes commands.
pub struct ReplicationClient {
    stream: MessageStream,
}

/// A receive window of this size keeps the walsender's small packets merging (limits.md, "the two modes").
const RECEIVE_BUFFER_BYTES: u32 = 128 << 10;

type Rows = Vec<Vec<Option<String>>>;

impl ReplicationClient {
    /// Connects, in the attempts that `sslmode` allows, within `connect_timeout`.
    ///
    /// # Errors
    /// As classified by [`SourceError`].
    pub async fn connect(config: &ConnectConfig) -> Result<ReplicationClient, SourceError> {
        let connecting = async {
            let mut last = None;
            for &encryption in attempts(config) {
                let connected = match Transport::connect(config, encryption, Some(RECEIVE_BUFFER_BYTES)).await {
                    Ok(transport) => startup::start(config, transport).await,
                    Err(error) => Err(error),
                };
                match connected {
                    Err(error) if tries_next(&error) => last = Some(error),
                    done => return done,
                }
            }
            Err(last.unwrap_or_else(|| {
                let error = std::io::Error::new(std::io::ErrorKind::Unsupported, "sslmode allows no way to connect");
                SourceError::Connect { target: config.target(), error }
            }))
        };
        match timeout(config.connect_timeout, connecting).await {
            Ok(stream) => Ok(ReplicationClient { stream: stream? }),
            Err(_) => {
                let what = format!("connecting to {} for replication", config.target());
                Err(SourceError::Timeout { what, after: config.connect_timeout })
            }
        }
    }

    /// IDENTIFY_SYSTEM.
    ///
    /// # Errors
    /// When the connection is lost or the answer makes no sense.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, SourceError> {
        let rows = self.simple_query("IDENTIFY_SYSTEM", "IDENTIFY_SYSTEM").await?;
        let cell = |index: usize| rows.first().and_then(|row| row.get(index)).and_then(Option::as_deref);
        let identity = (|| {
            Some(SystemIdentity {
                system_identifier: cell(0)?.to_owned(),
                timeline: cell(1)?.parse().ok()?,
                wal_end: cell(2)?.parse().ok()?,
            })
        })();
        identity.ok_or_else(|| SourceError::Protocol {
            what: "IDENTIFY_SYSTEM",
            offset: 0,
            reason: "the answer lacks a column".into(),
        })
    }

    /// TIMELINE_HISTORY: the ancestors of `timeline`, oldest first. Timeline 1 has none.
    ///
    /// # Errors
    /// When the server has no such history.
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<Vec<TimelineSwitch>, SourceError> {
        if timeline <= 1 {
            return Ok(Vec::new());
        }
        let rows = self.simple_query(&format!("TIMELINE_HISTORY {timeline}"), "TIMELINE_HISTORY").await?;
        let content = rows.into_iter().next().and_then(|row| row.into_iter().nth(1)).flatten().unwrap_or_default();
        parse_history(&content)
    }

    /// Runs one command of the simple protocol; rows as text.
    ///
    /// # Errors
    /// The server's error, or a lost connection. `during` is what the error says was being done.
    pub async fn simple_query(&mut self, query: &str, during: &str) -> Result<Rows, SourceError> {
        let mut out = BytesMut::new();
        frontend::query(query, &mut out).map_err(|error| self.stream.lost(&error.to_string()))?;
        self.stream.send(&out).await?;
        let mut rows = Vec::new();
        let mut failed = None;
        loop {
            match self.stream.next(during).await {
                Ok(Message::DataRow(body)) => rows.push(row_of(&body)),
                Ok(Message::ReadyForQuery(_)) => break,
                Ok(_) => {}
                Err(error @ SourceError::Server { .. }) => failed = Some(error),
                Err(error) => return Err(error),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(rows),
        }
    }

    /// START_REPLICATION; from here on the connection is a reader and a writer that know nothing of each other.
    ///
    /// # Errors
    /// The server's error: 55006 when the slot is active, 42704 when it is missing, 55000 when it is lost.
    pub async fn start_replication(mut self, options: &StartOptions) -> Result<(FrameReader, Feedback), SourceError> {
        let mut plugin = format!(
            "proto_version '{}', publication_names {}",
            options.protocol,
            quote_literal(&quote_identifier(&options.publication))
        );
        match options.streaming {
            Streaming::Off => {}
            Streaming::On => plugin.push_str(", streaming 'on'"),
            Streaming::Parallel => plugin.push_str(", streaming 'parallel'"),
        }
        if options.messages {
            plugin.push_str(", messages 'true'");
        }
        let command =
            format!("START_REPLICATION SLOT {} LOGICAL {} ({plugin})", quote_identifier(&options.slot), options.start);
        let mut out = BytesMut::new();
        frontend::query(&command, &mut out).map_err(|error| self.stream.lost(&error.to_string()))?;
        self.stream.send(&out).await?;
        loop {
            match self.stream.wait_for_message().await? {
                b'W' => {
                    self.stream.skip_message();
                    break;
                }
                b'E' => {
                    if let Ok(Some(Message::ErrorResponse(body))) = Message::parse(&mut self.stream.buffer) {
                        return Err(server_error("START_REPLICATION", &body));
                    }
                    return Err(self.stream.lost("an unreadable error"));
                }
                _ => self.stream.skip_message(),
            }
        }
        let closer = self.stream.transport.closer().map_err(|error| self.stream.lost(&error.to_string()))?;
        let arrivals = self.stream.transport.arrivals();
        let (read_half, write_half) = tokio::io::split(self.stream.transport);
        let feedback = feedback::spawn(write_half, closer, options.confirmed, options.status_every);
        let reading = (Box::new(read_half) as _, arrivals);
        let reader = FrameReader::new(reading, &self.stream.buffer, feedback.clone(), self.stream.target);
        Ok((reader, feedback))
    }
}

fn row_of(body: &postgres_protocol::message::backend::DataRowBody) -> Vec<Option<String>> {
    use tokio_postgres::fallible_iterator::FallibleIterator;
    let mut cells = Vec::new();
    let mut ranges = body.ranges();
    while let Ok(Some(range)) = ranges.next() {
        cells.push(range.map(|range| String::from_utf8_lossy(&body.buffer()[range]).into_owned()));
    }
    cells
}

/// Lines of `<timeline> TAB <LSN> TAB <reason>`; `#` begins a comment.
fn parse_history(content: &str) -> Result<Vec<TimelineSwitch>, SourceError> {
    let mut switches = Vec::new();
    for line in content.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let mut fields = line.split_ascii_whitespace();
        let switch = (|| {
            let timeline = fields.next()?.parse().ok()?;
            let at = fields.next()?.parse().ok()?;
            Some(TimelineSwitch { timeline, at })
        })();
        switches.push(switch.ok_or_else(|| SourceError::Protocol {
            what: "TIMELINE_HISTORY",
            offset: 0,
            reason: "a line has no timeline and LSN".into(),
        })?);
    }
    Ok(switches)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn history_files_are_read() {
        let content = "1\t0/3000158\tno recovery target specified\n\n# x\n2\t0/50000A0\tat restore point \"a b\"\n";
        let switches = parse_history(content).unwrap();
        assert_eq!(switches.len(), 2);
        assert_eq!(switches[1], TimelineSwitch { timeline: 2, at: Lsn(0x50000A0) });
        assert!(parse_history("1 nonsense").is_err());
    }
}
