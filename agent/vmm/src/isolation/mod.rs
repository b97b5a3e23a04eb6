//! What keeps a VMM that its guest has taken over from the rest of the host: lists of system calls
//! for each thread ([`seccomp`]), and a jail with namespaces, a root of its own, Landlock, and a user
//! without rights ([`jail`]), in which a [`supervisor`] keeps the process.
//!
//! All that needs rights is opened before: `/dev/kvm`, TAPs, the sockets that are listened on.

mod jail;
pub mod seccomp;
pub mod supervisor;

use std::io;
use std::path::PathBuf;

use keelson_isolation::RestrictError;

pub use jail::{Jail, JailUser};

/// Why the process can't be isolated.
#[derive(Debug, thiserror::Error)]
pub enum IsolationError {
    /// A step of entering the jail failed.
    #[error("can't {step}: {source}{}", hint(.source))]
    Jail {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A path that the guest needs can't be taken into the jail.
    #[error("can't take {path} into the jail: {source}")]
    Path {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Landlock refused.
    #[error("the jailed process: {0}")]
    Files(RestrictError),
    /// A thread can't be kept to its list of system calls.
    #[error("the thread {thread}: {source}")]
    Thread {
        /// The kind of thread.
        thread: &'static str,
        /// What is wrong.
        source: RestrictError,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => "; --jail needs root, or CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID",
        _ => "",
    }
}

impl IsolationError {
    fn jail(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |source| Self::Jail {
            step,
            source: source.into(),
        }
    }
}
