//! One growing column: text in, Arrow array out.
//!
//! Plain vectors instead of Arrow's builders: fixed-width values are one push, text is one copy, and UTF-8 is checked
//! once for the whole column when it is finished, not once per value.

pub(super) mod binary;

use std::sync::Arc;

use arrow_array::types::{
    ArrowPrimitiveType, Date32Type, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type, Time64MicrosecondType,
    UInt32Type,
};
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, FixedSizeBinaryArray, PrimitiveArray, StringArray, StructArray,
};
use arrow_buffer::{BooleanBufferBuilder, Buffer, NullBufferBuilder, OffsetBuffer, ScalarBuffer};
use arrow_schema::ArrowError;
use wallaby_model::ColumnType;
use wallaby_model::schema::interval_fields;

use crate::text::{self, BadAt};

/// Fixed-width values.
pub(super) struct Fixed<T: ArrowPrimitiveType> {
    values: Vec<T::Native>,
    nulls: NullBufferBuilder,
}

impl<T: ArrowPrimitiveType> Fixed<T> {
    fn new() -> Self {
        Fixed { values: Vec::new(), nulls: NullBufferBuilder::new(0) }
    }

    #[inline]
    fn push(&mut self, value: T::Native) {
        self.values.push(value);
        self.nulls.append_non_null();
    }

    #[inline]
    fn push_null(&mut self) {
        self.values.push(T::Native::default());
        self.nulls.append_null();
    }

    fn finish(&mut self) -> PrimitiveArray<T> {
        PrimitiveArray::new(ScalarBuffer::from(std::mem::take(&mut self.values)), self.nulls.finish())
    }
}

/// Values of varying length.
pub(super) struct Varying {
    values: Vec<u8>,
    offsets: Vec<i32>,
    nulls: NullBufferBuilder,
    /// Bytes that the last segment's values took: what the next ones will take.
    bytes_expected: usize,
}

/// What one huge value took is not expected again.
const BYTES_EXPECTED_MAX: usize = 64 << 10;

impl Varying {
    pub(super) fn new() -> Varying {
        Varying { values: Vec::new(), offsets: vec![0], nulls: NullBufferBuilder::new(0), bytes_expected: 0 }
    }

    pub(super) fn reserve(&mut self, rows: usize) {
        self.offsets.reserve(rows);
        self.values.reserve(self.bytes_expected);
    }

    /// Closes the value that was appended to `values`. A segment is far below 2 GiB, so offsets fit.
    #[inline]
    fn end_value(&mut self) {
        self.offsets.push(self.values.len() as i32);
        self.nulls.append_non_null();
    }

    #[inline]
    pub(super) fn push(&mut self, value: &[u8]) {
        self.values.extend_from_slice(value);
        self.end_value();
    }

    #[inline]
    pub(super) fn push_null(&mut self) {
        self.offsets.push(self.values.len() as i32);
        self.nulls.append_null();
    }

    fn take(&mut self) -> (OffsetBuffer<i32>, Buffer, Option<arrow_buffer::NullBuffer>) {
        self.bytes_expected = self.values.len().min(BYTES_EXPECTED_MAX);
        let offsets = std::mem::replace(&mut self.offsets, vec![0]);
        let values = std::mem::take(&mut self.values);
        (OffsetBuffer::new(ScalarBuffer::from(offsets)), Buffer::from_vec(values), self.nulls.finish())
    }

    pub(super) fn finish_binary(&mut self) -> Result<BinaryArray, ArrowError> {
        let (offsets, values, nulls) = self.take();
        BinaryArray::try_new(offsets, values, nulls)
    }

    fn finish_text(&mut self) -> Result<StringArray, ArrowError> {
        let (offsets, values, nulls) = self.take();
        StringArray::try_new(offsets, values, nulls)
    }
}

