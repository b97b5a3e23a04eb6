//! A vhost-user-blk backend on io_uring.
//!
//! One process serves any number of disks, each to one frontend (a VMM) at a time. The frontend
//! shares the guest's memory and the virtqueues over a Unix socket; from then on requests travel
//! through shared memory and eventfds only, and guest pages go to and from a raw file without a
//! copy.
//!
//! How the parts fit together, from the outside in:
//!
//! * [`image`] opens, locks and measures a raw file or block device.
//! * [`server`] serves one disk to one frontend after another and stops cleanly.
//! * [`backend`] answers the vhost-user messages, and [`device`] starts and stops the queues.
//! * [`worker`] is the data path: threads that serve virtqueues, each with one io_uring.
//! * [`request_executor`] turns descriptor chains into requests and their results into answers,
//!   with [`descriptor_chain`] and [`request`] checking what the guest wrote.
//! * [`layer`] is what a disk's contents are made of; its channels own everything the kernel may
//!   still touch until it has completed.
//! * [`inflight_region`] notes what is in flight in memory that survives this process.
//! * [`isolation`] leaves each thread the system calls and the files that it needs, and starts them.

pub mod backend;
pub mod bus_fault;
pub mod catalog;
pub mod config_space;
pub mod control;
pub mod descriptor_chain;
pub mod device;
pub mod dirty_log;
pub mod disk;
pub mod error;
pub mod guest_memory;
pub mod image;
pub mod inflight_region;
pub mod isolation;
pub mod latency;
pub mod layer;
pub mod metrics;
pub mod overlay;
pub mod pinned_memory;
pub mod protocol_extension;
pub mod qcow2;
pub mod rate_limit;
pub mod remote;
pub mod request;
pub mod request_executor;
pub mod sector_cipher;
pub mod server;
pub mod uring;
pub mod virtqueue;
pub mod vring;
pub mod worker;

mod aligned_buffer;
mod direct_io;
mod error_log;
mod image_lock;
mod listener;

pub use error::Error;
