//! `tasks/<T>/checkpoint`: how far a task came. A hint for its successor and a witness against a lost log; the truth is in
//! the log and in the sink.

use serde::{Deserialize, Serialize};
use wallaby_model::condition::Timestamp;
use wallaby_model::{Epoch, Position};

/// Where a task stands, as its owner reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Staged (capture) or applied (apply), durable.
    pub position: Position,
    /// The log's stream.
    pub stream: Option<String>,
    /// The stream sequence that goes with the position. A hint: sequences can be reused after a loss of data.
    pub seq_hint: Option<u64>,
}

/// Which server the positions of a flow belong to. Positions of another one say nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSeen {
    /// `IDENTIFY_SYSTEM`'s system identifier.
    pub system_identifier: String,
    /// `IDENTIFY_SYSTEM`'s timeline.
    pub timeline: u32,
}

/// A stored checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The epoch of the owner that wrote it.
    pub epoch: Epoch,
    /// `None`: nothing was ever staged (or applied) by this task.
    pub position: Option<Position>,
    /// The log's stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// The stream sequence that goes with the position; a hint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq_hint: Option<u64>,
    /// Capture: the server that was read last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceSeen>,
    /// When its position was written.
    pub at: Timestamp,
}

impl Checkpoint {
    pub(crate) fn of(epoch: Epoch, mark: Mark, source: Option<SourceSeen>, at: Timestamp) -> Checkpoint {
        let Mark { position, stream, seq_hint } = mark;
        Checkpoint { epoch, position: Some(position), stream, seq_hint, source, at }
    }
}

/// The epoch of an ownership (protocol.md, "Epoch"): above everything that was seen. The lock's create revision alone is
/// not: a restore of etcd can lower revisions.
pub(crate) fn epoch_above(
    create_revision: i64,
    last_elsewhere: Option<Epoch>,
    last_checkpoint: Option<Epoch>,
) -> Epoch {
    let revision = u64::try_from(create_revision).unwrap_or(0);
    let seen = last_elsewhere.max(last_checkpoint).map_or(0, |epoch| epoch.0.saturating_add(1));
    Epoch(revision.max(seen))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_above_all_that_was_seen() {
        assert_eq!(epoch_above(40, None, None), Epoch(40));
        assert_eq!(epoch_above(40, Some(Epoch(7)), Some(Epoch(8))), Epoch(40));
        assert_eq!(epoch_above(40, Some(Epoch(90)), None), Epoch(91));
        assert_eq!(epoch_above(40, None, Some(Epoch(90))), Epoch(91));
        assert_eq!(epoch_above(40, Some(Epoch(40)), None), Epoch(41));
    }
}
