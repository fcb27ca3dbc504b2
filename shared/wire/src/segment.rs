//! The body of a data segment.
//!
//! Layout, all integers little endian:
//!
//! ```text
//! u8   version (1)
//! u8   codec: 0 none, 1 lz4 (one block, safe frame)
//! u32  length of the content before packing
//! ...  content, packed
//!
//! content:
//! u32  number of transactions, then each: u64 commit LSN, u32 xid, i64 commit time (µs since 1970)
//! u32  number of tables, then each:
//!        u32 length, JSON of the TableSchema
//!        u32 length, Arrow IPC stream: schema, one record batch
//! ```
//!
//! A segment says everything about itself, so that a reader needs no registry to decode one. The compatibility test
//! decodes segments that earlier versions wrote (`tests/fixtures`).

use std::io::Cursor;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::ArrowError;
use bytes::Bytes;
use wallaby_model::change::arrow_schema;
use wallaby_model::{Codec, Lsn, SegmentBody, TableChanges, TableSchema, Transaction};

/// The version that is written.
pub const VERSION: u8 = 1;
/// No segment may unpack to more than this: bounds what a hostile length can make us allocate.
pub const CONTENT_BYTES_MAX: usize = 256 << 20;
const HEADER_BYTES: usize = 6;

/// Why bytes are not a segment.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// Written by a newer WALlaby.
    #[error("segment version {0} is newer than this program understands (1): upgrade the readers first")]
    Version(u8),
    /// Packed in a way that this program does not know.
    #[error("segment codec {0} is unknown")]
    Codec(u8),
    /// Cut short, or lengths that do not fit.
    #[error("segment is damaged at byte {0}")]
    Damaged(usize),
    /// The lz4 block does not unpack.
    #[error("segment does not unpack: {0}")]
    Unpack(#[from] lz4_flex::block::DecompressError),
    /// Too large.
    #[error("segment content of {0} bytes is above the limit of {CONTENT_BYTES_MAX}")]
    TooLarge(usize),
    /// The table's shape is not JSON of a `TableSchema`.
    #[error("segment has an unreadable table shape: {0}")]
    Schema(#[from] serde_json::Error),
    /// The rows are not an Arrow IPC stream.
    #[error("segment has unreadable rows: {0}")]
    Arrow(#[from] ArrowError),
    /// The rows do not fit the shape that stands beside them.
    #[error("segment rows of {0} do not fit their shape")]
    Mismatch(wallaby_model::TableName),
}

/// Packs a body.
///
/// # Errors
/// When the content is too large, or Arrow refuses a batch.
pub fn encode(body: &SegmentBody, codec: Codec) -> Result<Bytes, SegmentError> {
    let content = encode_content(body)?;
    let length = u32::try_from(content.len()).map_err(|_| SegmentError::TooLarge(content.len()))?;
    if content.len() > CONTENT_BYTES_MAX {
        return Err(SegmentError::TooLarge(content.len()));
    }
    let mut out;
    match codec {
        Codec::None => {
            out = Vec::with_capacity(HEADER_BYTES + content.len());
            out.extend_from_slice(&[VERSION, 0]);
            out.extend_from_slice(&length.to_le_bytes());
            out.extend_from_slice(&content);
        }
        Codec::Lz4 => {
            out = vec![0; HEADER_BYTES + lz4_flex::block::get_maximum_output_size(content.len())];
            out[..2].copy_from_slice(&[VERSION, 1]);
            out[2..HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
            let packed = lz4_flex::block::compress_into(&content, &mut out[HEADER_BYTES..])
                .map_err(|_| SegmentError::TooLarge(content.len()))?;
            out.truncate(HEADER_BYTES + packed);
        }
    }
    Ok(Bytes::from(out))
}

fn encode_content(body: &SegmentBody) -> Result<Vec<u8>, SegmentError> {
    let mut out = Vec::with_capacity(192 << 10);
    put_length(&mut out, body.transactions.len())?;
    for transaction in &body.transactions {
        out.extend_from_slice(&transaction.commit.0.to_le_bytes());
        out.extend_from_slice(&transaction.xid.to_le_bytes());
        out.extend_from_slice(&transaction.committed_at_micros.to_le_bytes());
    }
    put_length(&mut out, body.tables.len())?;
    for table in &body.tables {
        let schema = serde_json::to_vec(table.schema.as_ref())?;
        put_length(&mut out, schema.len())?;
        out.extend_from_slice(&schema);
        let length_at = out.len();
        out.extend_from_slice(&[0; 4]);
        let rows_at = out.len();
        // IPC aligns buffers within the stream, so the stream itself is written to its own start.
        let mut writer = StreamWriter::try_new(Cursor::new(Vec::new()), &table.rows.schema())?;
        writer.write(&table.rows)?;
        writer.finish()?;
        out.extend_from_slice(writer.into_inner()?.get_ref());
        let length = u32::try_from(out.len() - rows_at).map_err(|_| SegmentError::TooLarge(out.len()))?;
        out[length_at..rows_at].copy_from_slice(&length.to_le_bytes());
    }
    Ok(out)
}

fn put_length(out: &mut Vec<u8>, length: usize) -> Result<(), SegmentError> {
    let length = u32::try_from(length).map_err(|_| SegmentError::TooLarge(length))?;
    out.extend_from_slice(&length.to_le_bytes());
    Ok(())
}

/// Unpacks a body and checks that every batch fits its shape.
///
/// # Errors
/// When the bytes are not a segment of a version that is understood.
pub fn decode(bytes: &[u8]) -> Result<SegmentBody, SegmentError> {
    let Some((header, packed)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(SegmentError::Damaged(bytes.len()));
    };
    if header[0] != VERSION {
        return Err(SegmentError::Version(header[0]));
    }
    let length = u32::from_le_bytes([header[2], header[3], header[4], header[5]]) as usize;
    if length > CONTENT_BYTES_MAX {
        return Err(SegmentError::TooLarge(length));
    }
    match header[1] {
        0 if packed.len() == length => decode_content(packed),
        0 => Err(SegmentError::Damaged(bytes.len())),
        1 => {
            // lz4 cannot shrink below 1/255: a larger claim is not worth the allocation.
            if length / 255 > packed.len() {
                return Err(SegmentError::Damaged(bytes.len()));
            }
            let mut content = vec![0; length];
            let unpacked = lz4_flex::block::decompress_into(packed, &mut content)?;
            if unpacked != length {
                return Err(SegmentError::Damaged(bytes.len()));
            }
            decode_content(&content)
        }
        other => Err(SegmentError::Codec(other)),
    }
}

/// Reads fixed-size pieces off the front of the content.
struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], SegmentError> {
        let end = self.at.checked_add(length).ok_or(SegmentError::Damaged(self.at))?;
        let piece = self.bytes.get(self.at..end).ok_or(SegmentError::Damaged(self.at))?;
        self.at = end;
        Ok(piece)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], SegmentError> {
        let at = self.at;
        self.take(N)?.try_into().map_err(|_| SegmentError::Damaged(at))
    }

    fn length(&mut self) -> Result<usize, SegmentError> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }
}

