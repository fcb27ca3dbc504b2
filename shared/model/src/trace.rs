//! Which span something was made in, as W3C Trace Context writes it: what a `traceparent` header says.

use std::fmt;
use std::str::FromStr;

/// The characters of a header of version 00.
const CHARACTERS: usize = 55;

/// The value of a `traceparent` header. Shown as one of version 00.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceParent {
    trace: u128,
    span: u64,
    is_sampled: bool,
}

/// A text is not a `traceparent`. Whoever reads one goes on without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a traceparent: expected 00-<trace, 32 hex>-<span, 16 hex>-<flags, 2 hex>")]
pub struct TraceParentError;

impl TraceParent {
    /// A span of a trace; `None` when one of the ids is zero, which stands for none.
    pub fn new(trace: u128, span: u64, is_sampled: bool) -> Option<TraceParent> {
        (trace != 0 && span != 0).then_some(TraceParent { trace, span, is_sampled })
    }

    /// The trace's id.
    pub fn trace(&self) -> u128 {
        self.trace
    }

    /// The span's id.
    pub fn span(&self) -> u64 {
        self.span
    }

    /// Whether the trace is recorded by whoever wrote this.
    pub fn is_sampled(&self) -> bool {
        self.is_sampled
    }
}

impl FromStr for TraceParent {
    type Err = TraceParentError;

    /// Reads no more than the beginning: it comes from outside, and a longer text may be anything.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (known, rest) = text.as_bytes().split_at_checked(CHARACTERS).ok_or(TraceParentError)?;
        let known = std::str::from_utf8(known).map_err(|_| TraceParentError)?;
        let mut fields = known.split('-');
        let mut field = |digits: usize| {
            let field = fields.next().filter(|field| field.len() == digits && field.bytes().all(is_digit));
            field.and_then(|field| u128::from_str_radix(field, 16).ok()).ok_or(TraceParentError)
        };
        let (version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
        // A later version only adds fields at the end.
        let is_whole = rest.is_empty() || (version > 0 && rest[0] == b'-');
        if version == 0xff || !is_whole {
            return Err(TraceParentError);
        }
        let span = u64::try_from(span).map_err(|_| TraceParentError)?;
        TraceParent::new(trace, span, flags & 1 == 1).ok_or(TraceParentError)
    }
}

fn is_digit(byte: u8) -> bool {
    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.is_sampled))
    }
}

impl fmt::Debug for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;

    const HEADER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_header_is_read_and_written() {
        let parent: TraceParent = HEADER.parse().unwrap();
        assert_eq!(parent.trace(), 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!((parent.span(), parent.is_sampled()), (0x00f0_67aa_0ba9_02b7, true));
        assert_eq!(parent.to_string(), HEADER);
        // Flags that are not known, and what a later version adds, are left out.
        let other: TraceParent = format!("cc{}fe-what-the-future-will-be-like", &HEADER[2..53]).parse().unwrap();
        assert_eq!(other.to_string(), format!("{}00", &HEADER[..53]));
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let long = format!("{HEADER}-{}", "9".repeat(1 << 20));
        for text in [
            "",
            "garbage",
            &HEADER[..54],
            &format!("{HEADER}0"),
            &format!("{HEADER}-01"),
            &long,
            &format!("cc{}.later", &HEADER[2..]),
            &HEADER.to_uppercase(),
            &HEADER.replacen("00-", "ff-", 1),
            &HEADER.replacen("4bf9", "+bf9", 1),
            &HEADER.replace('-', "_"),
            &HEADER.replacen("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32), 1),
            &HEADER.replacen("00f067aa0ba902b7", &"0".repeat(16), 1),
            &"é".repeat(60),
        ] {
            assert_eq!(text.parse::<TraceParent>(), Err(TraceParentError), "{:.80}", text);
        }
    }

    proptest! {
        #[test]
        fn headers_come_back_as_they_went(trace in 1_u128.., span in 1_u64.., is_sampled in any::<bool>()) {
            let parent = TraceParent::new(trace, span, is_sampled).unwrap();
            prop_assert_eq!(parent.to_string().parse(), Ok(parent));
        }

        #[test]
        fn no_text_is_too_much(text in ".*") {
            let _either_way = text.parse::<TraceParent>();
        }
    }
}
