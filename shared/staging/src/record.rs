//! A record as the headers of a JetStream message.
//!
//! No name begins with `Nats-`: those are the server's. The version is checked first, so that a record of a newer program
//! stops a reader with a clear message and is never half understood.

use std::fmt;
use std::str::FromStr;

use async_nats::{HeaderMap, HeaderName};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use wallaby_model::{Codec, Epoch, FlowId, Nonce, Position, Record, RecordKind, ResumeInfo, TraceParent};

/// The version of the headers that is written.
pub const VERSION: u32 = 1;
/// The most bytes that headers of a data record take, with what the client adds; [`crate::Log::body_bytes_max`] leaves it.
pub const HEADER_BYTES_MAX: usize = 1024;

const VERSION_NAME: HeaderName = HeaderName::from_static("Wallaby-Version");
const KIND: HeaderName = HeaderName::from_static("Wallaby-Kind");
const FLOW: HeaderName = HeaderName::from_static("Wallaby-Flow");
const EPOCH: HeaderName = HeaderName::from_static("Wallaby-Epoch");
const INCARNATION: HeaderName = HeaderName::from_static("Wallaby-Incarnation");
const LINK: HeaderName = HeaderName::from_static("Wallaby-Chain");
const NONCE: HeaderName = HeaderName::from_static("Wallaby-Nonce");
const POSITION: HeaderName = HeaderName::from_static("Wallaby-Position");
const INFO: HeaderName = HeaderName::from_static("Wallaby-Info");
const FROM: HeaderName = HeaderName::from_static("Wallaby-From");
const TO: HeaderName = HeaderName::from_static("Wallaby-To");
const COMPLETE_TO: HeaderName = HeaderName::from_static("Wallaby-Complete-To");
const ROWS: HeaderName = HeaderName::from_static("Wallaby-Rows");
const CODEC: HeaderName = HeaderName::from_static("Wallaby-Codec");
/// As W3C Trace Context names it.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Why a message is not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Something else wrote into the log's subjects.
    #[error(
        "it has no Wallaby-Version header: something other than WALlaby publishes to the log's subjects; deny it that"
    )]
    Foreign,
    /// Written by a newer program.
    #[error("it has version {0}, this program understands {VERSION}: upgrade the readers first")]
    Version(String),
    /// A header is not there.
    #[error("header {0} is missing")]
    Missing(&'static str),
    /// A header cannot be read.
    #[error("header {0} cannot be read")]
    Unreadable(&'static str),
    /// Of another flow.
    #[error("it belongs to flow {0}")]
    OtherFlow(FlowId),
}

/// Which life of a log a record belongs to: random, another one after each rewind. Equal or not is all it says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// A fresh one.
    pub fn random() -> Incarnation {
        Incarnation(rand::random())
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A record's place in its owner's chain: from one resync to the next, one chain.
///
/// The expected sequence alone does not keep a hole out. A foreign fence takes one sequence, so the append that expected the one
/// before is refused, and the one after *that* finds the sequence it expects: it is stored behind a hole. (So is one of an
/// owner that was just fenced, which then takes a sequence itself.) Readers tell such an
/// orphan from a true gap by its link: the one before it is not there, and its owner starts another chain at the hole.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Link {
    /// Random for every chain.
    pub chain: u64,
    /// Counts from 0, which joins the log wherever it ends.
    pub index: u32,
}

impl Link {
    /// The beginning of a fresh chain.
    pub fn first() -> Link {
        Link { chain: rand::random(), index: 0 }
    }

    /// The place after this one.
    #[must_use]
    pub fn next(self) -> Link {
        Link { chain: self.chain, index: self.index.wrapping_add(1) }
    }

    /// Whether this stands where it must: at the beginning of a chain, or right after `before`.
    pub fn follows(self, before: Link) -> bool {
        self.index == 0 || before.next() == self
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}", self.chain, self.index)
    }
}

impl FromStr for Link {
    type Err = RecordError;

    fn from_str(text: &str) -> Result<Link, RecordError> {
        let unreadable = RecordError::Unreadable("Wallaby-Chain");
        let (chain, index) = text.split_once('-').ok_or(unreadable.clone())?;
        let chain = u64::from_str_radix(chain, 16).map_err(|_| unreadable.clone())?;
        Ok(Link { chain, index: index.parse().map_err(|_| unreadable)? })
    }
}

