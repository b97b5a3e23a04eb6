//! Runs the real `keelson-vmm` and `keelson-blk` with the payload guest (`tests/payload`) on this
//! machine's `/dev/kvm`, paravirtual or not.
//!
//! Everything of a test is in a directory of its own, and its TAP devices are in a network namespace of
//! its own, so tests run side by side. What is missing (`/dev/kvm`, root for network namespaces, built
//! binaries) makes a test fail with a sentence that says so: nothing passes without having run.
//!
//! The functions here panic where a test can't go on, as assertions do.

mod backend;
mod binaries;
mod echo;
mod guest;
mod namespaces;
mod pattern;
mod relay;
mod waiting;

pub use backend::{Backend, Image};
pub use binaries::{binary, payload};
pub use echo::{EchoSocket, FrameSocket};
pub use guest::{Ended, Guest, GuestBuilder};
pub use namespaces::Namespaces;
pub use pattern::pattern_sector;
pub use relay::{Fate, Relay};
pub use waiting::{be_patient, wait_until};