/// A growing column of one [`ColumnType`].
pub(super) enum Column {
    Bool { values: BooleanBufferBuilder, nulls: NullBufferBuilder },
    Int2(Fixed<Int16Type>),
    Int4(Fixed<Int32Type>),
    Int8(Fixed<Int64Type>),
    Oid(Fixed<UInt32Type>),
    Float4(Fixed<Float32Type>),
    Float8(Fixed<Float64Type>),
    Date(Fixed<Date32Type>),
    Time(Fixed<Time64MicrosecondType>),
    Timestamp(Fixed<Int64Type>),
    Timestamptz(Fixed<Int64Type>),
    Interval { months: Vec<i32>, days: Vec<i32>, micros: Vec<i64>, nulls: NullBufferBuilder },
    Uuid { values: Vec<u8>, nulls: NullBufferBuilder },
    Bytea(Varying),
    Text(Varying),
}

impl Column {
    pub(super) fn new(kind: ColumnType) -> Column {
        let nulls = || NullBufferBuilder::new(0);
        match kind {
            ColumnType::Bool => Column::Bool { values: BooleanBufferBuilder::new(0), nulls: nulls() },
            ColumnType::Int2 => Column::Int2(Fixed::new()),
            ColumnType::Int4 => Column::Int4(Fixed::new()),
            ColumnType::Int8 => Column::Int8(Fixed::new()),
            ColumnType::Oid => Column::Oid(Fixed::new()),
            ColumnType::Float4 => Column::Float4(Fixed::new()),
            ColumnType::Float8 => Column::Float8(Fixed::new()),
            ColumnType::Date => Column::Date(Fixed::new()),
            ColumnType::Time => Column::Time(Fixed::new()),
            ColumnType::Timestamp => Column::Timestamp(Fixed::new()),
            ColumnType::Timestamptz => Column::Timestamptz(Fixed::new()),
            ColumnType::Interval => {
                Column::Interval { months: Vec::new(), days: Vec::new(), micros: Vec::new(), nulls: nulls() }
            }
            ColumnType::Uuid => Column::Uuid { values: Vec::new(), nulls: nulls() },
            ColumnType::Bytea => Column::Bytea(Varying::new()),
            ColumnType::Numeric
            | ColumnType::Text
            | ColumnType::Json
            | ColumnType::Jsonb
            | ColumnType::Enum
            | ColumnType::Array
            | ColumnType::Other => Column::Text(Varying::new()),
        }
    }

    /// Makes room for the rows of a segment. An empty column keeps no memory: a flow can have thousands of tables.
    pub(super) fn reserve(&mut self, rows: usize) {
        match self {
            Column::Int2(column) => column.values.reserve(rows),
            Column::Int4(column) => column.values.reserve(rows),
            Column::Int8(column) | Column::Timestamp(column) | Column::Timestamptz(column) => {
                column.values.reserve(rows)
            }
            Column::Oid(column) => column.values.reserve(rows),
            Column::Float4(column) => column.values.reserve(rows),
            Column::Float8(column) => column.values.reserve(rows),
            Column::Date(column) => column.values.reserve(rows),
            Column::Time(column) => column.values.reserve(rows),
            Column::Uuid { values, .. } => values.reserve(16 * rows),
            Column::Bytea(column) | Column::Text(column) => column.reserve(rows),
            Column::Bool { .. } | Column::Interval { .. } => {}
        }
    }

    /// Bytes that a value takes apart from what varies.
    pub(super) fn fixed_bytes(kind: ColumnType) -> usize {
        match kind {
            ColumnType::Bool => 1,
            ColumnType::Int2 => 2,
            ColumnType::Int8
            | ColumnType::Float8
            | ColumnType::Time
            | ColumnType::Timestamp
            | ColumnType::Timestamptz => 8,
            ColumnType::Interval | ColumnType::Uuid => 16,
            _ => 4,
        }
    }

    /// Bytes that a value of this length in text adds to the fixed ones.
    pub(super) fn varying_bytes(kind: ColumnType, text_length: usize) -> usize {
        match kind {
            ColumnType::Bytea => text_length.saturating_sub(2) / 2,
            ColumnType::Numeric
            | ColumnType::Text
            | ColumnType::Json
            | ColumnType::Jsonb
            | ColumnType::Enum
            | ColumnType::Array
            | ColumnType::Other => text_length,
            _ => 0,
        }
    }

