//! What a guest says of its memory (virtio 1.2, 5.5.6.3).

use std::io::Read;

use serde::{Deserialize, Serialize};
use virtio_queue::DescriptorChain;

use crate::memory::GuestMemory;

/// The most entries that are read: there are some ten tags.
const MAX_ENTRIES: usize = 64;
/// A tag of 16 bits and a value of 64, packed.
const ENTRY_BYTES: usize = 10;

/// What a guest's kernel counts; what it doesn't say is `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BalloonStatistics {
    /// Bytes swapped in since it booted.
    pub swapped_in_bytes: Option<u64>,
    /// Bytes swapped out.
    pub swapped_out_bytes: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    pub minor_faults: Option<u64>,
    /// Bytes of memory that are used for nothing.
    pub free_bytes: Option<u64>,
    /// Bytes of memory in all.
    pub total_bytes: Option<u64>,
    /// Bytes that programs could have without swapping (`MemAvailable`).
    pub available_bytes: Option<u64>,
    /// Bytes of files' pages in the cache.
    pub disk_cache_bytes: Option<u64>,
    /// Huge pages that were allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be.
    pub hugetlb_failures: Option<u64>,
}

impl BalloonStatistics {
    /// Reads the entries in a chain's buffers; unknown tags are left out.
    pub(super) fn read(memory: &GuestMemory, chain: DescriptorChain<GuestMemory>) -> Self {
        let mut bytes = Vec::new();
        let most = (MAX_ENTRIES * ENTRY_BYTES) as u64;
        if let Ok(reader) = chain.reader(&**memory) {
            // What can't be read is not there.
            let _ = reader.take(most).read_to_end(&mut bytes);
        }
        Self::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        for [t0, t1, value @ ..] in entries {
            let field = match u16::from_le_bytes([*t0, *t1]) {
                0 => &mut statistics.swapped_in_bytes,
                1 => &mut statistics.swapped_out_bytes,
                2 => &mut statistics.major_faults,
                3 => &mut statistics.minor_faults,
                4 => &mut statistics.free_bytes,
                5 => &mut statistics.total_bytes,
                6 => &mut statistics.available_bytes,
                7 => &mut statistics.disk_cache_bytes,
                8 => &mut statistics.hugetlb_allocations,
                9 => &mut statistics.hugetlb_failures,
                _ => continue,
            };
            *field = Some(u64::from_le_bytes(*value));
        }
        statistics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_in_any_order_and_unknown_ones_left_out() {
        let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes = [
            entry(5, 256 << 20),
            entry(77, 1),
            entry(4, 100 << 20),
            vec![1, 2, 3],
        ]
        .concat();
        let expected = BalloonStatistics {
            total_bytes: Some(256 << 20),
            free_bytes: Some(100 << 20),
            ..BalloonStatistics::default()
        };
        assert_eq!(BalloonStatistics::parse(&bytes), expected);
    }
}
