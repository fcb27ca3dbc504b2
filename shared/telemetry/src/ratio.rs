//! Which share of new traces is exported.

use std::fmt;
use std::str::FromStr;

/// A share, from 0 (none) to 1 (all).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TraceRatio(f64);

/// A text is not a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a number from 0 (no new trace) to 1 (all of them), as in 0.01")]
pub struct TraceRatioError;

impl TraceRatio {
    /// As a number.
    pub fn get(self) -> f64 {
        self.0
    }

    /// Whether no new trace is exported at all.
    pub fn is_zero(self) -> bool {
        self.0 == 0.0
    }
}

impl Default for TraceRatio {
    fn default() -> Self {
        TraceRatio(1.0)
    }
}

impl FromStr for TraceRatio {
    type Err = TraceRatioError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ratio: f64 = text.trim().parse().map_err(|_| TraceRatioError)?;
        // What is not a number is in no range.
        if (0.0..=1.0).contains(&ratio) { Ok(TraceRatio(ratio)) } else { Err(TraceRatioError) }
    }
}

impl fmt::Display for TraceRatio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_between_nothing_and_all() {
        for (text, share) in [("0", 0.0), ("1", 1.0), ("0.01", 0.01), (" 1e-3 ", 0.001)] {
            assert_eq!(text.parse(), Ok(TraceRatio(share)), "{text}");
        }
        for text in ["", "-0.1", "1.5", "NaN", "inf", "half", "10%"] {
            assert_eq!(text.parse::<TraceRatio>(), Err(TraceRatioError), "{text}");
        }
    }
}