    /// Appends a value from its text form.
    #[inline]
    pub(super) fn push_text(&mut self, bytes: &[u8]) -> Result<(), BadAt> {
        match self {
            Column::Text(column) => column.push(bytes),
            Column::Int4(column) => column.push(i32::try_from(text::integer(bytes)?).map_err(|_| BadAt(0))?),
            Column::Int8(column) => column.push(text::integer(bytes)?),
            Column::Timestamptz(column) => column.push(text::timestamptz(bytes)?),
            Column::Timestamp(column) => column.push(text::timestamp(bytes)?),
            Column::Bool { values, nulls } => {
                values.append(text::boolean(bytes)?);
                nulls.append_non_null();
            }
            Column::Int2(column) => column.push(i16::try_from(text::integer(bytes)?).map_err(|_| BadAt(0))?),
            Column::Oid(column) => column.push(text::unsigned(bytes)?),
            Column::Float4(column) => column.push(text::float4(bytes)?),
            Column::Float8(column) => column.push(text::float8(bytes)?),
            Column::Date(column) => column.push(text::date(bytes)?),
            Column::Time(column) => column.push(text::time(bytes)?),
            Column::Interval { months, days, micros, nulls } => {
                let interval = text::interval(bytes)?;
                months.push(interval.months);
                days.push(interval.days);
                micros.push(interval.micros);
                nulls.append_non_null();
            }
            Column::Uuid { values, nulls } => {
                values.extend_from_slice(&text::uuid(bytes)?);
                nulls.append_non_null();
            }
            Column::Bytea(column) => {
                text::bytea(bytes, &mut column.values)?;
                column.end_value();
            }
        }
        Ok(())
    }

    /// Appends a NULL, or the place of a value that is absent.
    #[inline]
    pub(super) fn push_null(&mut self) {
        match self {
            Column::Bool { values, nulls } => {
                values.append(false);
                nulls.append_null();
            }
            Column::Int2(column) => column.push_null(),
            Column::Int4(column) => column.push_null(),
            Column::Int8(column) | Column::Timestamp(column) | Column::Timestamptz(column) => column.push_null(),
            Column::Oid(column) => column.push_null(),
            Column::Float4(column) => column.push_null(),
            Column::Float8(column) => column.push_null(),
            Column::Date(column) => column.push_null(),
            Column::Time(column) => column.push_null(),
            Column::Interval { months, days, micros, nulls } => {
                months.push(0);
                days.push(0);
                micros.push(0);
                nulls.append_null();
            }
            Column::Uuid { values, nulls } => {
                values.extend_from_slice(&[0; 16]);
                nulls.append_null();
            }
            Column::Bytea(column) | Column::Text(column) => column.push_null(),
        }
    }

    /// Gives the values away and is empty again. Fails when text is not UTF-8.
    pub(super) fn finish(&mut self) -> Result<ArrayRef, ArrowError> {
        Ok(match self {
            Column::Bool { values, nulls } => Arc::new(BooleanArray::new(values.finish(), nulls.finish())),
            Column::Int2(column) => Arc::new(column.finish()),
            Column::Int4(column) => Arc::new(column.finish()),
            Column::Int8(column) | Column::Timestamp(column) | Column::Timestamptz(column) => Arc::new(column.finish()),
            Column::Oid(column) => Arc::new(column.finish()),
            Column::Float4(column) => Arc::new(column.finish()),
            Column::Float8(column) => Arc::new(column.finish()),
            Column::Date(column) => Arc::new(column.finish()),
            Column::Time(column) => Arc::new(column.finish()),
            Column::Interval { months, days, micros, nulls } => {
                let parts: Vec<ArrayRef> = vec![
                    Arc::new(PrimitiveArray::<Int32Type>::from(std::mem::take(months))),
                    Arc::new(PrimitiveArray::<Int32Type>::from(std::mem::take(days))),
                    Arc::new(PrimitiveArray::<Int64Type>::from(std::mem::take(micros))),
                ];
                Arc::new(StructArray::try_new(interval_fields(), parts, nulls.finish())?)
            }
            Column::Uuid { values, nulls } => {
                let values = Buffer::from_vec(std::mem::take(values));
                Arc::new(FixedSizeBinaryArray::try_new(16, values, nulls.finish())?)
            }
            Column::Bytea(column) => Arc::new(column.finish_binary()?),
            Column::Text(column) => Arc::new(column.finish_text()?) as Arc<dyn Array>,
        })
    }
}
