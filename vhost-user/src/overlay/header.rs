//! The header of a striped file: a block of 4 KiB, in two copies at the start.
//!
//! All numbers are little-endian. `docs/images.md` has the layout as a table.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use uuid::Uuid;

/// Bytes of a header copy, and of a block of the map.
pub const BLOCK_BYTES: usize = 4096;
/// The first bytes of a striped file.
pub const MAGIC: [u8; 8] = *b"KEELSTRP";
/// The format's version.
pub const VERSION: u32 = 1;
/// The smallest and the largest stripe, in bytes.
pub const STRIPE_BYTES: std::ops::RangeInclusive<u32> = 64 << 10..=1 << 20;
/// The largest disk, in bytes.
pub const MAX_SIZE: u64 = 64 << 40;
/// The longest reference to a base, in bytes.
pub const MAX_REFERENCE: usize = 3584;
/// Stripes that one block of the map describes.
pub const STRIPES_PER_BLOCK: u64 = (BLOCK_BYTES as u64 - MAP_BLOCK_HEADER as u64) * 8;
/// Bytes before the bits in a block of the map.
pub const MAP_BLOCK_HEADER: usize = 32;

const REFERENCE_OFFSET: usize = 256;
const CHECKSUM_OFFSET: usize = BLOCK_BYTES - 4;
const ENCRYPTED: u64 = 1;
const SEALED: u64 = 1;

/// What a striped file stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// Nothing: stripes that are not in the file are zero.
    None,
    /// A raw image or a block device.
    Raw {
        /// Its path; a relative one starts at the overlay's folder.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// SHA-256 of samples of its content.
        digest: [u8; 32],
        /// When it was last changed (seconds and nanoseconds since 1970), zero for a device.
        modified: (i64, u32),
    },
    /// Another striped file.
    Striped {
        /// Its path; a relative one starts at the overlay's folder.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// Its identity.
        uuid: Uuid,
        /// Its [`Header::opened`] when it became a base.
        opened: u64,
    },
    /// An image on an HTTP server.
    Http {
        /// Its address.
        url: String,
        /// Its size in bytes.
        bytes: u64,
        /// SHA-256 of the manifest with its chunks' checksums.
        manifest: Option<[u8; 32]>,
        /// Without a manifest: SHA-256 of its ETag or Last-Modified.
        validator: Option<[u8; 32]>,
    },
}

impl Base {
    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Raw { bytes, .. } | Self::Striped { bytes, .. } | Self::Http { bytes, .. } => {
                *bytes
            }
        }
    }
}

/// How the right key is recognized, without saying anything about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyCheck {
    /// Random.
    pub salt: [u8; 16],
    /// HMAC-SHA-256 of the salt with the disk's key.
    pub mac: [u8; 32],
}

/// What a striped file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its identity, also in the checksum of each block of the map.
    pub uuid: Uuid,
    /// Counts the changes of the header: of two whole copies the higher one is valid.
    pub generation: u64,
    /// Counts how often the file was opened for writing, so that a changed base is recognized.
    pub opened: u64,
    /// The disk's size in bytes.
    pub bytes: u64,
    /// The stripe's size in bytes, a power of two in [`STRIPE_BYTES`].
    pub stripe_bytes: u32,
    /// Blocks that each copy of the map has room for.
    pub map_capacity: u64,
    /// Nobody may write into it: other images stand on it.
    pub sealed: bool,
    /// How to recognize the key, if the data is encrypted.
    pub key_check: Option<KeyCheck>,
    /// What it stands on.
    pub base: Base,
}

/// What is wrong with a header copy.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The first bytes are others.
    #[error("it doesn't start with the mark of a layered image")]
    NotStriped,
    /// The checksum is wrong.
    #[error("its checksum is wrong")]
    Checksum,
    /// It is of a later version.
    #[error("it has format version {0}")]
    NewerVersion(u32),
    /// It uses unknown features.
    #[error("it has unknown features {0:#x}")]
    UnknownFeatures(u64),
    /// A field is impossible, although the checksum is right.
    #[error("its field {0} is impossible")]
    Field(&'static str),
}

