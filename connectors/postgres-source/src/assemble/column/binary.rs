//! Values in Postgres' binary form, as `COPY … (FORMAT binary)` sends them, into the same columns as the stream's text forms:
//! equal values make equal cells.

use super::{Column, Varying};
use crate::text::BadAt;

/// Days between 1970-01-01 and 2000-01-01.
const DAYS_TO_2000: i32 = 10_957;

/// How a value of a text column comes over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    /// As the column's own binary form; for text columns the text.
    Plain,
    /// `numeric_send`'s form.
    Numeric,
    /// A version byte before the text.
    Jsonb,
}

impl Column {
    /// Appends a value from its binary form.
    #[inline]
    pub(in crate::assemble) fn push_binary(&mut self, wire: Wire, bytes: &[u8]) -> Result<(), BadAt> {
        match self {
            Column::Text(column) => match wire {
                Wire::Plain => column.push(bytes),
                Wire::Numeric => push_numeric(column, bytes)?,
                Wire::Jsonb => match bytes {
                    [1, text @ ..] => column.push(text),
                    _ => return Err(BadAt(0)),
                },
            },
            Column::Int4(column) => column.push(i32::from_be_bytes(fixed(bytes)?)),
            Column::Int8(column) | Column::Timestamp(column) | Column::Timestamptz(column) => {
                column.push(i64::from_be_bytes(fixed(bytes)?));
            }
            Column::Bool { values, nulls } => {
                values.append(fixed::<1>(bytes)? != [0]);
                nulls.append_non_null();
            }
            Column::Int2(column) => column.push(i16::from_be_bytes(fixed(bytes)?)),
            Column::Oid(column) => column.push(u32::from_be_bytes(fixed(bytes)?)),
            Column::Float4(column) => {
                let value = f32::from_be_bytes(fixed(bytes)?);
                column.push(if value.is_nan() { f32::NAN } else { value });
            }
            Column::Float8(column) => {
                let value = f64::from_be_bytes(fixed(bytes)?);
                column.push(if value.is_nan() { f64::NAN } else { value });
            }
            Column::Date(column) => column.push(match i32::from_be_bytes(fixed(bytes)?) {
                infinity @ (i32::MIN | i32::MAX) => infinity,
                days => days.checked_add(DAYS_TO_2000).ok_or(BadAt(0))?,
            }),
            Column::Time(column) => column.push(i64::from_be_bytes(fixed(bytes)?)),
            Column::Interval { months, days, micros, nulls } => {
                let bytes: [u8; 16] = fixed(bytes)?;
                micros.push(i64::from_be_bytes(fixed(&bytes[..8])?));
                days.push(i32::from_be_bytes(fixed(&bytes[8..12])?));
                months.push(i32::from_be_bytes(fixed(&bytes[12..])?));
                nulls.append_non_null();
            }
            Column::Uuid { values, nulls } => {
                values.extend_from_slice(&fixed::<16>(bytes)?);
                nulls.append_non_null();
            }
            Column::Bytea(column) => column.push(bytes),
        }
        Ok(())
    }
}

#[inline]
fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], BadAt> {
    bytes.try_into().map_err(|_| BadAt(bytes.len().min(N)))
}

/// Digits in one group of a numeric: base 10,000.
const GROUP_DIGITS: usize = 4;
const NEGATIVE: u16 = 0x4000;
const NAN: u16 = 0xC000;
const INFINITY: u16 = 0xD000;
const NEGATIVE_INFINITY: u16 = 0xF000;
/// `NUMERIC_DSCALE_MAX`.
const SCALE_MAX: u16 = 0x3FFF;

/// The four digits of each group, so that none is divided out.
static GROUPS: [[u8; GROUP_DIGITS]; 10_000] = {
    let mut groups = [[0; GROUP_DIGITS]; 10_000];
    let mut value = 0;
    while value < 10_000 {
        groups[value] = [
            b'0' + (value / 1000) as u8,
            b'0' + (value / 100 % 10) as u8,
            b'0' + (value / 10 % 10) as u8,
            b'0' + (value % 10) as u8,
        ];
        value += 1;
    }
    groups
};

