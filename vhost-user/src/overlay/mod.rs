//! Layered images: copy on write on stripes, over a base that is only read.
//!
//! An overlay is a sparse [`StripedFile`]: a header, a map with one bit for each stripe, and a
//! data area in which each stripe has a fixed place. A set bit says that the stripe is in this
//! file, a clear one that it is in the layer below. Since places are fixed and bits are only ever
//! set, a crash can't show a guest a stripe that is torn, or another stripe's: at worst a write
//! that was never flushed is missing.
//!
//! * [`header`] and [`map`] are the format, without any I/O.
//! * [`storage`] is the little that the format needs of a file, so that tests can lose power.
//! * [`StripedFile`] puts them together: data is durable before the bit that points to it.
//! * [`Chain`] is an overlay with all the layers below it, as one disk.
//! * [`session`] keeps a killed process from losing what it acknowledged and had not flushed.
//! * [`files`] creates, opens and rebases overlays in the file system, [`snapshot`] makes snapshots.

pub mod base;
pub mod chain;
pub mod error;
pub mod files;
pub mod header;
pub mod map;
mod map_file;
pub mod session;
pub mod snapshot;
pub mod storage;
pub mod striped_file;

pub use chain::{Chain, Place, Segment};
pub use error::OverlayError;
pub use header::Header;
pub use storage::{FileStorage, Storage};
pub use striped_file::StripedFile;