impl Header {
    /// Stripes of the disk; the last one may reach past its end.
    pub fn stripes(&self) -> u64 {
        self.bytes.div_ceil(u64::from(self.stripe_bytes))
    }

    /// Blocks of the map that are in use.
    pub fn map_blocks(&self) -> u64 {
        self.stripes().div_ceil(STRIPES_PER_BLOCK)
    }

    /// The offset of a copy (0 or 1) of the map.
    pub fn map_offset(&self, copy: u8) -> u64 {
        let block = BLOCK_BYTES as u64;
        2 * block + u64::from(copy) * self.map_capacity * block
    }

    /// The offset of the data, a multiple of 1 MiB.
    pub fn data_offset(&self) -> u64 {
        self.map_offset(2).next_multiple_of(1 << 20)
    }

    /// The largest size that the map has room for.
    pub fn largest_size(&self) -> u64 {
        let stripes = self.map_capacity.saturating_mul(STRIPES_PER_BLOCK);
        let bytes = stripes.saturating_mul(u64::from(self.stripe_bytes));
        bytes.min(MAX_SIZE)
    }

    /// The bytes of one copy.
    ///
    /// # Panics
    /// Never for a header that [`check`](Self::check) accepts.
    pub fn to_bytes(&self) -> [u8; BLOCK_BYTES] {
        let mut out = [0; BLOCK_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            if let Some(field) = out.get_mut(offset..offset + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, self.uuid.as_bytes());
        put(32, &self.generation.to_le_bytes());
        put(40, &self.opened.to_le_bytes());
        put(48, &self.bytes.to_le_bytes());
        put(56, &self.stripe_bytes.to_le_bytes());
        let features = self.key_check.map_or(0, |_| ENCRYPTED);
        put(64, &features.to_le_bytes());
        let compatible = if self.sealed { SEALED } else { 0 };
        put(72, &compatible.to_le_bytes());
        put(80, &self.map_capacity.to_le_bytes());
        if let Some(check) = &self.key_check {
            put(88, &check.salt);
            put(104, &check.mac);
        }
        put(144, &self.base.bytes().to_le_bytes());
        let (kind, reference): (u32, &[u8]) = match &self.base {
            Base::None => (0, &[]),
            Base::Raw {
                path,
                digest,
                modified,
                ..
            } => {
                put(152, digest);
                put(184, &modified.0.to_le_bytes());
                put(192, &modified.1.to_le_bytes());
                (1, path.as_os_str().as_bytes())
            }
            Base::Striped {
                path, uuid, opened, ..
            } => {
                put(152, uuid.as_bytes());
                put(168, &opened.to_le_bytes());
                (2, path.as_os_str().as_bytes())
            }
            Base::Http {
                url,
                manifest,
                validator,
                ..
            } => {
                put(152, &manifest.unwrap_or_default());
                put(184, &validator.unwrap_or_default());
                (3, url.as_bytes())
            }
        };
        let length = u32::try_from(reference.len()).unwrap_or(u32::MAX);
        put(136, &kind.to_le_bytes());
        put(140, &length.to_le_bytes());
        put(REFERENCE_OFFSET, reference);
        let checksum = crc32fast::hash(&out[..CHECKSUM_OFFSET]);
        out[CHECKSUM_OFFSET..].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads one copy. Says what is wrong with anything that [`to_bytes`](Self::to_bytes) can't
    /// have made.
    pub fn parse(copy: &[u8; BLOCK_BYTES]) -> Result<Self, HeaderError> {
        let fields = Fields(copy);
        if copy[..8] != MAGIC {
            return Err(HeaderError::NotStriped);
        }
        // Every version has its checksum there.
        if crc32fast::hash(&copy[..CHECKSUM_OFFSET]) != fields.u32(CHECKSUM_OFFSET) {
            return Err(HeaderError::Checksum);
        }
        let version = fields.u32(8);
        if version > VERSION {
            return Err(HeaderError::NewerVersion(version));
        }
        let features = fields.u64(64);
        if features & !ENCRYPTED != 0 {
            return Err(HeaderError::UnknownFeatures(features & !ENCRYPTED));
        }
        let header = Self {
            uuid: Uuid::from_bytes(fields.array(16)),
            generation: fields.u64(32),
            opened: fields.u64(40),
            bytes: fields.u64(48),
            stripe_bytes: fields.u32(56),
            map_capacity: fields.u64(80),
            sealed: fields.u64(72) & SEALED != 0,
            key_check: (features & ENCRYPTED != 0).then(|| KeyCheck {
                salt: fields.array(88),
                mac: fields.array(104),
            }),
            base: fields.base()?,
        };
        if version != VERSION {
            return Err(HeaderError::Field("version"));
        }
        header.check()?;
        Ok(header)
    }

    /// Whether the fields fit together.
    pub fn check(&self) -> Result<(), HeaderError> {
        let impossible = |field| Err(HeaderError::Field(field));
        if !self.stripe_bytes.is_power_of_two() || !STRIPE_BYTES.contains(&self.stripe_bytes) {
            return impossible("stripe size");
        }
        if self.bytes == 0 || self.bytes > MAX_SIZE || !self.bytes.is_multiple_of(512) {
            return impossible("size");
        }
        let most = MAX_SIZE / u64::from(self.stripe_bytes) / STRIPES_PER_BLOCK + 1;
        if self.map_capacity < self.map_blocks() || self.map_capacity > most {
            return impossible("map capacity");
        }
        if self.generation == 0 || self.generation == u64::MAX || self.opened == u64::MAX {
            return impossible("generation");
        }
        let (reference, needed) = match &self.base {
            Base::None => (0, false),
            Base::Raw { path, .. } | Base::Striped { path, .. } => (path.as_os_str().len(), true),
            Base::Http { url, .. } => (url.len(), true),
        };
        if reference > MAX_REFERENCE || (reference == 0) == needed {
            return impossible("base reference");
        }
        if self.base.bytes() > self.bytes.next_multiple_of(512) {
            return impossible("base size");
        }
        Ok(())
    }
}

struct Fields<'a>(&'a [u8; BLOCK_BYTES]);

impl Fields<'_> {
    fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        let field = self.0.get(offset..offset + N);
        field
            .and_then(|field| field.try_into().ok())
            .unwrap_or([0; N])
    }

    fn digest(&self, offset: usize) -> Option<[u8; 32]> {
        Some(self.array(offset)).filter(|digest| *digest != [0; 32])
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.array(offset))
    }

    fn base(&self) -> Result<Base, HeaderError> {
        let impossible = HeaderError::Field("base reference");
        let length = self.u32(140) as usize;
        if length > MAX_REFERENCE {
            return Err(impossible);
        }
        let reference = self
            .0
            .get(REFERENCE_OFFSET..REFERENCE_OFFSET + length)
            .unwrap_or_default();
        if reference.contains(&0) {
            return Err(impossible);
        }
        let path = || PathBuf::from(OsStr::from_bytes(reference));
        let bytes = self.u64(144);
        Ok(match self.u32(136) {
            0 if bytes == 0 => Base::None,
            1 => Base::Raw {
                path: path(),
                bytes,
                digest: self.array(152),
                modified: (i64::from_le_bytes(self.array(184)), self.u32(192)),
            },
            2 => Base::Striped {
                path: path(),
                bytes,
                uuid: Uuid::from_bytes(self.array(152)),
                opened: self.u64(168),
            },
            3 => Base::Http {
                url: String::from_utf8(reference.to_vec()).map_err(|_| impossible)?,
                bytes,
                manifest: self.digest(152),
                validator: self.digest(184),
            },
            _ => return Err(HeaderError::Field("base kind")),
        })
    }
}