/// Appends what `numeric_out` prints: every digit of the display scale, trailing zeros included.
#[inline]
fn push_numeric(column: &mut Varying, bytes: &[u8]) -> Result<(), BadAt> {
    let start = column.values.len();
    match numeric(&mut column.values, bytes) {
        Ok(()) => {
            column.end_value();
            Ok(())
        }
        Err(bad) => {
            column.values.truncate(start);
            Err(bad)
        }
    }
}

fn numeric(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), BadAt> {
    let Some((header, digits)) = bytes.split_first_chunk::<8>() else { return Err(BadAt(bytes.len())) };
    let half = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let (count, weight, sign, scale) = (usize::from(half(0)), half(2) as i16, half(4), half(6));
    if digits.len() != 2 * count {
        return Err(BadAt(0));
    }
    match sign {
        0 => {}
        NEGATIVE => out.push(b'-'),
        NAN => out.extend_from_slice(b"NaN"),
        INFINITY => out.extend_from_slice(b"Infinity"),
        NEGATIVE_INFINITY => out.extend_from_slice(b"-Infinity"),
        _ => return Err(BadAt(4)),
    }
    if !matches!(sign, 0 | NEGATIVE) {
        return Ok(());
    }
    if scale > SCALE_MAX {
        return Err(BadAt(6));
    }
    // Groups that are not sent are zero.
    let group = |index: i32| -> Result<&'static [u8; GROUP_DIGITS], BadAt> {
        let at = usize::try_from(index).ok().filter(|at| *at < count);
        let value = at.map_or(0, |at| usize::from(u16::from_be_bytes([digits[2 * at], digits[2 * at + 1]])));
        GROUPS.get(value).ok_or(BadAt(8 + 2 * at.unwrap_or_default()))
    };
    let weight = i32::from(weight);
    if weight < 0 {
        out.push(b'0');
    } else {
        let first = group(0)?;
        let zeros = first[..GROUP_DIGITS - 1].iter().take_while(|digit| **digit == b'0').count();
        out.extend_from_slice(&first[zeros..]);
        for index in 1..=weight {
            out.extend_from_slice(group(index)?);
        }
    }
    if scale > 0 {
        out.push(b'.');
        let mut left = usize::from(scale);
        let mut index = weight + 1;
        while left > 0 {
            let taken = left.min(GROUP_DIGITS);
            out.extend_from_slice(&group(index)?[..taken]);
            left -= taken;
            index += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;

    fn shown(halves: &[u16]) -> Result<String, BadAt> {
        let bytes: Vec<u8> = halves.iter().flat_map(|half| half.to_be_bytes()).collect();
        let mut out = Vec::new();
        numeric(&mut out, &bytes).map(|()| String::from_utf8(out).unwrap())
    }

    #[test]
    fn b03_numerics_are_printed_as_postgres_prints_them() {
        assert_eq!(shown(&[0, 0, 0, 0]).unwrap(), "0");
        assert_eq!(shown(&[0, 0, 0, 3]).unwrap(), "0.000");
        assert_eq!(shown(&[2, 0, 0, 2, 3, 3000]).unwrap(), "3.30");
        assert_eq!(shown(&[2, 1, NEGATIVE, 0, 12, 34]).unwrap(), "-120034");
        assert_eq!(shown(&[1, 2, 0, 1, 5]).unwrap(), "500000000.0");
        assert_eq!(shown(&[1, 0xFFFE, 0, 6, 1200]).unwrap(), "0.000012");
        assert_eq!(shown(&[0, 0, NAN, 0]).unwrap(), "NaN");
        assert_eq!(shown(&[0, 0, NEGATIVE_INFINITY, 0]).unwrap(), "-Infinity");
        assert_eq!(shown(&[1, 0, 0, 0, 10_000]), Err(BadAt(8)));
        assert_eq!(shown(&[2, 0, 0, 0, 1]), Err(BadAt(0)));
        assert_eq!(shown(&[0, 0, 0x8000, 0]), Err(BadAt(4)));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..48)) {
            let _ = numeric(&mut Vec::new(), &bytes);
            for kind in [wallaby_model::ColumnType::Int4, wallaby_model::ColumnType::Interval, wallaby_model::ColumnType::Date] {
                let _ = Column::new(kind).push_binary(Wire::Plain, &bytes);
            }
        }
    }
}
