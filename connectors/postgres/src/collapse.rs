//! The net effect of a run of changes, merged column by column. Pure: reads Arrow, says what is to be done.
//!
//! A sink that keeps state needs to know only how each key ends up. Three things make that more than "the last row wins":
//!
//! - An update may leave out a column whose TOAST value did not change. The value then is the one of the row's previous
//!   change in the run, followed across key changes; else it stands at the sink and is left alone.
//! - A row that changed its key while such a column is still unknown is a *move*: the column comes from the sink's row
//!   under the key that the row had when the run began. All moves are read before anything is written, so chains
//!   (1 → 2 while 2 → 3) and cycles need no order.
//! - A table without a key is a bag of rows: what counts is how often each whole row was added or taken away.

use std::collections::HashMap;
use std::collections::hash_map::{Entry as MapEntry, RandomState};
use std::hash::{BuildHasher, BuildHasherDefault, Hasher};
use std::sync::Arc;

use wallaby_model::change::FIRST_COLUMN;
use wallaby_model::{Op, Position, SegmentBody, TableChanges, TableName};

use crate::encode::{BadValue, Values, Wire};

/// Rows of one table in one shape, with the transactions that they name.
#[derive(Clone)]
pub(crate) struct Chunk {
    /// The segment that they are from.
    pub body: Arc<SegmentBody>,
    /// The rows.
    pub changes: TableChanges,
}

impl Chunk {
    /// The position of a row.
    pub(crate) fn position(&self, row: usize) -> Position {
        self.changes.position(row, &self.body.transactions)
    }
}

/// Chunks of one shape with their columns bound for writing.
pub(crate) struct Bound<'a> {
    pub chunks: &'a [Chunk],
    columns: Vec<Vec<Values<'a>>>,
}

impl<'a> Bound<'a> {
    /// Binds all columns; `wires` says how each is sent, in the order of the shape's columns.
    pub(crate) fn new(chunks: &'a [Chunk], wires: &[Wire]) -> Bound<'a> {
        let bind = |chunk: &'a Chunk| {
            let columns = chunk.changes.schema.columns.iter().zip(wires).enumerate();
            columns
                .map(|(index, (column, &wire))| {
                    Values::bind(chunk.changes.rows.column(FIRST_COLUMN + index), column.kind, wire)
                })
                .collect()
        };
        Bound { chunks, columns: chunks.iter().map(bind).collect() }
    }

    /// Writes one value as a field.
    pub(crate) fn write(&self, at: At, column: usize, out: &mut Vec<u8>) -> Result<(), BadValue> {
        self.columns[at.chunk as usize][column].write(at.row as usize, out)
    }

    /// The position of a row.
    pub(crate) fn position(&self, at: At) -> Position {
        self.chunks[at.chunk as usize].position(at.row as usize)
    }
}

/// A row of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct At {
    chunk: u32,
    row: u32,
}

/// In the place of a cell: nobody in the run knows the value.
const UNCHANGED: At = At { chunk: u32::MAX, row: u32::MAX };

impl At {
    fn is_unchanged(self) -> bool {
        self == UNCHANGED
    }
}

/// A row as it ends up: all cells of one source row, or cells of several.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// The last change of the row.
    pub at: At,
    /// Where each column's value stands, when not all stand at `at`.
    cells: Option<Arc<[At]>>,
}

impl Row {
    /// Where the value of a column stands. Not to be asked for a column that is unchanged.
    pub(crate) fn cell(&self, column: usize) -> At {
        self.cells.as_ref().map_or(self.at, |cells| cells[column])
    }
}

/// Key fields in the arena: `start..end`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeySpan {
    start: usize,
    end: usize,
}

/// Rows that leave the same columns unchanged.
#[derive(Debug)]
pub(crate) struct Group<R> {
    /// True for a column whose value is only at the sink.
    pub unchanged: Vec<bool>,
    /// The rows.
    pub rows: Vec<R>,
}

