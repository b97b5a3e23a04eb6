//! Reading qcow2 images, to import them (QEMU, docs/interop/qcow2.txt).
//!
//! Nothing that the file says is trusted: every offset is checked against the file's size, tables
//! are read in pieces, and reference counts, which only writers need, are ignored.

mod error;
mod header;
mod import;
mod reader;

pub use error::Qcow2Error;
pub use header::{Compression, Qcow2Header};
pub use import::import;
pub use reader::{Cluster, Qcow2Image, ReadAt};
