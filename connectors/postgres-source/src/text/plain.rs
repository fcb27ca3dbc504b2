//! Booleans, numbers, bytes and UUIDs.

use super::BadAt;

/// `t` or `f`.
#[inline]
pub(crate) fn boolean(bytes: &[u8]) -> Result<bool, BadAt> {
    match bytes {
        b"t" => Ok(true),
        b"f" => Ok(false),
        _ => Err(BadAt(0)),
    }
}

/// A signed whole number.
#[inline]
pub(crate) fn integer(bytes: &[u8]) -> Result<i64, BadAt> {
    let (digits, negative, offset) = match bytes {
        [b'-', digits @ ..] => (digits, true, 1),
        digits => (digits, false, 0),
    };
    if digits.is_empty() {
        return Err(BadAt(offset));
    }
    // Counts down, because the least value has no positive counterpart.
    let mut value = 0i64;
    for (index, byte) in digits.iter().enumerate() {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return Err(BadAt(offset + index));
        }
        let next = value.checked_mul(10).and_then(|value| value.checked_sub(i64::from(digit)));
        value = next.ok_or(BadAt(offset + index))?;
    }
    if negative { Ok(value) } else { value.checked_neg().ok_or(BadAt(0)) }
}

/// An oid.
#[inline]
pub(crate) fn unsigned(bytes: &[u8]) -> Result<u32, BadAt> {
    u32::try_from(integer(bytes)?).map_err(|_| BadAt(0))
}

/// A float8, `NaN` and the infinities included.
#[inline]
pub(crate) fn float8(bytes: &[u8]) -> Result<f64, BadAt> {
    std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok()).ok_or(BadAt(0))
}

/// A float4, `NaN` and the infinities included.
#[inline]
pub(crate) fn float4(bytes: &[u8]) -> Result<f32, BadAt> {
    std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok()).ok_or(BadAt(0))
}

const NO_DIGIT: u8 = 0xFF;

/// The value of each hexadecimal digit.
static HEX: [u8; 256] = {
    let mut table = [NO_DIGIT; 256];
    let mut digit = 0u8;
    while digit < 16 {
        let lower = if digit < 10 { b'0' + digit } else { b'a' + digit - 10 };
        let upper = if digit < 10 { b'0' + digit } else { b'A' + digit - 10 };
        table[lower as usize] = digit;
        table[upper as usize] = digit;
        digit += 1;
    }
    table
};

/// `\x` and pairs of hexadecimal digits, appended to `out`.
pub(crate) fn bytea(bytes: &[u8], out: &mut Vec<u8>) -> Result<(), BadAt> {
    let digits = bytes.strip_prefix(b"\\x").ok_or(BadAt(0))?;
    if digits.len() % 2 != 0 {
        return Err(BadAt(bytes.len()));
    }
    out.reserve(digits.len() / 2);
    for (index, pair) in digits.chunks_exact(2).enumerate() {
        let (high, low) = (HEX[usize::from(pair[0])], HEX[usize::from(pair[1])]);
        if high | low == NO_DIGIT {
            return Err(BadAt(2 + 2 * index));
        }
        out.push(high << 4 | low);
    }
    Ok(())
}

/// `8-4-4-4-12` hexadecimal digits.
#[inline]
pub(crate) fn uuid(bytes: &[u8]) -> Result<[u8; 16], BadAt> {
    if bytes.len() != 36 {
        return Err(BadAt(bytes.len()));
    }
    let mut out = [0; 16];
    let mut at = 0;
    for (index, byte) in out.iter_mut().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            if bytes[at] != b'-' {
                return Err(BadAt(at));
            }
            at += 1;
        }
        let (high, low) = (HEX[usize::from(bytes[at])], HEX[usize::from(bytes[at + 1])]);
        if high | low == NO_DIGIT {
            return Err(BadAt(at));
        }
        *byte = high << 4 | low;
        at += 2;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_agree_with_the_standard_library(value in any::<i64>(), float in any::<f64>(), text in "[-+0-9a-f.]{0,22}") {
            prop_assert_eq!(integer(value.to_string().as_bytes()).unwrap(), value);
            prop_assert_eq!(float8(float.to_string().as_bytes()).unwrap().to_bits() == float.to_bits() || float.is_nan(), true);
            let ours = integer(text.as_bytes()).ok();
            let theirs = if text.starts_with('+') { None } else { text.parse::<i64>().ok() };
            prop_assert_eq!(ours, theirs);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..48)) {
            let _ = boolean(&bytes);
            let _ = integer(&bytes);
            let _ = unsigned(&bytes);
            let _ = float4(&bytes);
            let _ = float8(&bytes);
            let _ = uuid(&bytes);
            let _ = bytea(&bytes, &mut Vec::new());
        }
    }

    #[test]
    fn edges() {
        assert_eq!(integer(b"-9223372036854775808").unwrap(), i64::MIN);
        assert_eq!(integer(b"9223372036854775808"), Err(BadAt(0)));
        assert_eq!(integer(b"12x"), Err(BadAt(2)));
        assert_eq!(unsigned(b"4294967295").unwrap(), u32::MAX);
        assert!(float8(b"NaN").unwrap().is_nan());
        assert_eq!(float8(b"-Infinity").unwrap(), f64::NEG_INFINITY);
        assert_eq!(float4(b"3.4028235e+38").unwrap(), f32::MAX);
        let mut out = Vec::new();
        bytea(b"\\x00fFa1", &mut out).unwrap();
        assert_eq!(out, [0, 255, 0xa1]);
        assert_eq!(bytea(b"\\x0", &mut out), Err(BadAt(3)));
        assert_eq!(bytea(b"\\x0g", &mut out), Err(BadAt(2)));
        assert_eq!(uuid(b"00112233-4455-6677-8899-aabbccddeeff").unwrap()[15], 0xff);
        assert_eq!(uuid(b"00112233x4455-6677-8899-aabbccddeeff"), Err(BadAt(8)));
    }
}
