//! The body of a data segment.
//!
//! Layout, all integers little endian:
//!
//! ```text
//! u8   version (1)
//! u8   codec: 0 none, 1 lz4 (one block, safe frame)
//! u32  length of the content before packing
//! u64  XXH64 of the packed content; its seed is the six bytes before
//! ...  content, packed
//!
//! content:
//! u32  number of transactions, then each: u64 commit LSN, u32 xid, i64 commit time (µs since 1970)
//! u32  number of tables, then each:
//!        u32 length, JSON of the TableSchema
//!        u32 length, Arrow IPC stream: schema, one record batch
//! ```
//!
//! The checksum is there because Arrow's reader trusts what it reads: damaged lengths make it panic.
//! A segment says everything about itself, so that a reader needs no registry to decode one. The compatibility test
//! decodes segments that earlier versions wrote (`tests/fixtures`).

use std::collections::HashMap;
use std::io::Cursor;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::{CompressionContext, DictionaryTracker, IpcDataGenerator, IpcWriteOptions, write_message};
use arrow_schema::{ArrowError, SchemaRef};
use bytes::Bytes;
use twox_hash::XxHash64;
use wallaby_model::change::arrow_schema;
use wallaby_model::{Codec, Lsn, SegmentBody, TableChanges, TableSchema, Transaction};

/// The version that is written.
pub const VERSION: u8 = 1;
/// No segment may unpack to more than this: bounds what a hostile length can make us allocate. A part of the side store can
/// hold one row as large as PostgreSQL sends them, which is just below 1 GiB.
pub const CONTENT_BYTES_MAX: usize = (1 << 30) + (16 << 20);
const HEADER_BYTES: usize = 14;
/// Where the length of the content stands, and where the checksum.
const LENGTH_AT: usize = 2;
const CHECKSUM_AT: usize = 6;
/// Shapes that an encoder remembers before it forgets all of them: more than a flow has at a time.
const SHAPES_MAX: usize = 4096;
/// What a segment's content is expected to need.
const CONTENT_BYTES_USUAL: usize = 256 << 10;
/// A larger buffer is not kept for the next segment: a row of hundreds of MB would stay in memory for good.
const CONTENT_BYTES_KEPT: usize = 4 << 20;
/// The end of an Arrow IPC stream: a continuation marker and a message of no length.
const END_OF_STREAM: [u8; 8] = [0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0];

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
    /// Changed on its way or on disk.
    #[error("segment is damaged: its checksum does not fit")]
    Checksum,
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

/// Packs one body; see [`SegmentEncoder`] for many.
///
/// # Errors
/// As [`SegmentEncoder::encode`].
pub fn encode(body: &SegmentBody, codec: Codec) -> Result<Bytes, SegmentError> {
    SegmentEncoder::default().encode(body, codec)
}

/// Packs bodies. Remembers of each shape the bytes that are the same in every segment, its JSON and its Arrow schema, and
/// keeps its buffers: a segment of one row costs little more than the row.
#[derive(Default)]
pub struct SegmentEncoder {
    shapes: HashMap<usize, Shape>,
    content: Vec<u8>,
    compression: CompressionContext,
}

/// What every segment says of a shape.
struct Shape {
    /// Keeps the address that is the key from being used by another shape.
    _table: Arc<TableSchema>,
    schema: SchemaRef,
    /// u32 length and JSON of the table's shape.
    json: Vec<u8>,
    /// The first message of the Arrow IPC stream.
    ipc: Vec<u8>,
}

impl Shape {
    fn new(table: &Arc<TableSchema>, schema: SchemaRef) -> Result<Shape, SegmentError> {
        let text = serde_json::to_vec(table.as_ref())?;
        let mut json = Vec::with_capacity(4 + text.len());
        put_length(&mut json, text.len())?;
        json.extend_from_slice(&text);
        let (options, mut tracker) = (IpcWriteOptions::default(), DictionaryTracker::new(false));
        let generator = IpcDataGenerator::default();
        let message = generator.schema_to_bytes_with_dictionary_tracker(&schema, &mut tracker, &options);
        let mut ipc = Vec::new();
        write_message(&mut ipc, message, &options)?;
        Ok(Shape { _table: Arc::clone(table), schema, json, ipc })
    }
}

