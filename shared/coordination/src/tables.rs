//! Which table stood behind each published name of a flow when its rows were last accounted for.
//!
//! A name alone does not say that: a table is dropped and made again, or renamed into the place of another one, and what it had before
//! is not in the WAL under this name.

use std::collections::{BTreeMap, BTreeSet};

use etcd_client::TxnOp;
use serde::{Deserialize, Serialize};
use wallaby_model::{FlowId, RunId, TableName};

use crate::keys::Key;
use crate::lock::TaskLock;
use crate::packed::encode_packed;
use crate::{Coordination, Result};

/// A table as it was when its rows were last accounted for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownTable {
    /// Its oid; 0 when it was not published, or not there: whatever stands there next is loaded.
    pub oid: u32,
    /// Its place in the publication (`pg_publication_rel.oid`); 0 for none of its own. Also while its run is awaited.
    pub member: u32,
    /// The last run that had been made by then (0: none): only a later one can have read what took its place.
    pub since: RunId,
    /// The run that was made to load what has its name now, until that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<RunId>,
    /// Of a partitioned table: the partitions whose rows are accounted for, each with what tells where it was attached. `None` before
    /// they were looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partitions: Option<BTreeMap<u32, i32>>,
    /// Partitions, by oid, that were attached with rows, and wait for a person to say what is to become of them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub attached: BTreeSet<u32>,
}

impl KnownTable {
    /// A table whose rows are accounted for, as far as its partitions are.
    pub fn new(oid: u32, member: u32, since: RunId) -> KnownTable {
        KnownTable { oid, member, since, asked: None, partitions: None, attached: BTreeSet::new() }
    }

    /// One that is not published.
    pub fn unknown(since: RunId) -> KnownTable {
        KnownTable::new(0, 0, since)
    }
}

/// As it is stored: names are of two parts, and no keys of JSON.
#[derive(Serialize, Deserialize)]
struct Stored {
    table: TableName,
    known: KnownTable,
}

impl Coordination {
    /// The tables of a flow as its capture saw them last; `None` before it looked.
    ///
    /// # Errors
    /// `Malformed`; when etcd cannot be reached.
    pub async fn known_tables(&self, flow: &FlowId) -> Result<Option<BTreeMap<TableName, KnownTable>>> {
        let Some(entry) = self.get(&Key::FlowTables(flow.clone())).await? else { return Ok(None) };
        let stored: Vec<Stored> = entry.decode()?;
        Ok(Some(stored.into_iter().map(|stored| (stored.table, stored.known)).collect()))
    }
}

impl TaskLock {
    /// Capture: writes which tables it knows.
    ///
    /// # Errors
    /// `LockLost`; `TooLarge`; when etcd cannot be reached (then it may have been done).
    pub async fn put_known_tables(&self, tables: &BTreeMap<TableName, KnownTable>) -> Result<()> {
        let stored = |(table, known): (&TableName, &KnownTable)| Stored { table: table.clone(), known: known.clone() };
        let stored: Vec<Stored> = tables.iter().map(stored).collect();
        let key = self.coordination().keys().text(&Key::FlowTables(self.task().flow.clone()));
        let value = encode_packed(&key, &stored)?;
        self.guarded("writing the known tables", Vec::new(), vec![TxnOp::put(key, value, None)], Vec::new()).await?;
        Ok(())
    }
}
