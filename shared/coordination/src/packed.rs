//! Values that grow with the tables of a run: packed when they are large, so that a run over tens of thousands of tables fits into one
//! request of etcd. The rest stays JSON, as people read it with `etcdctl`; a packed value is gzip of it, which `gunzip` reads.

use std::borrow::Cow;
use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::Serialize;

use crate::client::REQUEST_BYTES_MAX;
use crate::{Error, Result};

/// What a packed value begins with (RFC 1952), and no JSON does.
const MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Smaller ones are not worth it.
const PACKED_FROM: usize = 256 << 10;
/// No value is larger than this before it is packed: whoever reads it has it in memory.
const JSON_BYTES_MAX: usize = 64 << 20;

/// A value as it is stored, refused when it would not fit.
pub(crate) fn encode_packed<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>> {
    let json = serde_json::to_vec(value).map_err(|error| Error::Malformed {
        key: key.to_owned(),
        cause: format!("it cannot be written as JSON: {error}"),
    })?;
    if json.len() < PACKED_FROM {
        return Ok(json);
    }
    let too_large = |bytes, limit| Error::TooLarge { key: key.to_owned(), bytes, limit };
    if json.len() > JSON_BYTES_MAX {
        return Err(too_large(json.len(), JSON_BYTES_MAX));
    }
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let packed = encoder.write_all(&json).and_then(|()| encoder.finish());
    let packed = packed
        .map_err(|error| Error::Malformed { key: key.to_owned(), cause: format!("it cannot be packed: {error}") })?;
    match packed.len() + key.len() {
        bytes if bytes > REQUEST_BYTES_MAX => Err(too_large(bytes, REQUEST_BYTES_MAX)),
        _ => Ok(packed),
    }
}

/// The JSON of a value that may be packed.
pub(crate) fn json_of<'a>(key: &str, value: &'a [u8]) -> Result<Cow<'a, [u8]>> {
    if !value.starts_with(&MAGIC) {
        return Ok(Cow::Borrowed(value));
    }
    let mut json = Vec::new();
    let unpacked = GzDecoder::new(value).take(JSON_BYTES_MAX as u64).read_to_end(&mut json);
    match unpacked {
        Ok(_) => Ok(Cow::Owned(json)),
        Err(error) => Err(Error::Malformed { key: key.to_owned(), cause: format!("it cannot be unpacked: {error}") }),
    }
}
