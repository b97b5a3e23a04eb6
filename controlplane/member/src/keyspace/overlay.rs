//! Changes that are in memory and in the log, not yet in the storage engine.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::lease::LeaseRecord;
use super::version::Version;

/// Changes since the last flush, newest layer of the keyspace.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    /// Versions of each key, oldest first.
    pub(super) keys: BTreeMap<Bytes, Vec<(i64, Version)>>,
    /// Every change in order.
    pub(super) changes: Vec<Change>,
    /// Leases granted, changed, or (`None`) gone.
    pub(super) leases: BTreeMap<i64, Option<LeaseRecord>>,
    /// Attachments made (`true`) and ended.
    pub(super) attachments: BTreeMap<(i64, Bytes), bool>,
    /// Roughly the memory that this holds.
    pub(super) bytes: usize,
}

/// One change of one key.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) revision: i64,
    pub(super) sub: u32,
    pub(super) key: Bytes,
    pub(super) deletion: bool,
}

/// Memory of a change beside its key and value: map node, version, change.
const OVERHEAD: usize = 200;

impl Overlay {
    pub(super) fn insert(&mut self, key: Bytes, revision: i64, version: Version) {
        self.bytes += key.len() + version.value.len() + OVERHEAD;
        self.changes.push(Change {
            revision,
            sub: version.sub,
            key: key.clone(),
            deletion: version.is_deletion(),
        });
        self.keys.entry(key).or_default().push((revision, version));
    }

    /// The newest version of `key` at `revision`.
    pub(super) fn newest(&self, key: &[u8], revision: i64) -> Option<(i64, &Version)> {
        newest_of(self.keys.get(key)?, revision)
    }
}

/// The newest of `versions` at `revision`.
pub(super) fn newest_of(versions: &[(i64, Version)], revision: i64) -> Option<(i64, &Version)> {
    let (revision, version) = versions.iter().rev().find(|(at, _)| *at <= revision)?;
    Some((*revision, version))
}