/// Writes the link into a record's headers, when it is sent.
pub fn set_link(headers: &mut HeaderMap, link: Link) {
    headers.insert(LINK, link.to_string());
}

/// Writes into a record's headers which span it was made in.
pub fn set_traceparent(headers: &mut HeaderMap, made_in: TraceParent) {
    headers.insert(TRACEPARENT, made_in.to_string());
}

/// The span that a record was made in. `None` when nobody looks at traces, and when what stands there cannot be read: that is never a
/// reason to refuse a record.
pub fn traceparent(headers: &HeaderMap) -> Option<TraceParent> {
    headers.get(TRACEPARENT)?.as_str().parse().ok()
}

/// A record as it stands in the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Staged {
    /// Its sequence in the stream: a hint, never the truth about progress.
    pub sequence: u64,
    /// The life of the log it belongs to. A fence does not say it.
    pub incarnation: Option<Incarnation>,
    /// Its place in its owner's chain. A fence has none.
    pub link: Option<Link>,
    /// The span that it was made in, if somebody looks at traces.
    pub traceparent: Option<TraceParent>,
    /// The headers.
    pub record: Record,
    /// The body, as it was published.
    pub body: Bytes,
}

/// Tells a record from another one that has its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) sequence: u64,
    epoch: Epoch,
    link: Option<Link>,
}

impl Mark {
    pub(crate) fn of(staged: &Staged) -> Mark {
        Mark { sequence: staged.sequence, epoch: staged.record.epoch, link: staged.link }
    }
}

/// Writes a record's headers. `incarnation` is given for every kind but the fence; so is the link, by [`set_link`].
pub fn encode(record: &Record, incarnation: Option<Incarnation>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(VERSION_NAME, VERSION.to_string());
    headers.insert(FLOW, record.flow.as_str());
    headers.insert(EPOCH, record.epoch.to_string());
    if let Some(incarnation) = incarnation {
        headers.insert(INCARNATION, incarnation.to_string());
    }
    match &record.kind {
        RecordKind::Fence { nonce } => {
            headers.insert(KIND, "fence");
            headers.insert(NONCE, nonce.to_string());
        }
        RecordKind::Resume { position, info } => {
            headers.insert(KIND, "resume");
            headers.insert(POSITION, position.to_string());
            // serde_json escapes control characters, so the text has no line break.
            headers.insert(INFO, serde_json::to_string(info).unwrap_or_default());
        }
        RecordKind::Data { from, to, complete_to, rows, codec } => {
            headers.insert(KIND, "data");
            headers.insert(FROM, from.to_string());
            headers.insert(TO, to.to_string());
            headers.insert(COMPLETE_TO, complete_to.to_string());
            headers.insert(ROWS, rows.to_string());
            headers.insert(CODEC, codec_name(*codec));
        }
        RecordKind::Splice { from, to } => {
            headers.insert(KIND, "splice");
            headers.insert(FROM, from.to_string());
            headers.insert(TO, to.to_string());
        }
        RecordKind::Heartbeat { from, to } => {
            headers.insert(KIND, "heartbeat");
            headers.insert(FROM, from.to_string());
            headers.insert(TO, to.to_string());
        }
    }
    headers
}

/// Reads a message as a record and checks that it belongs to `flow`.
///
/// # Errors
/// When the message is not a record of this version and this flow.
pub fn decode(headers: &HeaderMap, body: Bytes, sequence: u64, flow: &FlowId) -> Result<Staged, RecordError> {
    let Some(version) = headers.get(VERSION_NAME) else {
        return Err(RecordError::Foreign);
    };
    if version.as_str().parse() != Ok(VERSION) {
        // Cut: it may be anything.
        return Err(RecordError::Version(version.as_str().chars().take(16).collect()));
    }
    let theirs: FlowId = parsed(headers, FLOW, "Wallaby-Flow")?;
    if theirs != *flow {
        return Err(RecordError::OtherFlow(theirs));
    }
    let epoch = Epoch(parsed(headers, EPOCH, "Wallaby-Epoch")?);
    let kind = decode_kind(headers)?;
    let (mut incarnation, mut link) = (None, None);
    if !matches!(kind, RecordKind::Fence { .. }) {
        let text = text(headers, INCARNATION, "Wallaby-Incarnation")?;
        let number = u64::from_str_radix(text, 16).map_err(|_| RecordError::Unreadable("Wallaby-Incarnation"))?;
        incarnation = Some(Incarnation(number));
        link = Some(parsed(headers, LINK, "Wallaby-Chain")?);
    }
    let traceparent = traceparent(headers);
    Ok(Staged { sequence, incarnation, link, traceparent, record: Record { flow: theirs, epoch, kind }, body })
}

