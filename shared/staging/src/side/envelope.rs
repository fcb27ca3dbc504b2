//! How an object says what it should be, so that a damaged or half-written one is told from a whole one.

use async_nats::{HeaderMap, HeaderName};
use twox_hash::XxHash64;

/// The version of these headers that is written.
const VERSION: u32 = 1;
/// The most bytes that the headers of a message take, with what the client adds.
pub(super) const HEADER_BYTES_MAX: usize = 512;

const VERSION_NAME: HeaderName = HeaderName::from_static("Wallaby-Version");
const BYTES: HeaderName = HeaderName::from_static("Wallaby-Bytes");
const CHECKSUM: HeaderName = HeaderName::from_static("Wallaby-Checksum");
const FRAGMENT_BYTES: HeaderName = HeaderName::from_static("Wallaby-Fragment-Bytes");

/// What an object should be. Every message of it carries this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Envelope {
    /// Its bytes.
    pub(super) bytes: u64,
    /// XXH64 of them, with seed 0.
    pub(super) checksum: u64,
    /// Bytes of each message but the last that hold a piece of it; 0 when it stands whole in one.
    pub(super) fragment_bytes: u32,
}

impl Envelope {
    /// Of a body that is cut into pieces of `target` when it is larger.
    pub(super) fn of(body: &[u8], target: usize) -> Envelope {
        // A message has an address of 32 bits; NATS takes no more than 64 MiB.
        let target = u32::try_from(target.max(1)).unwrap_or(u32::MAX);
        let fragment_bytes = if body.len() <= target as usize { 0 } else { target };
        Envelope { bytes: body.len() as u64, checksum: XxHash64::oneshot(0, body), fragment_bytes }
    }

    /// How many messages hold pieces.
    pub(super) fn fragments(&self) -> u64 {
        if self.fragment_bytes == 0 { 0 } else { self.bytes.div_ceil(u64::from(self.fragment_bytes)) }
    }

    /// Names a cut of a content: pieces of another one never take the place of this one's, and putting it again puts the same.
    pub(super) fn cut(&self) -> String {
        format!("{:016x}-{}-{}", self.checksum, self.bytes, self.fragment_bytes)
    }

    /// Whether these are its bytes.
    pub(super) fn is_of(&self, body: &[u8]) -> bool {
        body.len() as u64 == self.bytes && XxHash64::oneshot(0, body) == self.checksum
    }

    /// As headers.
    pub(super) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(VERSION_NAME, VERSION.to_string());
        headers.insert(BYTES, self.bytes.to_string());
        headers.insert(CHECKSUM, format!("{:016x}", self.checksum));
        headers.insert(FRAGMENT_BYTES, self.fragment_bytes.to_string());
        headers
    }

    /// From headers; `None` when they are not ours, or of a newer program.
    pub(super) fn read(headers: &HeaderMap) -> Option<Envelope> {
        let text = |name: HeaderName| headers.get(name).map(async_nats::HeaderValue::as_str);
        if text(VERSION_NAME)?.parse() != Ok(VERSION) {
            return None;
        }
        Some(Envelope {
            bytes: text(BYTES)?.parse().ok()?,
            checksum: u64::from_str_radix(text(CHECKSUM)?, 16).ok()?,
            fragment_bytes: text(FRAGMENT_BYTES)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    #[test]
    fn an_envelope_round_trips_and_knows_its_bytes() {
        for (bytes, target, fragments) in [(0, 10, 0), (10, 10, 0), (11, 10, 2), (20, 10, 2), (21, 10, 3)] {
            let body = vec![7_u8; bytes];
            let envelope = Envelope::of(&body, target);
            assert_eq!(envelope.fragments(), fragments, "{bytes}");
            assert_eq!(Envelope::read(&envelope.headers()), Some(envelope));
            assert!(envelope.is_of(&body));
            assert!(!envelope.is_of(&[&body[..], b"x"].concat()));
        }
        assert!(!Envelope::of(b"abc", 10).is_of(b"abd"));
    }

    #[test]
    fn what_is_not_understood_is_none() {
        let mut headers = Envelope::of(b"abc", 10).headers();
        headers.insert("Wallaby-Version", "2");
        assert_eq!(Envelope::read(&headers), None);
        assert_eq!(Envelope::read(&HeaderMap::new()), None);
    }

    #[test]
    fn headers_fit_their_bound() {
        let largest = Envelope { bytes: u64::MAX, checksum: u64::MAX, fragment_bytes: u32::MAX };
        let bytes: usize = largest
            .headers()
            .iter()
            .flat_map(|(k, v)| v.iter().map(move |v| (k, v)))
            .map(|(name, value)| name.to_string().len() + value.as_str().len() + 4)
            .sum();
        assert!(bytes + 100 < HEADER_BYTES_MAX, "{bytes}");
    }
}
