//! Rows of `COPY … (FORMAT binary)` into a growing batch.

use std::sync::Arc;

use wallaby_model::{ColumnType, Lsn, Op, SegmentBody, TableSchema, Transaction};

use super::{RowHead, TableBuilder};
use crate::assemble::column::binary::Wire;
use crate::error::SourceError;

/// What stands before the first row: a signature, flags, and the length of an extension.
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
const HEADER_BYTES: usize = SIGNATURE.len() + 8;
/// Rows that share a change LSN. Positions only have to ascend; this keeps the index within 32 bits.
const ROWS_PER_CHANGE: u64 = 1 << 31;

/// One row as it lies in the received bytes.
struct Span {
    /// Its bytes, the field count included.
    length: usize,
    /// Bytes of its values.
    values: usize,
}

/// What comes next in the received bytes.
enum Next {
    Row(Span),
    /// The row, or the trailer, is not whole yet.
    Partial,
    End,
}

/// Collects the rows of one table, all of them inserts of one transaction at the snapshot's point.
pub(crate) struct CopiedRows {
    table: TableBuilder,
    wires: Vec<Wire>,
    transaction: Transaction,
    /// Bytes that are received and not taken: the beginning of a row.
    carry: Vec<u8>,
    rows_before: u64,
    content_bytes: usize,
    part_bytes: usize,
    has_header: bool,
    has_ended: bool,
}

impl CopiedRows {
    /// `part_bytes` is the content at which a part is cut; a single larger row is a part of its own.
    pub(crate) fn new(schema: Arc<TableSchema>, transaction: Transaction, part_bytes: usize) -> CopiedRows {
        let wire = |kind| match kind {
            ColumnType::Numeric => Wire::Numeric,
            ColumnType::Jsonb => Wire::Jsonb,
            _ => Wire::Plain,
        };
        let wires = schema.columns.iter().map(|column| wire(column.kind)).collect();
        let table = TableBuilder::new(schema);
        let content_bytes = table.overhead_bytes();
        CopiedRows {
            table,
            wires,
            transaction,
            carry: Vec::new(),
            rows_before: 0,
            content_bytes,
            part_bytes,
            has_header: false,
            has_ended: false,
        }
    }

    /// Rows that were taken since the last part.
    pub(crate) fn rows(&self) -> usize {
        self.table.rows()
    }

    /// Whether the trailer was seen: without it the copy is not whole.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Takes rows from the front of `data` until it is used up or a part is full; returns what is left of it and whether
    /// a part is full.
    pub(crate) fn take<'d>(&mut self, data: &'d [u8]) -> Result<(&'d [u8], bool), SourceError> {
        if self.carry.is_empty() {
            return self.take_whole(data);
        }
        // A row that came in pieces: the server sends whole rows, so this is no hot path.
        let mut carry = std::mem::take(&mut self.carry);
        carry.extend_from_slice(data);
        let (rest, is_full) = self.take_whole(&carry)?;
        if is_full {
            self.carry = rest.to_vec();
        }
        Ok((&[], is_full))
    }

    fn take_whole<'d>(&mut self, mut data: &'d [u8]) -> Result<(&'d [u8], bool), SourceError> {
        if !self.has_header {
            match header_length(data)? {
                Some(length) => data = &data[length..],
                None => {
                    self.carry.extend_from_slice(data);
                    return Ok((&[], false));
                }
            }
            self.has_header = true;
        }
        while !data.is_empty() {
            match self.scan(data)? {
                Next::Row(span) => {
                    let bytes = self.table.row_bytes + span.values;
                    if self.table.rows() > 0 && self.content_bytes + bytes > self.part_bytes {
                        return Ok((data, true));
                    }
                    self.push(&data[2..span.length])?;
                    self.content_bytes += bytes;
                    data = &data[span.length..];
                    if self.content_bytes >= self.part_bytes {
                        // One huge row: it does not wait for the next one, which may be as large.
                        return Ok((data, true));
                    }
                }
                Next::Partial => {
                    self.carry.extend_from_slice(data);
                    return Ok((&[], false));
                }
                Next::End => {
                    self.has_ended = true;
                    return if data.len() == 2 { Ok((&[], false)) } else { Err(odd(2, "data after the end")) };
                }
            }
        }
        Ok((data, false))
    }

    #[inline]
    fn scan(&self, data: &[u8]) -> Result<Next, SourceError> {
        let Some((count, mut rest)) = data.split_first_chunk::<2>() else { return Ok(Next::Partial) };
        let count = i16::from_be_bytes(*count);
        if count == -1 {
            return Ok(Next::End);
        }
        if self.has_ended || usize::try_from(count) != Ok(self.wires.len()) {
            return Err(odd(0, "a row has another number of columns than was asked for"));
        }
        let mut values = 0;
        for _ in 0..count {
            let Some((length, after)) = rest.split_first_chunk::<4>() else { return Ok(Next::Partial) };
            let length = i32::from_be_bytes(*length);
            rest = match usize::try_from(length) {
                Ok(length) if length > after.len() => return Ok(Next::Partial),
                Ok(length) => {
                    values += length;
                    &after[length..]
                }
                Err(_) if length == -1 => after,
                Err(_) => return Err(odd(data.len() - rest.len(), "a negative length")),
            };
        }
        Ok(Next::Row(Span { length: data.len() - rest.len(), values }))
    }

    /// Appends a row that [`CopiedRows::scan`] found whole.
    fn push(&mut self, mut fields: &[u8]) -> Result<(), SourceError> {
        let number = self.rows_before + self.table.rows() as u64;
        let head = RowHead {
            txn: 0,
            change: Lsn(number / ROWS_PER_CHANGE),
            index: (number % ROWS_PER_CHANGE) as u32 + 1,
            op: Op::Insert,
        };
        self.table.push_head(head);
        self.table.absent.push_null();
        for index in 0..self.wires.len() {
            let Some((length, after)) = fields.split_first_chunk::<4>() else { return Err(odd(0, "a row ends early")) };
            let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
                self.table.columns[index].push_null();
                fields = after;
                continue;
            };
            let Some((value, after)) = after.split_at_checked(length) else { return Err(odd(0, "a row ends early")) };
            if let Err(bad) = self.table.columns[index].push_binary(self.wires[index], value) {
                return Err(self.table.bad_value(index, bad.0));
            }
            fields = after;
        }
        Ok(())
    }

    /// Gives the rows away as a part; one without rows says the shape.
    pub(crate) fn take_part(&mut self) -> Result<SegmentBody, SourceError> {
        self.rows_before += self.table.rows() as u64;
        self.content_bytes = self.table.overhead_bytes();
        Ok(SegmentBody { transactions: vec![self.transaction], tables: vec![self.table.finish()?] })
    }
}

