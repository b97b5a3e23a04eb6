//! A digest of everything that was applied, kept up with each entry: members that have applied the
//! same entries have the same one, or their keyspaces differ.

use std::collections::VecDeque;

use super::overlay::Change;

/// Which fields are in it, and how. Digests of other versions are not compared.
pub const DIGEST_VERSION: u32 = 1;
/// Every so many entries, one is kept, so that members that are not equally far find one to compare.
const KEPT_EVERY: u64 = 64;
/// Digests that are kept: of a million entries.
const KEPT: usize = 16 * 1024;

/// Digests of late, by log index.
#[derive(Debug, Default)]
pub(super) struct Digests {
    kept: VecDeque<(u64, u64)>,
    newest: (u64, u64),
}

/// What of the state is in the digest, beside the entry's changes.
pub(super) struct Summary {
    pub(super) index: u64,
    pub(super) term: u64,
    pub(super) revision: i64,
    pub(super) compact_revision: i64,
    pub(super) leases: u64,
    pub(super) members: u64,
}

impl Digests {
    pub(super) fn starting_at(index: u64, digest: u64) -> Self {
        Self {
            kept: VecDeque::new(),
            newest: (index, digest),
        }
    }

    pub(super) fn push(&mut self, index: u64, digest: u64) {
        self.newest = (index, digest);
        if index.is_multiple_of(KEPT_EVERY) {
            self.kept.push_back(self.newest);
            if self.kept.len() > KEPT {
                self.kept.pop_front();
            }
        }
    }

    /// That of an entry, if it is still known.
    pub(super) fn at(&self, index: u64) -> Option<u64> {
        if self.newest.0 == index {
            return Some(self.newest.1);
        }
        let at = self
            .kept
            .binary_search_by_key(&index, |(index, _)| *index)
            .ok()?;
        Some(self.kept[at].1)
    }

    /// The newest one, and the newest that is kept: other members may not have the first yet.
    pub(super) fn to_compare(&self) -> impl Iterator<Item = (u64, u64)> {
        [Some(self.newest), self.kept.back().copied()]
            .into_iter()
            .flatten()
    }
}

/// The digest after an entry, from the one before it. Two checksums by different polynomials: what
/// differs once differs from then on.
pub(super) fn after(before: u64, summary: &Summary, changes: &[Change]) -> u64 {
    let (mut low, high) = (low_half(before), low_half(before >> 32));
    let mut hasher = crc32fast::Hasher::new_with_initial(high);
    let mut add = |bytes: &[u8]| {
        low = crc32c::crc32c_append(low, bytes);
        hasher.update(bytes);
    };
    let mut fields = [0; 48];
    let numbers = [
        summary.index.to_le_bytes(),
        summary.term.to_le_bytes(),
        summary.revision.to_le_bytes(),
        summary.compact_revision.to_le_bytes(),
        summary.leases.to_le_bytes(),
        summary.members.to_le_bytes(),
    ];
    for (place, number) in fields.chunks_exact_mut(8).zip(numbers) {
        place.copy_from_slice(&number);
    }
    add(&fields);
    for change in changes {
        let version = &change.version;
        let numbers = [
            change.revision.to_le_bytes(),
            version.create_revision.to_le_bytes(),
            version.puts.to_le_bytes(),
            version.lease.to_le_bytes(),
            u64::from(version.sub).to_le_bytes(),
            (change.key.len() as u64).to_le_bytes(),
        ];
        for (place, number) in fields.chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number);
        }
        add(&fields);
        add(&change.key);
        add(&version.value);
    }
    u64::from(low) | (u64::from(hasher.finalize()) << 32)
}

fn low_half(number: u64) -> u32 {
    u32::try_from(number & u64::from(u32::MAX)).unwrap_or(0)
}