/// What a run does to a table with a key.
#[derive(Debug, Default)]
pub(crate) struct Net {
    /// Keys whose rows go.
    pub deletes: Vec<KeySpan>,
    /// Rows that the source inserted in this run: normally new to the sink too.
    pub born: Vec<Row>,
    /// Whole rows that may or may not be there.
    pub whole: Vec<Row>,
    /// Rows that keep their key and leave columns alone.
    pub partial: Vec<Group<Row>>,
    /// Rows that take columns from the sink's row under another key.
    pub moves: Vec<Group<(KeySpan, Row)>>,
    keys: Vec<u8>,
}

impl Net {
    /// The fields of a key, as they are sent.
    pub(crate) fn key(&self, span: KeySpan) -> &[u8] {
        &self.keys[span.start..span.end]
    }

    /// How many rows are written or deleted.
    pub(crate) fn rows(&self) -> usize {
        let partial: usize = self.partial.iter().map(|group| group.rows.len()).sum();
        let moves: usize = self.moves.iter().map(|group| group.rows.len()).sum();
        self.deletes.len() + self.born.len() + self.whole.len() + partial + moves
    }
}

/// Why there is no net effect.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CollapseError {
    /// A value does not have its type's form.
    #[error("a value of {0} is {1}")]
    Value(TableName, BadValue),
    /// An update or delete that does not say which row.
    #[error("an update or delete of {0} at {1} does not say which row it was")]
    WhichRow(TableName, Position),
}

/// The hashes are made by a keyed hash already.
#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 keys are hashed");
    }
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

const NONE: u32 = u32::MAX;

/// Byte strings to dense numbers, in one arena and without an allocation per key.
struct Keys {
    arena: Vec<u8>,
    spans: Vec<(KeySpan, u32)>,
    heads: HashMap<u64, u32, BuildHasherDefault<Identity>>,
    hasher: RandomState,
}

impl Keys {
    fn with_capacity(rows: usize) -> Keys {
        Keys {
            arena: Vec::with_capacity(rows * 12),
            spans: Vec::with_capacity(rows),
            heads: HashMap::with_capacity_and_hasher(rows, BuildHasherDefault::default()),
            hasher: RandomState::new(),
        }
    }

    /// The number of the key that was written to the arena from `start` on, and whether it is new.
    fn number(&mut self, start: usize) -> (u32, bool) {
        let end = self.arena.len();
        let mut hasher = self.hasher.build_hasher();
        hasher.write(&self.arena[start..end]);
        let number = u32::try_from(self.spans.len()).unwrap_or(NONE);
        let mut next = NONE;
        match self.heads.entry(hasher.finish()) {
            MapEntry::Vacant(slot) => {
                slot.insert(number);
            }
            MapEntry::Occupied(mut slot) => {
                let head = *slot.get();
                let mut at = head;
                while at != NONE {
                    let (span, following) = self.spans[at as usize];
                    if self.arena[span.start..span.end] == self.arena[start..end] {
                        self.arena.truncate(start);
                        return (at, false);
                    }
                    at = following;
                }
                next = head;
                slot.insert(number);
            }
        }
        self.spans.push((KeySpan { start, end }, next));
        (number, true)
    }
}

/// How a key stands at this point of the run.
#[derive(Clone)]
enum State {
    /// Deleted, or moved away.
    Gone,
    /// There.
    There {
        row: Row,
        /// The run began without it.
        born: bool,
        /// The key under which its unchanged columns stand at the sink; only set when there are any.
        base: Option<u32>,
    },
}

/// The net effect on a table with a key. `key` are indexes into the shape's columns.
pub(crate) fn collapse(bound: &Bound<'_>, key: &[usize]) -> Result<Net, CollapseError> {
    let rows = bound.chunks.iter().map(|chunk| chunk.changes.rows.num_rows()).sum();
    let mut run = Run { bound, key, keys: Keys::with_capacity(rows), states: Vec::with_capacity(rows) };
    for (index, chunk) in bound.chunks.iter().enumerate() {
        run.take(index, chunk)?;
    }
    Ok(run.finish())
}

struct Run<'a> {
    bound: &'a Bound<'a>,
    key: &'a [usize],
    keys: Keys,
    /// By key number.
    states: Vec<State>,
}