fn decode_content(bytes: &[u8]) -> Result<SegmentBody, SegmentError> {
    let mut input = Input { bytes, at: 0 };
    let count = input.length()?;
    let mut transactions = Vec::with_capacity(count.min(bytes.len() / 20));
    for _ in 0..count {
        transactions.push(Transaction {
            commit: Lsn(u64::from_le_bytes(input.array()?)),
            xid: u32::from_le_bytes(input.array()?),
            committed_at_micros: i64::from_le_bytes(input.array()?),
        });
    }
    let count = input.length()?;
    let mut tables = Vec::with_capacity(count.min(bytes.len() / 8));
    for _ in 0..count {
        let length = input.length()?;
        let schema: TableSchema = serde_json::from_slice(input.take(length)?)?;
        let length = input.length()?;
        let rows = decode_rows(input.take(length)?, &schema)?;
        let table = TableChanges { schema: Arc::new(schema), rows };
        if !table.is_well_formed(transactions.len()) {
            return Err(SegmentError::Mismatch(table.schema.table.clone()));
        }
        tables.push(table);
    }
    if input.at != bytes.len() {
        return Err(SegmentError::Damaged(input.at));
    }
    Ok(SegmentBody { transactions, tables })
}

fn decode_rows(bytes: &[u8], schema: &TableSchema) -> Result<RecordBatch, SegmentError> {
    let mut reader = StreamReader::try_new(Cursor::new(bytes), None)?;
    let rows = match reader.next() {
        Some(batch) => batch?,
        None => RecordBatch::new_empty(arrow_schema(schema)),
    };
    if reader.next().is_some() {
        return Err(SegmentError::Mismatch(schema.table.clone()));
    }
    Ok(rows)
}