fn decode_kind(headers: &HeaderMap) -> Result<RecordKind, RecordError> {
    let position =
        |name: HeaderName, spelt: &'static str| -> Result<Position, RecordError> { parsed(headers, name, spelt) };
    Ok(match text(headers, KIND, "Wallaby-Kind")? {
        "fence" => RecordKind::Fence { nonce: parsed::<Nonce>(headers, NONCE, "Wallaby-Nonce")? },
        "resume" => {
            let info = text(headers, INFO, "Wallaby-Info")?;
            let info: ResumeInfo = serde_json::from_str(info).map_err(|_| RecordError::Unreadable("Wallaby-Info"))?;
            RecordKind::Resume { position: position(POSITION, "Wallaby-Position")?, info }
        }
        "data" => RecordKind::Data {
            from: position(FROM, "Wallaby-From")?,
            to: position(TO, "Wallaby-To")?,
            complete_to: position(COMPLETE_TO, "Wallaby-Complete-To")?,
            rows: parsed(headers, ROWS, "Wallaby-Rows")?,
            codec: match text(headers, CODEC, "Wallaby-Codec")? {
                "none" => Codec::None,
                "lz4" => Codec::Lz4,
                _ => return Err(RecordError::Unreadable("Wallaby-Codec")),
            },
        },
        "splice" => RecordKind::Splice { from: position(FROM, "Wallaby-From")?, to: position(TO, "Wallaby-To")? },
        "heartbeat" => RecordKind::Heartbeat { from: position(FROM, "Wallaby-From")?, to: position(TO, "Wallaby-To")? },
        _ => return Err(RecordError::Unreadable("Wallaby-Kind")),
    })
}

fn codec_name(codec: Codec) -> &'static str {
    match codec {
        Codec::None => "none",
        Codec::Lz4 => "lz4",
    }
}

fn text<'a>(headers: &'a HeaderMap, name: HeaderName, spelt: &'static str) -> Result<&'a str, RecordError> {
    headers.get(name).map(|value| value.as_str()).ok_or(RecordError::Missing(spelt))
}

