//! What can go wrong with an image on a server.

use std::path::PathBuf;

/// Why something of an image can't be had from its server.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RemoteError {
    /// The address can't be used.
    #[error("{url} can't be the address of an image: {reason}")]
    Url {
        /// The address.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The certificates can't be read.
    #[error("can't read certificates from {}: {reason}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing came, or not all of it.
    #[error("can't fetch {url}: {reason}")]
    Transfer {
        /// The address.
        url: String,
        /// What happened.
        reason: String,
    },
    /// The server answered with something else than the bytes.
    #[error("can't fetch {url}: the server answers {status}")]
    Status {
        /// The address.
        url: String,
        /// HTTP's status code.
        status: u16,
    },
    /// The server doesn't give parts of files.
    #[error(
        "{url} can't be read in parts: its server ignores Range, or compresses what it sends; use \
         one that gives ranges of the bytes as they are"
    )]
    NoRanges {
        /// The address.
        url: String,
    },
    /// It isn't the image that the overlay was made on.
    #[error(
        "the image at {url} has changed: {reason}. Nothing of it is mixed with what was fetched \
         before; restore it, or make new overlays of it"
    )]
    Changed {
        /// The address.
        url: String,
        /// What is different.
        reason: String,
    },
    /// The bytes aren't those that the manifest promises.
    #[error("{url}: the bytes from {offset} on don't have the checksum that the manifest promises")]
    Corrupt {
        /// The address.
        url: String,
        /// Where the chunk begins.
        offset: u64,
    },
    /// The manifest can't be used.
    #[error("the manifest {name} can't be used: {reason}")]
    Manifest {
        /// Its address or path.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There are no checksums.
    #[error(
        "there is no manifest at {url}; make one beside the image with: keelson-blk image manifest \
         IMAGE, or trust the server and the way to it with --no-checksums"
    )]
    NoManifest {
        /// Where it was looked for.
        url: String,
    },
    /// Nothing would show that the image has changed.
    #[error(
        "the server gives neither a strong ETag nor Last-Modified for {url}, so a changed image \
         couldn't be recognized; publish a manifest beside it"
    )]
    NoValidator {
        /// The address.
        url: String,
    },
    /// A file of this host can't be written or read.
    #[error("can't {action} {}: {reason}", path.display())]
    Local {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        reason: String,
    },
}

impl RemoteError {
    /// Whether the same may succeed a little later.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Transfer { .. } | Self::Corrupt { .. } => true,
            // Too many requests, and whatever is the server's own fault.
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500..),
            _ => false,
        }
    }
}
