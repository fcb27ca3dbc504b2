//! Arrow values to COPY BINARY, without an allocation per value.
//!
//! A column's array is bound once per slice of rows to a [`Values`], which then writes single fields (a length and the
//! value's binary form) straight into the buffer that goes to the server. Two fields are the same value exactly when
//! their bytes are the same, so the same bytes serve as keys of the net effect.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Date32Type, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type, Time64MicrosecondType, UInt32Type,
};
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Date32Array, FixedSizeBinaryArray, Float32Array, Float64Array,
    Int16Array, Int32Array, Int64Array, StringArray, StructArray, Time64MicrosecondArray, UInt32Array,
};
use wallaby_model::{ColumnType, Position};

/// What stands before the first row of a COPY BINARY: signature, flags, length of the header's extension.
pub(crate) const HEADER: &[u8; 19] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// What stands after its last row.
pub(crate) const TRAILER: &[u8; 2] = &[0xff, 0xff];
/// Days between 1970-01-01 and 2000-01-01, where Postgres counts from.
const EPOCH_DAYS: i32 = 10_957;

/// How a column's values are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Wire {
    /// The binary form that the column's own type has.
    Own,
    /// Characters, whatever the type prints as.
    Text,
    /// `jsonb`: a version byte, then the characters.
    Jsonb,
}

/// A value does not have the form its type asks for; where it came from is added by the caller.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a {0:?} as Postgres prints it")]
pub(crate) struct BadValue(pub ColumnType);

