//! Keeps a thread, for good, to what it has a need for: system calls by seccomp(2)
//! ([`SystemCalls`]), files by Landlock ([`AllowedPaths`]).
//!
//! Both hold for the calling thread and for those that it starts from then on. Which calls and files
//! those are is said by the programs that use this.

mod error;
mod files;
mod refusal;
mod system_calls;
#[cfg(any(test, feature = "trial"))]
pub mod trial;

pub use error::RestrictError;
pub use files::AllowedPaths;
pub use system_calls::{Argument, Mode, RUNTIME, SystemCalls, THREAD_FLAGS, refuse};