impl Run<'_> {
    fn take(&mut self, index: usize, chunk: &Chunk) -> Result<(), CollapseError> {
        let changes = &chunk.changes;
        let ops = changes.op().values();
        let mut before_image = None;
        for (row, &op) in ops.iter().enumerate() {
            let at = At { chunk: index as u32, row: row as u32 };
            match Op::from_byte(op) {
                Some(Op::Insert) => {
                    let (number, is_new) = self.number(at, at)?;
                    let row = Row { at, cells: None };
                    self.set(number, State::There { row, born: is_new, base: None });
                }
                Some(Op::OldKey | Op::OldRow) => {
                    before_image = Some(at);
                    continue;
                }
                Some(Op::Update) => self.update(changes, at, before_image)?,
                Some(Op::DeleteKey | Op::DeleteRow) => {
                    let (number, _) = self.number(at, at)?;
                    self.set(number, State::Gone);
                }
                // Truncations were cut off with all before them; codecs refuse unknown operations.
                Some(Op::Truncate) | None => {}
            }
            before_image = None;
        }
        Ok(())
    }

    fn update(&mut self, changes: &TableChanges, at: At, before: Option<At>) -> Result<(), CollapseError> {
        let row = at.row as usize;
        let old = match before {
            Some(before) => self.number(before, before)?,
            None => {
                let key_is_carried = self.key.iter().all(|&column| !changes.is_unchanged(row, column));
                if !key_is_carried {
                    let position = self.bound.position(at);
                    return Err(CollapseError::WhichRow(changes.schema.table.clone(), position));
                }
                self.number(at, at)?
            }
        };
        let new = if before.is_some() { self.number(at, before.unwrap_or(at))? } else { old };
        let (old_number, old_is_new) = old;
        let previous = if old_is_new { None } else { Some(self.states[old_number as usize].clone()) };
        let born = matches!(previous, Some(State::There { born: true, .. }));
        let (row, base) = self.merge(changes, at, before, previous.as_ref(), old_number);
        if old_number != new.0 {
            self.set(old_number, State::Gone);
        }
        // Under a key that the run met before, the sink may have a row.
        let born = born && (old_number == new.0 || new.1);
        self.set(new.0, State::There { row, born, base });
        Ok(())
    }

    /// The row after an update, and the key of the sink's row that has what nobody here knows.
    fn merge(
        &self,
        changes: &TableChanges,
        at: At,
        before: Option<At>,
        previous: Option<&State>,
        old_number: u32,
    ) -> (Row, Option<u32>) {
        use arrow_array::Array;
        let row = at.row as usize;
        if changes.absent().is_null(row) {
            return (Row { at, cells: None }, None);
        }
        let before_is_whole = before.is_some_and(|b| changes.op_at(b.row as usize) == Some(Op::OldRow));
        let cell = |column: usize| {
            if !changes.is_unchanged(row, column) {
                return at;
            }
            if let Some(before) = before {
                let carried = before_is_whole || changes.schema.columns[column].identity;
                if carried && is_known(changes, before.row as usize, column) {
                    return before;
                }
            }
            match previous {
                Some(State::There { row, .. }) => row.cell(column),
                Some(State::Gone) | None => UNCHANGED,
            }
        };
        let cells: Arc<[At]> = (0..changes.schema.columns.len()).map(cell).collect();
        let base = cells.iter().any(|cell| cell.is_unchanged()).then_some(match previous {
            Some(State::There { base: Some(base), .. }) => *base,
            _ => old_number,
        });
        (Row { at, cells: Some(cells) }, base)
    }

    /// The number of the key whose fields stand in `row`; a key field that was not carried there stands in `else_in`.
    fn number(&mut self, row: At, else_in: At) -> Result<(u32, bool), CollapseError> {
        let start = self.keys.arena.len();
        let changes = &self.bound.chunks[row.chunk as usize].changes;
        for &column in self.key {
            let carried = !changes.is_unchanged(row.row as usize, column);
            let from = if carried { row } else { else_in };
            let written = self.bound.write(from, column, &mut self.keys.arena);
            written.map_err(|bad| CollapseError::Value(changes.schema.table.clone(), bad))?;
        }
        let (number, is_new) = self.keys.number(start);
        if is_new {
            self.states.push(State::Gone);
        }
        Ok((number, is_new))
    }

    fn set(&mut self, number: u32, state: State) {
        self.states[number as usize] = state;
    }

    fn finish(self) -> Net {
        let mut net = Net::default();
        let mut partial: HashMap<Vec<bool>, Vec<Row>> = HashMap::new();
        let mut moves: HashMap<Vec<bool>, Vec<(KeySpan, Row)>> = HashMap::new();
        for (number, state) in self.states.into_iter().enumerate() {
            match state {
                State::Gone => net.deletes.push(self.keys.spans[number].0),
                State::There { row, born: true, base: None } => net.born.push(row),
                State::There { row, base: None, .. } => net.whole.push(row),
                State::There { row, base: Some(base), .. } => {
                    let cells = row.cells.as_deref().unwrap_or_default();
                    let unchanged: Vec<bool> = cells.iter().map(|cell| cell.is_unchanged()).collect();
                    if base as usize == number {
                        partial.entry(unchanged).or_default().push(row);
                    } else {
                        let base = self.keys.spans[base as usize].0;
                        moves.entry(unchanged).or_default().push((base, row));
                    }
                }
            }
        }
        net.partial = partial.into_iter().map(|(unchanged, rows)| Group { unchanged, rows }).collect();
        net.moves = moves.into_iter().map(|(unchanged, rows)| Group { unchanged, rows }).collect();
        net.keys = self.keys.arena;
        net
    }
}

