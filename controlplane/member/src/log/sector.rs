//! Sectors: the parts of a frame that a disk writes whole or not at all, each with a checksum.
//!
//! That tells a torn write from damage. A frame that was torn is made of sectors of the frame, and of
//! ones that were not written: zeros, or whole ones of an older frame. One that is neither is damaged.

use super::Owner;

/// Bytes that a disk writes whole or not at all.
pub(super) const SECTOR: usize = 512;
/// Bytes of a frame in one sector.
pub(super) const PAYLOAD: usize = SECTOR - TRAILER;
/// number of the frame, place in it, checksum
const TRAILER: usize = 8 + 4 + 4;

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sector {
    /// Nothing: it was prepared.
    Unwritten,
    /// A part of a frame.
    Whole {
        /// Number of the frame.
        frame: u64,
        /// Place in it.
        place: u32,
    },
    /// Something that was never written like this.
    Damaged,
}

/// Where a member's checksums begin: another member's sectors are damaged ones here.
pub(super) fn seed(owner: Owner) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&owner.cluster_id.to_le_bytes());
    hasher.update(&owner.member_id.to_le_bytes());
    hasher.finalize()
}

/// Cuts a frame into sectors.
pub(super) fn seal(payload: &[u8], seed: u32, frame: u64, sealed: &mut Vec<u8>) {
    sealed.clear();
    for (place, part) in (0_u32..).zip(payload.chunks(PAYLOAD)) {
        let start = sealed.len();
        sealed.extend_from_slice(part);
        sealed.resize(start + PAYLOAD, 0);
        sealed.extend_from_slice(&frame.to_le_bytes());
        sealed.extend_from_slice(&place.to_le_bytes());
        let sum = checksum(seed, &sealed[start..]);
        sealed.extend_from_slice(&sum.to_le_bytes());
    }
}

/// What a sector's bytes hold.
pub(super) fn look(bytes: &[u8], seed: u32) -> Sector {
    // Most of a segment is.
    if bytes == &[0; SECTOR][..] {
        return Sector::Unwritten;
    }
    let Some((body, sum)) = bytes.split_last_chunk::<4>() else {
        return Sector::Damaged;
    };
    if checksum(seed, body) == u32::from_le_bytes(*sum)
        && let Some((body, place)) = body.split_last_chunk::<4>()
        && let Some((_, frame)) = body.split_last_chunk::<8>()
    {
        return Sector::Whole {
            frame: u64::from_le_bytes(*frame),
            place: u32::from_le_bytes(*place),
        };
    }
    Sector::Damaged
}

/// The payload of sectors that follow each other in one frame, from place `first` on; `None` if they
/// don't.
pub(super) fn open(sealed: &[u8], seed: u32, frame: Option<u64>, first: u32) -> Option<Vec<u8>> {
    let mut payload = Vec::with_capacity(sealed.len());
    let mut expected = frame;
    for (at, sector) in (first..).zip(sealed.chunks_exact(SECTOR)) {
        match look(sector, seed) {
            Sector::Whole { frame, place }
                if place == at && expected.is_none_or(|expected| expected == frame) =>
            {
                expected = Some(frame);
                payload.extend_from_slice(&sector[..PAYLOAD]);
            }
            _ => return None,
        }
    }
    Some(payload)
}

fn checksum(seed: u32, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(seed);
    hasher.update(body);
    hasher.finalize()
}
