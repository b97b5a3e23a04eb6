//! Images on HTTP servers: fetched piece by piece as a guest reads them, checked, and kept in the
//! overlay that stands on them.
//!
//! * [`Manifest`] lists the checksums of an image's chunks; its publisher makes it.
//! * [`HttpImage`] asks the server, one range at a time, and believes nothing that it says without
//!   comparing it with what is known of the image.
//! * [`Fetcher`] decides what is fetched when: what a guest waits for first, then what it will
//!   read next, then the rest. It has threads of its own, so nobody else waits.
//! * [`files`] describes an image for a new overlay, and opens the base of an existing one.

pub mod client;
pub mod error;
pub mod fetch_plan;
pub mod fetcher;
pub mod files;
mod fill;
pub mod manifest;

pub use client::{ClientOptions, HttpImage};
pub use error::RemoteError;
pub use fetcher::{FetchOptions, Fetcher};
pub use manifest::Manifest;
