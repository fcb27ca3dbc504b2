//! Dates and times in ISO style: `2026-11-22`, `24:00:00`, `4714-11-24 00:00:00 BC`, `294276-12-31 23:59:59.999999+00`.

use super::{BadAt, Digits};

/// Days between 1970-01-01 and 2000-01-01.
const DAYS_TO_2000: i64 = 10_957;
const MICROS_PER_DAY: i64 = 86_400_000_000;

/// Days since 1970-01-01 in the proleptic Gregorian calendar; `year` 0 is 1 BC.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March here, so that the leap day is the last of a year.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// `YYYY-MM-DD` with four or more digits of year.
#[inline]
fn year_month_day(digits: &mut Digits<'_>) -> Result<(i64, i64, i64), BadAt> {
    let year = digits.number()?;
    digits.need(b'-')?;
    let month = digits.two()?;
    digits.need(b'-')?;
    let day = digits.two()?;
    if year > 6_000_000 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return digits.bad();
    }
    Ok((year, month, day))
}

/// `HH:MM:SS[.ffffff]` in µs, up to `24:00:00`.
#[inline]
fn time_of_day(digits: &mut Digits<'_>) -> Result<i64, BadAt> {
    let hours = digits.two()?;
    digits.need(b':')?;
    let minutes = digits.two()?;
    digits.need(b':')?;
    let seconds = digits.two()?;
    let micros = digits.fraction_micros()?;
    if hours > 24 || minutes > 59 || seconds > 60 {
        return digits.bad();
    }
    Ok(((hours * 60 + minutes) * 60 + seconds) * 1_000_000 + micros)
}

/// Whether ` BC` comes next: the year before 1 is 1 BC, which astronomers call 0.
#[inline]
fn astronomical(digits: &mut Digits<'_>, year: i64) -> i64 {
    if digits.eat_all(b" BC") { 1 - year } else { year }
}

/// Days since 1970-01-01; `i32::MAX` and `i32::MIN` for the infinities.
#[inline]
pub(crate) fn date(bytes: &[u8]) -> Result<i32, BadAt> {
    match bytes {
        b"infinity" => return Ok(i32::MAX),
        b"-infinity" => return Ok(i32::MIN),
        _ => {}
    }
    let mut digits = Digits::new(bytes);
    let (year, month, day) = year_month_day(&mut digits)?;
    let year = astronomical(&mut digits, year);
    let days = i32::try_from(days_since_1970(year, month, day)).map_err(|_| BadAt(0))?;
    digits.finish(days)
}

/// µs since midnight.
#[inline]
pub(crate) fn time(bytes: &[u8]) -> Result<i64, BadAt> {
    let mut digits = Digits::new(bytes);
    let micros = time_of_day(&mut digits)?;
    if micros > MICROS_PER_DAY {
        return Err(BadAt(0));
    }
    digits.finish(micros)
}

/// µs since 2000-01-01; `i64::MAX` and `i64::MIN` for the infinities.
#[inline]
pub(crate) fn timestamp(bytes: &[u8]) -> Result<i64, BadAt> {
    instant(bytes, false)
}

/// As [`timestamp`], with an offset from UTC behind the time.
#[inline]
pub(crate) fn timestamptz(bytes: &[u8]) -> Result<i64, BadAt> {
    instant(bytes, true)
}

#[inline]
fn instant(bytes: &[u8], with_offset: bool) -> Result<i64, BadAt> {
    match bytes {
        b"infinity" => return Ok(i64::MAX),
        b"-infinity" => return Ok(i64::MIN),
        _ => {}
    }
    let mut digits = Digits::new(bytes);
    let (year, month, day) = year_month_day(&mut digits)?;
    digits.need(b' ')?;
    let time = time_of_day(&mut digits)?;
    let offset = if with_offset { offset_micros(&mut digits)? } else { 0 };
    let year = astronomical(&mut digits, year);
    let days = days_since_1970(year, month, day) - DAYS_TO_2000;
    let micros = days.checked_mul(MICROS_PER_DAY).and_then(|micros| micros.checked_add(time - offset));
    digits.finish(micros.ok_or(BadAt(0))?)
}

/// `±HH[:MM[:SS]]`.
#[inline]
fn offset_micros(digits: &mut Digits<'_>) -> Result<i64, BadAt> {
    let sign = match digits.peek() {
        Some(b'+') => 1,
        Some(b'-') => -1,
        _ => return digits.bad(),
    };
    digits.eat(b'+');
    digits.eat(b'-');
    let mut seconds = digits.two()? * 3600;
    if digits.eat(b':') {
        seconds += digits.two()? * 60;
        if digits.eat(b':') {
            seconds += digits.two()?;
        }
    }
    Ok(sign * seconds * 1_000_000)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_days() {
        assert_eq!(date(b"1970-01-01").unwrap(), 0);
        assert_eq!(date(b"2000-03-01").unwrap(), 11_017);
        assert_eq!(date(b"4714-11-24 BC").unwrap(), -2_440_588, "the first Julian day");
        assert_eq!(date(b"0001-12-31 BC").unwrap() + 1, date(b"0001-01-01").unwrap());
        assert_eq!(date(b"infinity").unwrap(), i32::MAX);
        assert_eq!(time(b"24:00:00").unwrap(), MICROS_PER_DAY);
        assert_eq!(time(b"00:00:00.5").unwrap(), 500_000);
        assert_eq!(timestamp(b"2000-01-01 00:00:00").unwrap(), 0);
        assert_eq!(timestamp(b"294276-12-31 23:59:59.999999").unwrap(), 9_223_371_331_199_999_999);
        assert_eq!(timestamptz(b"2000-01-01 01:00:00+01").unwrap(), 0);
        assert_eq!(timestamptz(b"1999-12-31 18:29:30-05:30:30").unwrap(), 0);
        assert_eq!(timestamptz(b"-infinity").unwrap(), i64::MIN);
    }

    #[test]
    fn nonsense_is_refused_with_its_place() {
        assert_eq!(date(b"2026-13-01"), Err(BadAt(10)));
        assert_eq!(date(b"2026-1-01"), Err(BadAt(5)));
        assert_eq!(date(b"2026-01-01x"), Err(BadAt(10)));
        assert_eq!(time(b"24:00:01"), Err(BadAt(0)));
        assert_eq!(timestamp(b"2026-01-01T00:00:00"), Err(BadAt(10)));
        assert_eq!(timestamp(b"2026-01-01 00:00:00.1234567"), Err(BadAt(26)));
        assert_eq!(timestamptz(b"2026-01-01 00:00:00"), Err(BadAt(19)));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..48), text in "[-+0-9:. BCinfty]{0,40}") {
            for bytes in [&bytes[..], text.as_bytes()] {
                let _ = date(bytes);
                let _ = time(bytes);
                let _ = timestamp(bytes);
                let _ = timestamptz(bytes);
            }
        }
    }
}
