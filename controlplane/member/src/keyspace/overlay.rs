//! Changes that are in memory and in the log, not yet in the storage engine.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::lease::LeaseRecord;
use super::version::Version;

/// Changes since the last flush, newest layer of the keyspace.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    /// Places in `changes` of each key's, oldest first.
    pub(super) keys: BTreeMap<Bytes, Vec<u32>>,
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
    pub(super) key: Bytes,
    pub(super) version: Version,
}

/// Memory of a change beside its key and value: map node, change, reference counts.
const OVERHEAD: usize = 250;

impl Overlay {
    pub(super) fn insert(&mut self, key: Bytes, revision: i64, version: Version) {
        self.bytes += key.len() + version.value.len() + OVERHEAD;
        let place = u32::try_from(self.changes.len()).unwrap_or(u32::MAX);
        self.changes.push(Change {
            revision,
            key: key.clone(),
            version,
        });
        self.keys.entry(key).or_default().push(place);
    }

    /// The newest version of `key` at `revision`.
    pub(super) fn newest(&self, key: &[u8], revision: i64) -> Option<(i64, &Version)> {
        self.newest_of(self.keys.get(key)?, revision)
    }

    /// The newest of the changes at `places`, at `revision`.
    pub(super) fn newest_of(&self, places: &[u32], revision: i64) -> Option<(i64, &Version)> {
        let mut changes = places
            .iter()
            .rev()
            .map(|place| &self.changes[*place as usize]);
        let change = changes.find(|change| change.revision <= revision)?;
        Some((change.revision, &change.version))
    }
}
