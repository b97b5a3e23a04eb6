//! The header: what the file is, and the engine's first block.

use super::layout::u64_at;
use crate::MemberError;
use crate::disk::BLOCK;

/// Format of the file. The first, without checksums, was never released.
pub(super) const FORMAT: u64 = 2;
const MAGIC: &[u8; 8] = b"KEELENG\0";
/// magic, format, nonce, number of the sync, length, groups, checksum
const HEADER: usize = 8 + 8 + 8 + 8 + 8 + 8 + 4;

#[derive(Debug)]
pub(super) struct Header {
    /// Number of the last write of header or checksums.
    pub(super) sync: u64,
    /// Which of the slots has it: 0 or 1.
    pub(super) slot: u64,
    /// What the engine has in its first block.
    pub(super) first: Box<[u8]>,
    /// Groups that were written once.
    pub(super) groups: u64,
}

/// A header as it was read.
pub(super) struct Found {
    /// The file's random number.
    pub(super) nonce: u64,
    /// Of the engine's file.
    pub(super) length: u64,
    pub(super) header: Header,
}

impl Header {
    /// Of a new file. Nothing is in a slot.
    pub(super) fn new() -> Self {
        Self {
            sync: 0,
            slot: 1,
            first: vec![0; BLOCK - HEADER].into(),
            groups: 0,
        }
    }

    pub(super) fn encode(&self, nonce: u64, length: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BLOCK);
        bytes.extend_from_slice(MAGIC);
        for value in [FORMAT, nonce, self.sync, length, self.groups] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.first);
        let sum = crc32fast::hash(&bytes);
        bytes[HEADER - 4..HEADER].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// `None` if the slot is not whole.
    pub(super) fn decode(block: &[u8], name: &str) -> Result<Option<Found>, MemberError> {
        if &block[..8] != MAGIC {
            return Ok(None);
        }
        let mut zeroed = block.to_vec();
        zeroed[HEADER - 4..HEADER].fill(0);
        if crc32fast::hash(&zeroed).to_le_bytes() != block[HEADER - 4..HEADER] {
            return Ok(None);
        }
        if u64_at(block, 8) > FORMAT {
            return Err(MemberError::Newer {
                what: name.to_owned(),
                found: u64_at(block, 8),
                known: FORMAT,
            });
        }
        Ok(Some(Found {
            nonce: u64_at(block, 16),
            length: u64_at(block, 32),
            header: Self {
                sync: u64_at(block, 24),
                slot: 0,
                first: block[HEADER..].into(),
                groups: u64_at(block, 40),
            },
        }))
    }
}