/// The length of the header, once it is whole.
fn header_length(data: &[u8]) -> Result<Option<usize>, SourceError> {
    let Some((header, rest)) = data.split_at_checked(HEADER_BYTES) else { return Ok(None) };
    if !header.starts_with(SIGNATURE) {
        return Err(odd(0, "the signature of binary COPY is missing"));
    }
    let extension = u32::from_be_bytes([header[15], header[16], header[17], header[18]]) as usize;
    Ok((rest.len() >= extension).then_some(HEADER_BYTES + extension))
}

fn odd(offset: usize, reason: &str) -> SourceError {
    SourceError::Protocol { what: "binary COPY", offset, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;
    use wallaby_model::{Column, ReplicaIdentity, TableName};

    fn schema() -> Arc<TableSchema> {
        let column = |name: &str, kind, oid| Column {
            name: name.into(),
            kind,
            sql_type: String::new(),
            type_oid: oid,
            type_modifier: -1,
            identity: false,
            not_null: false,
        };
        Arc::new(TableSchema {
            oid: 1,
            table: TableName::new("public", "t"),
            identity: ReplicaIdentity::Default,
            columns: vec![column("a", ColumnType::Int4, 23), column("b", ColumnType::Text, 25)],
            primary_key: Vec::new(),
        })
    }

    fn copied(part_bytes: usize) -> CopiedRows {
        let transaction = Transaction { commit: Lsn(9), xid: 0, committed_at_micros: 0 };
        CopiedRows::new(schema(), transaction, part_bytes)
    }

    fn stream(rows: u32) -> Vec<u8> {
        let mut data = SIGNATURE.to_vec();
        data.extend_from_slice(&[0; 8]);
        for row in 0..rows {
            data.extend_from_slice(&2i16.to_be_bytes());
            data.extend_from_slice(&4i32.to_be_bytes());
            data.extend_from_slice(&row.to_be_bytes());
            if row % 3 == 0 {
                data.extend_from_slice(&(-1i32).to_be_bytes());
            } else {
                data.extend_from_slice(&3i32.to_be_bytes());
                data.extend_from_slice(b"abc");
            }
        }
        data.extend_from_slice(&(-1i16).to_be_bytes());
        data
    }

    fn collect(copied: &mut CopiedRows, pieces: &[&[u8]]) -> Result<Vec<SegmentBody>, SourceError> {
        let mut parts = Vec::new();
        for piece in pieces {
            let mut rest = *piece;
            loop {
                let (left, is_full) = copied.take(rest)?;
                rest = left;
                if !is_full {
                    break;
                }
                parts.push(copied.take_part()?);
            }
        }
        parts.push(copied.take_part()?);
        Ok(parts)
    }

    proptest! {
        #[test]
        fn rows_come_out_whole_and_in_order_however_they_are_cut(rows in 0u32..60, cuts in proptest::collection::vec(0usize..900, 0..12), part in 2000usize..4000) {
            let data = stream(rows);
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut < data.len()).collect();
            cuts.extend([0, data.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|ends| &data[ends[0]..ends[1]]).collect();
            let mut copied = copied(part);
            let parts = collect(&mut copied, &pieces).unwrap();
            prop_assert!(copied.has_ended());
            let positions: Vec<_> = parts
                .iter()
                .flat_map(|part| (0..part.rows()).map(|row| part.tables[0].position(row, &part.transactions)))
                .collect();
            prop_assert_eq!(positions.len(), rows as usize);
            prop_assert!(positions.windows(2).all(|two| two[0] < two[1]));
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut data = SIGNATURE.to_vec();
            data.extend_from_slice(&[0; 8]);
            data.extend_from_slice(&bytes);
            let _ = collect(&mut copied(2000), &[&data]);
            let _ = collect(&mut copied(2000), &[&bytes]);
        }
    }
}
