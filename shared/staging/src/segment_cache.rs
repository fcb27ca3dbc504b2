//! Where a cache of segments stands between the servers and the readers of one worker.
//!
//! The writer puts a record after its acknowledgement and never before: a record whose append was refused must not be
//! seen by any sink (hazard 21). Readers take from the cache while it has what comes next, and put what they pull.

use wallaby_model::FlowId;

use crate::pulls::SharedPulls;
use crate::record::{Incarnation, Staged};

/// Names one record. Sequences are used again after a loss of data, so the incarnation is part of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SegmentKey {
    /// The flow.
    pub flow: FlowId,
    /// The incarnation of its log.
    pub incarnation: Incarnation,
    /// The record's sequence in the stream.
    pub sequence: u64,
}

/// A byte-bounded store of records; may forget anything at any time. Called on the path of every record: must not block.
pub trait SegmentCache: Send + Sync {
    /// The record, if it is still there.
    fn get(&self, key: &SegmentKey) -> Option<Staged>;
    /// Keeps a record that the log is known to hold.
    fn put(&self, key: SegmentKey, staged: &Staged);
    /// Where its readers pull together; `None`: each pulls on its own.
    fn pulls(&self) -> Option<&SharedPulls> {
        None
    }
}
