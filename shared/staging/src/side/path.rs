//! Where an object stands, in words: a subject's tokens, or a path of an object store.
//!
//! Each group is a prefix that no other group's begins with, so that it goes with one purge or one listing. A manifest's name ends
//! with its attempt: what a fenced owner puts late stands beside its successor's, and the higher attempt counts.

use serde::Deserialize;
use wallaby_model::{Attempt, Epoch, Lsn};

use super::{SideGroup, SideKey};
use crate::error::{Result, StagingError};

/// First tokens.
pub(super) const PART: &str = "part";
pub(super) const MANIFEST: &str = "manifest";
pub(super) const CHUNK: &str = "chunk";

/// The tokens of a group.
pub(super) fn group_path(group: &SideGroup, separator: char) -> String {
    let s = separator;
    match group {
        SideGroup::Attempt(attempt) => format!("{PART}{s}{attempt}"),
        SideGroup::Manifest(commit) => format!("{MANIFEST}{s}{:016x}", commit.0),
        SideGroup::ChunkAttempt(run, chunk, epoch) => format!("{CHUNK}{s}{run}{s}{chunk}{s}{epoch}"),
        SideGroup::Run(run) => format!("{CHUNK}{s}{run}"),
    }
}

/// The tokens of an object whose group is known. `attempt` is the manifest's.
pub(super) fn object_path(key: &SideKey, attempt: Option<Attempt>, separator: char) -> String {
    let group = group_path(&key.group(), separator);
    match (key, attempt) {
        (SideKey::Part { number, .. } | SideKey::ChunkPart { number, .. }, _) => format!("{group}{separator}{number}"),
        (SideKey::Manifest { .. }, Some(attempt)) => format!("{group}{separator}{attempt}"),
        (SideKey::Manifest { .. }, None) => group,
    }
}

/// The group that an object or a piece of one belongs to; `None` for what is none of ours.
pub(super) fn group_of<'a>(mut tokens: impl Iterator<Item = &'a str>) -> Option<SideGroup> {
    let group = match tokens.next()? {
        PART => SideGroup::Attempt(tokens.next()?.parse().ok()?),
        MANIFEST => SideGroup::Manifest(lsn(tokens.next()?)?),
        CHUNK => {
            let run = tokens.next()?.parse().ok()?;
            let chunk = tokens.next()?.parse().ok()?;
            SideGroup::ChunkAttempt(run, chunk, Epoch(tokens.next()?.parse().ok()?))
        }
        _ => return None,
    };
    // The group itself is no object.
    tokens.next().map(|_| group)
}

fn lsn(text: &str) -> Option<Lsn> {
    (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok().map(Lsn)).flatten()
}

#[derive(Deserialize)]
struct Named {
    attempt: Attempt,
}

/// The attempt of the manifest to be put under `key`; `None` for other objects.
pub(super) fn attempt_of(key: &SideKey, body: &[u8]) -> Result<Option<Attempt>> {
    let SideKey::Manifest { commit } = key else {
        return Ok(None);
    };
    match serde_json::from_slice::<Named>(body) {
        Ok(named) => Ok(Some(named.attempt)),
        Err(error) => Err(StagingError::NotAManifest { commit: *commit, reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use wallaby_model::{ChunkId, RunId};

    use super::*;

    #[test]
    fn each_object_is_found_under_its_group() {
        let attempt = Attempt { epoch: Epoch(7), connection: 2, xid: 900 };
        let chunk = ChunkId { table: 3, restart: 0, number: 17 };
        let keys = [
            SideKey::Part { attempt, number: 4 },
            SideKey::Manifest { commit: Lsn(0xab) },
            SideKey::ChunkPart { run: RunId(2), chunk, attempt: Epoch(9), number: 0 },
        ];
        for key in keys {
            for separator in ['.', '/'] {
                let path = object_path(&key, Some(attempt), separator);
                assert_eq!(group_of(path.split(separator)), Some(key.group()), "{path}");
                assert_eq!(group_of(format!("{path}{separator}x").split(separator)), Some(key.group()), "{path}");
                assert!(path.starts_with(&format!("{}{separator}", group_path(&key.group(), separator))));
            }
        }
        for none in ["", "part", "part.7-2-900", "part.x.1", "manifest.ab.7-2-900", "chunk.2.3-0-17", "other.1.2.3"] {
            assert_eq!(group_of(none.split('.')), None, "{none}");
        }
    }

    #[test]
    fn a_manifest_tells_its_attempt_and_anything_else_is_refused() {
        let key = SideKey::Manifest { commit: Lsn(1) };
        let attempt = Attempt { epoch: Epoch(7), connection: 2, xid: 900 };
        assert_eq!(attempt_of(&key, br#"{"version":1,"attempt":"7-2-900"}"#).unwrap(), Some(attempt));
        assert!(matches!(attempt_of(&key, b"x"), Err(StagingError::NotAManifest { .. })));
        assert_eq!(attempt_of(&SideKey::Part { attempt, number: 0 }, b"x").unwrap(), None);
    }
}
