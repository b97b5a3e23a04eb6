//! The header of a qcow2 image.

use super::Qcow2Error;

/// The largest image, in bytes.
const MAX_SIZE: u64 = 64 << 40;
/// The largest table of the first level, in entries: 32 MiB, as in QEMU.
const MAX_L1: u32 = 4 << 20;
/// Bytes of the header up to the compression type.
pub const HEADER_BYTES: usize = 112;

const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Set while it is written, and about the reference counts only.
const DIRTY: u64 = 1;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Deflate,
    /// Zstandard.
    Zstd,
}

/// What is needed of the header to read the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// The disk's size in bytes.
    pub bytes: u64,
    /// The binary logarithm of the cluster's size, 9 to 21.
    pub cluster_bits: u32,
    /// Where the table of the first level is.
    pub l1_offset: u64,
    /// Entries of that table.
    pub l1_entries: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Where the backing file's name is, and its bytes.
    pub backing_name: Option<(u64, u32)>,
}

impl Qcow2Header {
    /// Reads the first [`HEADER_BYTES`] of a file, zeroes where it is shorter.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Qcow2Error> {
        let u32_at = |offset: usize| {
            let field = bytes
                .get(offset..offset + 4)
                .and_then(|field| field.try_into().ok());
            u32::from_be_bytes(field.unwrap_or_default())
        };
        let u64_at =
            |offset: usize| u64::from(u32_at(offset)) << 32 | u64::from(u32_at(offset + 4));
        if bytes[..4] != *b"QFI\xfb" {
            return Err(Qcow2Error::NotQcow2);
        }
        let version = u32_at(4);
        let features = match version {
            2 => 0,
            3 => u64_at(72),
            other => return Err(Qcow2Error::Version(other)),
        };
        check_features(features)?;
        if u32_at(32) != 0 {
            return Err(Qcow2Error::Unsupported("is encrypted"));
        }
        let header_bytes = if version == 2 { 72 } else { u32_at(100) };
        if version == 3 && header_bytes < 104 {
            return Err(damaged("its header is too short"));
        }
        let compression = match bytes[104] {
            _ if features & COMPRESSION == 0 || header_bytes < 105 => Compression::Deflate,
            0 => Compression::Deflate,
            1 => Compression::Zstd,
            _ => return Err(Qcow2Error::Unsupported("is compressed in an unknown way")),
        };
        let header = Self {
            version,
            bytes: u64_at(24),
            cluster_bits: u32_at(20),
            l1_offset: u64_at(40),
            l1_entries: u32_at(36),
            compression,
            backing_name: (u64_at(8) != 0).then(|| (u64_at(8), u32_at(16).min(1023))),
        };
        header.check()?;
        Ok(header)
    }

    /// The cluster's size in bytes.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of a table of the second level, one cluster large.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / 8
    }

    /// Clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.bytes.div_ceil(self.cluster_bytes())
    }

    fn check(&self) -> Result<(), Qcow2Error> {
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(damaged("its clusters have an impossible size"));
        }
        if self.bytes == 0 || self.bytes > MAX_SIZE {
            return Err(damaged("its size is 0 or above 64 TiB"));
        }
        if self.l1_entries > MAX_L1 {
            return Err(damaged("its first table is larger than 32 MiB"));
        }
        if u64::from(self.l1_entries) < self.clusters().div_ceil(self.l2_entries()) {
            return Err(damaged("its first table is too short for its size"));
        }
        if !self.l1_offset.is_multiple_of(self.cluster_bytes()) {
            return Err(damaged("its first table isn't at a cluster's start"));
        }
        Ok(())
    }
}

pub(super) fn damaged(what: &str) -> Qcow2Error {
    Qcow2Error::Damaged(what.into())
}

fn check_features(features: u64) -> Result<(), Qcow2Error> {
    let unsupported = |what| Err(Qcow2Error::Unsupported(what));
    if features & CORRUPT != 0 {
        return unsupported("is marked as corrupt; repair it first with qemu-img check -r all");
    }
    if features & EXTERNAL_DATA != 0 {
        return unsupported("keeps its data in another file");
    }
    if features & EXTENDED_L2 != 0 {
        return unsupported("has subclusters");
    }
    if features & !(DIRTY | COMPRESSION) != 0 {
        return unsupported("uses unknown features");
    }
    Ok(())
}
