//! Why a qcow2 image can't be read.

use std::io;

/// What is wrong with the image, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// It can't be read or written.
    #[error("can't {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is something else.
    #[error("it is no qcow2 image: it doesn't start with QFI\\xfb")]
    NotQcow2,
    /// A version that doesn't exist yet.
    #[error(
        "it has qcow2 version {0}; 2 and 3 are known. Convert it with: qemu-img convert -O raw"
    )]
    Version(u32),
    /// It needs something else, or is in a state, that isn't supported.
    #[error("it {0}; convert it with: qemu-img convert -O raw")]
    Unsupported(&'static str),
    /// It stands on another image.
    #[error(
        "it stands on a backing file, \"{0}\", which an import doesn't open, since whoever made \
         the image chose it; if you trust it, flatten both with: qemu-img convert -O raw"
    )]
    BackingFile(String),
    /// A field contradicts others, or the file's size.
    #[error("it is damaged: {0}")]
    Damaged(String),
}
