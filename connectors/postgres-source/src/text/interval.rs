//! Intervals in `iso_8601` style: `P1Y2M3DT4H5M6.78S`, each part with a sign of its own.

use super::{BadAt, Digits};

/// The three independent parts of an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interval {
    pub(crate) months: i32,
    pub(crate) days: i32,
    pub(crate) micros: i64,
}

/// Reads an interval; the infinities (PG 17) are the extremes of all three parts.
pub(crate) fn interval(bytes: &[u8]) -> Result<Interval, BadAt> {
    match bytes {
        b"infinity" => return Ok(Interval { months: i32::MAX, days: i32::MAX, micros: i64::MAX }),
        b"-infinity" => return Ok(Interval { months: i32::MIN, days: i32::MIN, micros: i64::MIN }),
        _ => {}
    }
    let mut digits = Digits::new(bytes);
    digits.need(b'P')?;
    if digits.is_at_end() {
        return digits.bad();
    }
    let (mut months, mut days, mut micros) = (0i64, 0i64, 0i64);
    let mut in_time = false;
    while !digits.is_at_end() {
        if !in_time && digits.eat(b'T') {
            in_time = true;
            continue;
        }
        let sign = if digits.eat(b'-') { -1 } else { 1 };
        let whole = digits.number()? * sign;
        let fraction = digits.fraction_micros()? * sign;
        let unit = digits.peek();
        let (target, factor) = match (in_time, unit) {
            (false, Some(b'Y')) => (&mut months, 12),
            (false, Some(b'M')) => (&mut months, 1),
            (false, Some(b'D')) => (&mut days, 1),
            (true, Some(b'H')) => (&mut micros, 3_600_000_000),
            (true, Some(b'M')) => (&mut micros, 60_000_000),
            (true, Some(b'S')) => (&mut micros, 1_000_000),
            _ => return digits.bad(),
        };
        if fraction != 0 && factor != 1_000_000 {
            return digits.bad();
        }
        let part = whole.checked_mul(factor).and_then(|part| part.checked_add(fraction));
        let sum = part.and_then(|part| target.checked_add(part));
        *target = sum.map_or_else(|| digits.bad(), Ok)?;
        digits.eat(unit.unwrap_or_default());
    }
    let narrow = |value: i64| i32::try_from(value).map_err(|_| BadAt(0));
    Ok(Interval { months: narrow(months)?, days: narrow(days)?, micros })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;

    fn parts(text: &str) -> (i32, i32, i64) {
        let read = interval(text.as_bytes()).unwrap();
        (read.months, read.days, read.micros)
    }

    #[test]
    fn known_intervals() {
        assert_eq!(parts("PT0S"), (0, 0, 0));
        assert_eq!(parts("P1Y2M3DT4H5M6.78S"), (14, 3, 14_706_780_000));
        assert_eq!(parts("P-1Y-2M3DT-4H-5M-6.78S"), (-14, 3, -14_706_780_000));
        assert_eq!(parts("PT-0.000001S"), (0, 0, -1));
        assert_eq!(parts("-infinity"), (i32::MIN, i32::MIN, i64::MIN));
        for bad in ["", "P", "P1", "PT1Y", "P1S", "P1.5D", "1Y", "PT1H "] {
            assert!(interval(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..48), text in "P[-0-9YMDTHS.]{0,40}") {
            let _ = interval(&bytes);
            let _ = interval(text.as_bytes());
        }
    }
}