fn parsed<T: FromStr>(headers: &HeaderMap, name: HeaderName, spelt: &'static str) -> Result<T, RecordError> {
    text(headers, name, spelt)?.parse().map_err(|_| RecordError::Unreadable(spelt))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;
    use proptest::prelude::*;
    use wallaby_model::Lsn;

    fn position() -> impl Strategy<Value = Position> {
        (any::<u64>(), any::<u64>(), any::<u32>()).prop_map(|(c, h, i)| Position::of(Lsn(c), Lsn(h), i))
    }

    fn kind() -> impl Strategy<Value = RecordKind> {
        prop_oneof![
            Just(()).prop_map(|()| RecordKind::Fence { nonce: Nonce::random() }),
            (position(), ".*", any::<u32>(), any::<bool>()).prop_map(|(position, text, timeline, rewind)| {
                RecordKind::Resume {
                    position,
                    info: ResumeInfo {
                        system_identifier: text.clone(),
                        timeline,
                        slot: text.clone(),
                        publication: text,
                        rewind,
                    },
                }
            }),
            (position(), position(), position(), any::<u32>(), any::<bool>()).prop_map(
                |(from, to, complete_to, rows, lz4)| {
                    let codec = if lz4 { Codec::Lz4 } else { Codec::None };
                    RecordKind::Data { from, to, complete_to, rows, codec }
                }
            ),
            (position(), position()).prop_map(|(from, to)| RecordKind::Splice { from, to }),
            (position(), position()).prop_map(|(from, to)| RecordKind::Heartbeat { from, to }),
        ]
    }

    fn read(headers: &HeaderMap, flow: &FlowId) -> Result<Staged, RecordError> {
        decode(headers, Bytes::new(), 1, flow)
    }

    fn flow() -> FlowId {
        FlowId::new("shop").unwrap()
    }

    proptest! {
        #[test]
        fn records_come_back_as_they_went(
            kind in kind(), epoch in any::<u64>(), incarnation in any::<u64>(), chain in any::<u64>(), index in any::<u32>(),
            trace in any::<u128>(), span in any::<u64>(), is_sampled in any::<bool>(),
        ) {
            let record = Record { flow: flow(), epoch: Epoch(epoch), kind };
            let is_fence = matches!(record.kind, RecordKind::Fence { .. });
            let incarnation = (!is_fence).then_some(Incarnation(incarnation));
            let link = (!is_fence).then_some(Link { chain, index });
            let mut headers = encode(&record, incarnation);
            if let Some(link) = link {
                set_link(&mut headers, link);
            }
            let traceparent = TraceParent::new(trace, span, is_sampled);
            if let Some(made_in) = traceparent {
                set_traceparent(&mut headers, made_in);
            }
            let body = Bytes::from_static(b"rows");
            let staged = Staged { sequence: 7, incarnation, link, traceparent, record, body: body.clone() };
            prop_assert_eq!(decode(&headers, body, 7, &flow()).unwrap(), staged);
        }
    }

    #[test]
    fn the_headers_of_a_data_record_stay_in_their_bound() {
        let long = FlowId::new("a".repeat(40)).unwrap();
        let at = Position::of(Lsn(u64::MAX), Lsn(u64::MAX), u32::MAX);
        let kind = RecordKind::Data { from: at, to: at, complete_to: at, rows: u32::MAX, codec: Codec::None };
        let mut headers = encode(&Record { flow: long, epoch: Epoch(u64::MAX), kind }, Some(Incarnation(u64::MAX)));
        set_link(&mut headers, Link { chain: u64::MAX, index: u32::MAX });
        set_traceparent(&mut headers, TraceParent::new(u128::MAX, u64::MAX, true).unwrap());
        let length: usize =
            headers.iter().map(|(name, values)| AsRef::<[u8]>::as_ref(name).len() + 4 + values[0].as_str().len()).sum();
        assert!(length + 200 < HEADER_BYTES_MAX, "{length}");
    }

    #[test]
    fn a_traceparent_that_is_not_there_or_cannot_be_read_is_no_reason_to_refuse_a_record() {
        let at = |lsn| Position::before(Lsn(lsn));
        let kind = RecordKind::Heartbeat { from: at(1), to: at(2) };
        let mut headers = encode(&Record { flow: flow(), epoch: Epoch(1), kind }, Some(Incarnation(1)));
        set_link(&mut headers, Link { chain: 1, index: 0 });
        let plain = read(&headers, &flow()).unwrap();
        assert_eq!(plain.traceparent, None);
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let long = format!("{good}{}", "0".repeat(1 << 16));
        for garbage in ["", "-", "00", "garbage", &good[1..], &good.to_uppercase(), &long, "00-é-é-01"] {
            headers.insert("traceparent", garbage);
            assert_eq!(read(&headers, &flow()).unwrap(), plain, "{garbage:.80}");
        }
        headers.insert("traceparent", good);
        let traced = read(&headers, &flow()).unwrap();
        assert_eq!(traced, Staged { traceparent: Some(good.parse().unwrap()), ..plain });
    }

    #[test]
    fn foreign_and_newer_messages_say_what_they_are() {
        assert_eq!(read(&HeaderMap::new(), &flow()).unwrap_err(), RecordError::Foreign);
        let record = Record { flow: flow(), epoch: Epoch(1), kind: RecordKind::Fence { nonce: Nonce::random() } };
        let mut newer = encode(&record, None);
        newer.insert("Wallaby-Version", "2");
        assert_eq!(read(&newer, &flow()).unwrap_err(), RecordError::Version("2".to_owned()));
        let other = FlowId::new("other").unwrap();
        assert_eq!(read(&encode(&record, None), &other).unwrap_err(), RecordError::OtherFlow(flow()));
        let mut broken = encode(&record, None);
        broken.insert("Wallaby-Nonce", "x");
        assert_eq!(read(&broken, &flow()).unwrap_err(), RecordError::Unreadable("Wallaby-Nonce"));
    }
}