/// Whether a before-image knows the value of a column that its update left out. Such a value is never NULL: a NULL there is
/// what a before-image without it has, whatever its shape says of the identity (a partition's is not always its root's).
fn is_known(changes: &TableChanges, before: usize, column: usize) -> bool {
    use arrow_array::Array;
    !changes.is_unchanged(before, column) && !changes.rows.column(FIRST_COLUMN + column).is_null(before)
}

/// What a run does to a table without a key.
#[derive(Debug, Default)]
pub(crate) struct Bag {
    /// Rows to append.
    pub appends: Vec<Row>,
    /// Whole rows to take away, each that many times.
    pub removes: Vec<(Row, u32)>,
}

/// The net effect on a table without a key.
pub(crate) fn collapse_bag(bound: &Bound<'_>) -> Result<Bag, CollapseError> {
    let rows = bound.chunks.iter().map(|chunk| chunk.changes.rows.num_rows()).sum();
    let all_inserts = |chunk: &Chunk| chunk.changes.op().values().iter().all(|&op| op == Op::Insert as u8);
    let mut bag = Bag::default();
    if bound.chunks.iter().all(all_inserts) {
        bag.appends.reserve(rows);
        for (index, chunk) in bound.chunks.iter().enumerate() {
            let ats = (0..chunk.changes.rows.num_rows()).map(|row| At { chunk: index as u32, row: row as u32 });
            bag.appends.extend(ats.map(|at| Row { at, cells: None }));
        }
        return Ok(bag);
    }
    let mut counts = Counts { bound, keys: Keys::with_capacity(rows), counts: Vec::new() };
    for (index, chunk) in bound.chunks.iter().enumerate() {
        let changes = &chunk.changes;
        let mut before = None;
        for row in 0..changes.rows.num_rows() {
            let at = At { chunk: index as u32, row: row as u32 };
            let whole = Row { at, cells: None };
            match changes.op_at(row) {
                Some(Op::Insert) => counts.add(whole, 1)?,
                Some(Op::DeleteRow) => counts.add(whole, -1)?,
                Some(Op::OldRow) => {
                    before = Some(at);
                    continue;
                }
                Some(Op::Update) => {
                    let which = || CollapseError::WhichRow(changes.schema.table.clone(), chunk.position(row));
                    let before = before.ok_or_else(which)?;
                    let unchanged = |&column: &usize| changes.is_unchanged(row, column);
                    let columns = 0..changes.schema.columns.len();
                    if columns.clone().filter(unchanged).any(|column| !is_known(changes, before.row as usize, column)) {
                        return Err(which());
                    }
                    let cell = |column| if unchanged(&column) { before } else { at };
                    let cells = columns.map(cell).collect();
                    counts.add(Row { at: before, cells: None }, -1)?;
                    counts.add(Row { at, cells: Some(cells) }, 1)?;
                }
                Some(Op::DeleteKey | Op::OldKey) => {
                    return Err(CollapseError::WhichRow(changes.schema.table.clone(), chunk.position(row)));
                }
                Some(Op::Truncate) | None => {}
            }
            before = None;
        }
    }
    for (row, count) in counts.counts {
        match u32::try_from(count.unsigned_abs()).unwrap_or(u32::MAX) {
            0 => {}
            times if count > 0 => bag.appends.extend((0..times).map(|_| row.clone())),
            times => bag.removes.push((row, times)),
        }
    }
    Ok(bag)
}

