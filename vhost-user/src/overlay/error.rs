//! What can be wrong with a layered image.

use std::io;
use std::path::PathBuf;

/// Why a layered image can't be created, opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A file operation failed.
    #[error("can't {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No header copy is whole.
    #[error(
        "{} is no layered image, or both copies of its header are damaged: {reason}",
        path.display()
    )]
    BadHeader {
        /// The file.
        path: PathBuf,
        /// What is wrong with the better copy.
        reason: String,
    },
    /// A later version of keelson-blk made it.
    #[error(
        "{} has format version {found}, and this keelson-blk knows versions up to {known}; \
         use a newer keelson-blk",
        path.display()
    )]
    NewerVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The last one known here.
        known: u32,
    },
    /// It uses something that this version doesn't know.
    #[error(
        "{} uses features {features:#x} that this keelson-blk doesn't know; use a newer one",
        path.display()
    )]
    UnknownFeatures {
        /// The file.
        path: PathBuf,
        /// The unknown bits.
        features: u64,
    },
    /// Both copies of a part of the map are damaged.
    #[error(
        "{}: both copies of block {block} of its map are damaged, so it is unknown which of its \
         stripes from {first_byte} on are in this file; restore it from a backup",
        path.display()
    )]
    DamagedMap {
        /// The file.
        path: PathBuf,
        /// The block's index.
        block: u64,
        /// The first byte of the disk that the block describes.
        first_byte: u64,
    },
    /// The base isn't what it was when the overlay was made.
    #[error(
        "the base image {} has changed since {} was made on it: {reason}; what the guest would \
         see is a mixture of both. Restore the base",
        base.display(), path.display()
    )]
    BaseChanged {
        /// The overlay.
        path: PathBuf,
        /// Its base.
        base: PathBuf,
        /// What is different.
        reason: String,
    },
    /// Too many layers.
    #[error(
        "{} stands on more than {limit} layers; flatten it with: keelson-blk image export",
        path.display()
    )]
    TooDeep {
        /// The file.
        path: PathBuf,
        /// The most layers.
        limit: usize,
    },
    /// Other images depend on its content.
    #[error(
        "{} is a snapshot that other images stand on; serve it read-only, or make an overlay of \
         it with: keelson-blk image create --overlay-of {} NEW",
        path.display(), path.display()
    )]
    Sealed {
        /// The file.
        path: PathBuf,
    },
    /// Encrypted, and no key was given, or the other way round.
    #[error("{}: {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with the key.
        reason: String,
    },
    /// What was asked for makes no sense.
    #[error("{}: {reason}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What was asked, and what to ask instead.
        reason: String,
    },
}

impl OverlayError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Io {
            action,
            path: path.into(),
            source: source.into(),
        }
    }
}