/// One column of one slice of rows, ready to be written.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    Bool(&'a BooleanArray),
    Int2(&'a Int16Array),
    Int4(&'a Int32Array),
    Int8(&'a Int64Array),
    Oid(&'a UInt32Array),
    Float4(&'a Float32Array),
    Float8(&'a Float64Array),
    Text(&'a StringArray),
    Jsonb(&'a StringArray),
    Numeric(&'a StringArray),
    Bytea(&'a BinaryArray),
    Uuid(&'a FixedSizeBinaryArray),
    Date(&'a Date32Array),
    Time(&'a Time64MicrosecondArray),
    Interval { whole: &'a StructArray, months: &'a Int32Array, days: &'a Int32Array, micros: &'a Int64Array },
}

impl<'a> Values<'a> {
    /// Binds a column. `array` has the Arrow type of `kind`: codecs check that.
    pub(crate) fn bind(array: &'a ArrayRef, kind: ColumnType, wire: Wire) -> Values<'a> {
        match kind {
            ColumnType::Bool => Values::Bool(array.as_boolean()),
            ColumnType::Int2 => Values::Int2(array.as_primitive::<Int16Type>()),
            ColumnType::Int4 => Values::Int4(array.as_primitive::<Int32Type>()),
            ColumnType::Int8 | ColumnType::Timestamp | ColumnType::Timestamptz => {
                Values::Int8(array.as_primitive::<Int64Type>())
            }
            ColumnType::Oid => Values::Oid(array.as_primitive::<UInt32Type>()),
            ColumnType::Float4 => Values::Float4(array.as_primitive::<Float32Type>()),
            ColumnType::Float8 => Values::Float8(array.as_primitive::<Float64Type>()),
            ColumnType::Numeric if wire == Wire::Own => Values::Numeric(array.as_string::<i32>()),
            ColumnType::Bytea => Values::Bytea(array.as_binary::<i32>()),
            ColumnType::Uuid => Values::Uuid(array.as_fixed_size_binary()),
            ColumnType::Date => Values::Date(array.as_primitive::<Date32Type>()),
            ColumnType::Time => Values::Time(array.as_primitive::<Time64MicrosecondType>()),
            ColumnType::Interval => {
                let whole = array.as_struct();
                Values::Interval {
                    whole,
                    months: whole.column(0).as_primitive::<Int32Type>(),
                    days: whole.column(1).as_primitive::<Int32Type>(),
                    micros: whole.column(2).as_primitive::<Int64Type>(),
                }
            }
            _ if wire == Wire::Jsonb => Values::Jsonb(array.as_string::<i32>()),
            _ => Values::Text(array.as_string::<i32>()),
        }
    }

    fn is_null(&self, row: usize) -> bool {
        match self {
            Values::Bool(array) => array.is_null(row),
            Values::Int2(array) => array.is_null(row),
            Values::Int4(array) => array.is_null(row),
            Values::Int8(array) => array.is_null(row),
            Values::Oid(array) => array.is_null(row),
            Values::Float4(array) => array.is_null(row),
            Values::Float8(array) => array.is_null(row),
            Values::Text(array) | Values::Jsonb(array) | Values::Numeric(array) => array.is_null(row),
            Values::Bytea(array) => array.is_null(row),
            Values::Uuid(array) => array.is_null(row),
            Values::Date(array) => array.is_null(row),
            Values::Time(array) => array.is_null(row),
            Values::Interval { whole, .. } => whole.is_null(row),
        }
    }

    /// Writes the field of one row.
    pub(crate) fn write(&self, row: usize, out: &mut Vec<u8>) -> Result<(), BadValue> {
        if self.is_null(row) {
            put_null(out);
            return Ok(());
        }
        match self {
            Values::Bool(array) => put(out, &[u8::from(array.value(row))]),
            Values::Int2(array) => put(out, &array.value(row).to_be_bytes()),
            Values::Int4(array) => put(out, &array.value(row).to_be_bytes()),
            Values::Int8(array) => put(out, &array.value(row).to_be_bytes()),
            Values::Oid(array) => put(out, &array.value(row).to_be_bytes()),
            Values::Float4(array) => put(out, &array.value(row).to_be_bytes()),
            Values::Float8(array) => put(out, &array.value(row).to_be_bytes()),
            Values::Text(array) => put(out, array.value(row).as_bytes()),
            Values::Jsonb(array) => {
                let text = array.value(row).as_bytes();
                put_length(out, text.len() + 1);
                out.push(1);
                out.extend_from_slice(text);
            }
            Values::Numeric(array) => put_numeric(out, array.value(row)).ok_or(BadValue(ColumnType::Numeric))?,
            Values::Bytea(array) => put(out, array.value(row)),
            Values::Uuid(array) => put(out, array.value(row)),
            Values::Date(array) => {
                let days = match array.value(row) {
                    infinite @ (i32::MAX | i32::MIN) => infinite,
                    days => days.checked_sub(EPOCH_DAYS).ok_or(BadValue(ColumnType::Date))?,
                };
                put(out, &days.to_be_bytes());
            }
            Values::Time(array) => put(out, &array.value(row).to_be_bytes()),
            Values::Interval { months, days, micros, .. } => {
                put_length(out, 16);
                out.extend_from_slice(&micros.value(row).to_be_bytes());
                out.extend_from_slice(&days.value(row).to_be_bytes());
                out.extend_from_slice(&months.value(row).to_be_bytes());
            }
        }
        Ok(())
    }
}

/// The field of a NULL.
pub(crate) fn put_null(out: &mut Vec<u8>) {
    out.extend_from_slice(&(-1_i32).to_be_bytes());
}

/// The field of these bytes.
pub(crate) fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    put_length(out, bytes.len());
    out.extend_from_slice(bytes);
}

fn put_length(out: &mut Vec<u8>, length: usize) {
    // An Arrow value with 32-bit offsets has less than 2 GiB.
    out.extend_from_slice(&i32::try_from(length).unwrap_or(i32::MAX).to_be_bytes());
}

/// The number of fields that a row has.
pub(crate) fn put_row(out: &mut Vec<u8>, fields: usize) {
    // Postgres allows 1,600 columns.
    out.extend_from_slice(&i16::try_from(fields).unwrap_or(i16::MAX).to_be_bytes());
}

/// The field of a position in its text form.
pub(crate) fn put_position(out: &mut Vec<u8>, position: Position) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut text = [b'-'; 42];
    let mut digits = |at: usize, count: usize, number: u64| {
        for (index, slot) in text[at..at + count].iter_mut().enumerate() {
            *slot = HEX[(number >> (4 * (count - 1 - index)) & 0xf) as usize];
        }
    };
    digits(0, 16, position.commit.0);
    digits(17, 16, position.change.0);
    digits(34, 8, u64::from(position.index));
    put(out, &text);
}

/// `numeric` from its text: groups of four digits around the point, as `numeric_recv` reads them.
fn put_numeric(out: &mut Vec<u8>, text: &str) -> Option<()> {
    const NAN: u16 = 0xC000;
    let special = match text {
        "NaN" => Some(NAN),
        "Infinity" => Some(0xD000),
        "-Infinity" => Some(0xF000),
        _ => None,
    };
    if let Some(sign) = special {
        put_length(out, 8);
        for part in [0, 0, sign, 0] {
            out.extend_from_slice(&part.to_be_bytes());
        }
        return Some(());
    }
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (0x4000_u16, digits.as_bytes()),
        None => (0, text.as_bytes()),
    };
    let point = digits.iter().position(|&b| b == b'.');
    let (whole, fraction) = match point {
        Some(at) => (&digits[..at], &digits[at + 1..]),
        None => (digits, &digits[..0]),
    };
    let all_digits = whole.iter().chain(fraction).all(u8::is_ascii_digit);
    if !all_digits || whole.len() + fraction.len() == 0 {
        return None;
    }
    let leading_zeros = whole.iter().take_while(|&&b| b == b'0').count();
    let whole = &whole[leading_zeros..];
    let whole_groups = whole.len().div_ceil(4);
    let groups = whole_groups + fraction.len().div_ceil(4);
    put_length(out, 8 + 2 * groups);
    out.extend_from_slice(&u16::try_from(groups).ok()?.to_be_bytes());
    let weight = i32::try_from(whole_groups).ok()? - 1;
    out.extend_from_slice(&i16::try_from(weight).ok()?.to_be_bytes());
    out.extend_from_slice(&sign.to_be_bytes());
    out.extend_from_slice(&u16::try_from(fraction.len()).ok()?.to_be_bytes());
    let number = |group: &[u8]| group.iter().fold(0_u16, |sum, b| sum * 10 + u16::from(b - b'0'));
    let (first, rest) = whole.split_at(whole.len() % 4);
    if !first.is_empty() {
        out.extend_from_slice(&number(first).to_be_bytes());
    }
    for group in rest.chunks(4) {
        out.extend_from_slice(&number(group).to_be_bytes());
    }
    for group in fraction.chunks(4) {
        let padding = 10_u16.pow(4 - group.len() as u32);
        out.extend_from_slice(&(number(group) * padding).to_be_bytes());
    }
    Some(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use wallaby_model::Lsn;

    fn numeric(text: &str) -> Option<Vec<i16>> {
        let mut out = Vec::new();
        put_numeric(&mut out, text)?;
        assert_eq!(i32::from_be_bytes(out[..4].try_into().unwrap()) as usize, out.len() - 4, "{text}");
        Some(out[4..].chunks(2).map(|b| i16::from_be_bytes(b.try_into().unwrap())).collect())
    }

    #[test]
    fn numerics_are_grouped_around_the_point() {
        // digits, weight, sign, scale, groups: as numeric_send gives them, except that outer zero groups may stay.
        assert_eq!(numeric("0").unwrap(), [0, -1, 0, 0]);
        assert_eq!(numeric("1").unwrap(), [1, 0, 0, 0, 1]);
        assert_eq!(numeric("-12345.6700").unwrap(), [3, 1, 0x4000, 4, 1, 2345, 6700]);
        assert_eq!(numeric("0.00001").unwrap(), [2, -1, 0, 5, 0, 1000]);
        assert_eq!(numeric("10000").unwrap(), [2, 1, 0, 0, 1, 0]);
        assert_eq!(numeric("NaN").unwrap(), [0, 0, 0xC000_u16 as i16, 0]);
        for bad in ["", "-", ".", "1e5", "1.2.3", "abc", "+1"] {
            assert_eq!(numeric(bad), None, "{bad}");
        }
    }

    #[test]
    fn positions_are_written_as_their_text() {
        let position = Position::of(Lsn(0x16_B374_D848), Lsn(0xFEDC_BA98_7654_3210), 0x89AB_CDEF);
        let mut out = Vec::new();
        put_position(&mut out, position);
        assert_eq!(&out[4..], position.to_string().as_bytes());
    }
}