struct Counts<'a> {
    bound: &'a Bound<'a>,
    keys: Keys,
    /// By key number: the row's last appearance and how often it was added less how often taken away.
    counts: Vec<(Row, i64)>,
}

impl Counts<'_> {
    fn add(&mut self, row: Row, by: i64) -> Result<(), CollapseError> {
        let start = self.keys.arena.len();
        let schema = &self.bound.chunks[row.at.chunk as usize].changes.schema;
        for column in 0..schema.columns.len() {
            let written = self.bound.write(row.cell(column), column, &mut self.keys.arena);
            written.map_err(|bad| CollapseError::Value(schema.table.clone(), bad))?;
        }
        let (number, is_new) = self.keys.number(start);
        if is_new {
            self.counts.push((row, by));
        } else {
            let slot = &mut self.counts[number as usize];
            if by > 0 {
                slot.0 = row;
            }
            slot.1 += by;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use wallaby_connector_api::conformance::{Change, Log, Shape, Value};
    use wallaby_model::ColumnType;

    use super::*;

    fn chunks(changes: impl IntoIterator<Item = Change>) -> Vec<Chunk> {
        let mut log = Log::new();
        log.transaction(changes);
        let batch = log.batch();
        let parts = batch.parts.iter();
        let of_part =
            parts.flat_map(|part| part.tables().map(|changes| Chunk { body: Arc::clone(&part.body), changes }));
        of_part.collect()
    }

    #[test]
    fn h03_a_before_image_with_the_key_alone_makes_no_null_of_an_unchanged_value() {
        // The shape is the root's, with REPLICA IDENTITY FULL; the partition's WAL has the old key only.
        let shape = Shape::new("root").key("id", ColumnType::Int4).column("big", ColumnType::Text).full().build();
        let old = || vec![Value::Int(1), Value::Null];
        let new = || vec![Value::Int(2), Value::Unchanged];
        for change in [Change::update_key(&shape, old(), new()), Change::update_full(&shape, old(), new())] {
            let chunks = chunks([change]);
            let bound = Bound::new(&chunks, &[Wire::Own, Wire::Text]);
            let net = collapse(&bound, &[0]).unwrap();
            assert_eq!(net.moves.len(), 1, "{net:?}");
            assert_eq!(net.moves[0].unchanged, [false, true], "the value comes from the row of the old key");
        }
        // Where the run knows the value it follows the row.
        let born = Change::insert(&shape, vec![Value::Int(1), "value".into()]);
        let chunks = chunks([born, Change::update_key(&shape, old(), new())]);
        let bound = Bound::new(&chunks, &[Wire::Own, Wire::Text]);
        let net = collapse(&bound, &[0]).unwrap();
        let mut value = Vec::new();
        bound.write(net.born[0].cell(1), 1, &mut value).unwrap();
        assert!(value.ends_with(b"value"));
    }

    #[test]
    fn h03_a_bag_refuses_an_unchanged_value_that_its_before_image_lacks() {
        let shape = Shape::new("bag").column("id", ColumnType::Int4).column("big", ColumnType::Text).full().build();
        let update = |old: Value| Change::update_full(&shape, [Value::Int(1), old], [Value::Int(2), Value::Unchanged]);
        let outcome = |old| collapse_bag(&Bound::new(&chunks([update(old)]), &[Wire::Own, Wire::Text])).map(|_| ());
        assert!(matches!(outcome(Value::Null), Err(CollapseError::WhichRow(..))));
        outcome("value".into()).unwrap();
    }
}
