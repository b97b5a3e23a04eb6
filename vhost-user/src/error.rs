//! What can go wrong before and around serving a disk.

use std::io;
use std::path::PathBuf;

/// A failure that ends the process, with the sentence that says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image can't be opened at all.
    #[error("can't open the image {}: {source}", path.display())]
    OpenImage {
        /// The image's path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path is something that can't be a disk.
    #[error("the image {} is {what}; give a raw file or a block device", path.display())]
    NotAnImage {
        /// The image's path.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// The image has no bytes.
    #[error(
        "the image {} has size 0; create it with a size first, for example: truncate -s 10G {}",
        path.display(), path.display()
    )]
    EmptyImage {
        /// The image's path.
        path: PathBuf,
    },
    /// `--direct on`, and the file system or device can't.
    #[error(
        "the image {} can't be opened with O_DIRECT ({reason}); use --direct auto or off",
        path.display()
    )]
    NoDirectIo {
        /// The image's path.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// `--io-poll`, and the device or file system can't.
    #[error("the image {} can't be polled: {reason}", path.display())]
    NoPolling {
        /// The image's path.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// Someone else holds a conflicting lock.
    #[error("the image {} is in use by {holder}; stop it first", path.display())]
    ImageInUse {
        /// The image's path.
        path: PathBuf,
        /// The holder, as far as this process may know.
        holder: String,
    },
    /// The kernel refused the lock for another reason than a conflict.
    #[error("can't lock the image {}: {source}", path.display())]
    LockImage {
        /// The image's path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A layered image can't be used.
    #[error(transparent)]
    Overlay(#[from] crate::overlay::OverlayError),
    /// An image on a server can't be used.
    #[error(transparent)]
    Remote(#[from] crate::remote::RemoteError),
    /// An image can't be imported.
    #[error("can't import {}: {source}", path.display())]
    Qcow2 {
        /// The image's path.
        path: PathBuf,
        /// What is wrong with it.
        source: crate::qcow2::Qcow2Error,
    },
    /// It is not the image that it is said to be.
    #[error(
        "{} is not the image that was asked for: its {digest} is {found}, not {expected}",
        path.display()
    )]
    WrongDigest {
        /// The image's path.
        path: PathBuf,
        /// The digest's name.
        digest: &'static str,
        /// What it is.
        found: String,
        /// What it was to be.
        expected: String,
    },
    /// A key can't be used.
    #[error(transparent)]
    Key(#[from] crate::sector_cipher::KeyError),
    /// io_uring can't be used by this process.
    #[error("io_uring is unavailable: {reason}")]
    UringUnavailable {
        /// What forbids it, and what to do.
        reason: String,
    },
    /// The socket can't be bound.
    #[error("can't listen on the socket {}: {reason}", path.display())]
    BindSocket {
        /// The socket's path.
        path: PathBuf,
        /// What stands in the way.
        reason: String,
    },
    /// A system call failed that has no reason to.
    #[error("{action}: {source}")]
    Io {
        /// What was tried, and on what.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// The process's exit code for this failure: 1 runtime, 3 image, 4 in use, 5 io_uring,
    /// 6 socket. 2 is the command line's.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Io { .. } => 1,
            Self::OpenImage { .. }
            | Self::NotAnImage { .. }
            | Self::EmptyImage { .. }
            | Self::NoDirectIo { .. }
            | Self::NoPolling { .. }
            | Self::LockImage { .. }
            | Self::Overlay(_)
            | Self::Remote(_)
            | Self::Qcow2 { .. }
            | Self::WrongDigest { .. }
            | Self::Key(_) => 3,
            Self::ImageInUse { .. } => 4,
            Self::UringUnavailable { .. } => 5,
            Self::BindSocket { .. } => 6,
        }
    }

    pub(crate) fn io(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            action: action.into(),
            source: source.into(),
        }
    }
}