impl SegmentEncoder {
    /// Packs a body.
    ///
    /// # Errors
    /// When the content is too large, or Arrow refuses a batch.
    pub fn encode(&mut self, body: &SegmentBody, codec: Codec) -> Result<Bytes, SegmentError> {
        let mut content = std::mem::take(&mut self.content);
        content.clear();
        // The content goes behind the header right away: unpacked, this is the segment.
        content.reserve(CONTENT_BYTES_USUAL);
        content.extend_from_slice(&[0; HEADER_BYTES]);
        self.write_content(body, &mut content)?;
        let length = content.len() - HEADER_BYTES;
        if length > CONTENT_BYTES_MAX {
            return Err(SegmentError::TooLarge(length));
        }
        let written = u32::try_from(length).map_err(|_| SegmentError::TooLarge(length))?;
        match codec {
            Codec::None => {
                seal(&mut content, 0, written);
                content.shrink_to_fit();
                Ok(Bytes::from(content))
            }
            Codec::Lz4 => {
                let mut out = vec![0; HEADER_BYTES + lz4_flex::block::get_maximum_output_size(length)];
                let packed = lz4_flex::block::compress_into(&content[HEADER_BYTES..], &mut out[HEADER_BYTES..])
                    .map_err(|_| SegmentError::TooLarge(length))?;
                if content.capacity() > CONTENT_BYTES_KEPT {
                    content = Vec::new();
                }
                out.truncate(HEADER_BYTES + packed);
                seal(&mut out, 1, written);
                // Kept by readers' caches and the window: no room that nobody uses.
                out.shrink_to_fit();
                self.content = content;
                Ok(Bytes::from(out))
            }
        }
    }

    fn write_content(&mut self, body: &SegmentBody, out: &mut Vec<u8>) -> Result<(), SegmentError> {
        put_length(out, body.transactions.len())?;
        for transaction in &body.transactions {
            out.extend_from_slice(&transaction.commit.0.to_le_bytes());
            out.extend_from_slice(&transaction.xid.to_le_bytes());
            out.extend_from_slice(&transaction.committed_at_micros.to_le_bytes());
        }
        put_length(out, body.tables.len())?;
        let options = IpcWriteOptions::default();
        for table in &body.tables {
            let shape = shape_of(&mut self.shapes, table)?;
            out.extend_from_slice(&shape.json);
            let length_at = out.len();
            out.extend_from_slice(&[0; 4]);
            let rows_at = out.len();
            out.extend_from_slice(&shape.ipc);
            let mut tracker = DictionaryTracker::new(false);
            let generator = IpcDataGenerator::default();
            // No column type of ours is a dictionary, so there are no messages of them.
            let (_, message) = generator.encode(&table.rows, &mut tracker, &options, &mut self.compression)?;
            write_message(&mut *out, message, &options)?;
            out.extend_from_slice(&END_OF_STREAM);
            let length = u32::try_from(out.len() - rows_at).map_err(|_| SegmentError::TooLarge(out.len()))?;
            out[length_at..rows_at].copy_from_slice(&length.to_le_bytes());
        }
        Ok(())
    }
}

/// Writes the header before the packed content.
fn seal(segment: &mut [u8], codec: u8, length: u32) {
    segment[..LENGTH_AT].copy_from_slice(&[VERSION, codec]);
    segment[LENGTH_AT..CHECKSUM_AT].copy_from_slice(&length.to_le_bytes());
    let checksum = checksum(segment);
    segment[CHECKSUM_AT..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

/// The checksum of a segment that has at least a header.
fn checksum(segment: &[u8]) -> u64 {
    let mut seed = [0; 8];
    seed[..CHECKSUM_AT].copy_from_slice(&segment[..CHECKSUM_AT]);
    XxHash64::oneshot(u64::from_le_bytes(seed), &segment[HEADER_BYTES..])
}

fn shape_of<'a>(shapes: &'a mut HashMap<usize, Shape>, table: &TableChanges) -> Result<&'a Shape, SegmentError> {
    let key = Arc::as_ptr(&table.schema) as usize;
    let schema = table.rows.schema();
    let known = shapes.get(&key);
    let fits = known.is_some_and(|shape| Arc::ptr_eq(&shape.schema, &schema) || shape.schema == schema);
    if !fits {
        if shapes.len() >= SHAPES_MAX {
            shapes.clear();
        }
        shapes.insert(key, Shape::new(&table.schema, schema)?);
    }
    // It was there, or was just put there.
    shapes.get(&key).ok_or_else(|| SegmentError::Mismatch(table.schema.table.clone()))
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
    if header[CHECKSUM_AT..] != checksum(bytes).to_le_bytes() {
        return Err(SegmentError::Checksum);
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
