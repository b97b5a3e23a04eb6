//! What a disk's contents are made of: layers that are stacked on each other.
//!
//! A [`BlockDevice`] is a disk's contents, shared by all its queues. An [`IoChannel`] is one
//! queue's way to it: it takes owned requests and gives them back completed, in any order. A
//! layer (an overlay, encryption, a limit) is a device that holds other devices, with channels
//! that hold channels to them. At the bottom are [`file`](self::file) on io_uring and
//! [`null`](self::null).
//!
//! All channels of a queue live in the thread of the worker that serves the queue, and share that
//! worker's ring: a channel puts operations into [`RingOperations`], and is given their results.
//! A request that fits the file as it is becomes one operation, without a copy, an allocation or
//! a lock. A channel that needs other threads has a [`Waker`].

pub mod buffers;
pub mod crypt;
pub mod file;
pub mod limit;
pub mod null;
pub mod overlay;
pub mod polled;
pub mod ring;

mod transfer;

use std::fmt::Debug;
use std::io;
use std::time::Instant;

use crate::image::BlockSizes;
pub use buffers::{Buffers, GuestLease};
pub use ring::{ChannelContext, FileSlot, Leaf, RingOperations, Token, Waker};

/// What a device is like. Only `bytes` may change while it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Size in bytes. Requests stay below it, rounded up to 512.
    pub bytes: u64,
    /// Block sizes to tell the guest.
    pub block_sizes: BlockSizes,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Alignment, in bytes, at which offsets, lengths and buffers reach the device without a
    /// bounce buffer: for the buffers of layers above. A power of two.
    pub alignment: usize,
    /// Whether [`Operation::Discard`] and [`Operation::WriteZeroes`] are supported.
    pub discard: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// From the device into the buffers.
    Read,
    /// From the buffers to the device.
    Write,
    /// Makes all completed writes durable.
    Flush,
    /// The content of the range is of no interest any more. May do nothing.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Whether its space may be given back.
        unmap: bool,
    },
}

impl Operation {
    /// Whether it changes the device's content.
    pub fn modifies(self) -> bool {
        !matches!(self, Self::Read | Self::Flush)
    }
}

/// A request, and the memory that it needs until it is completed.
#[derive(Debug)]
pub struct IoRequest {
    /// The submitter's name for it, given back with the completion.
    pub tag: u64,
    /// What to do.
    pub operation: Operation,
    /// Byte offset on the device; 0 for a flush.
    pub offset: u64,
    /// Bytes on the device; 0 for a flush. For reads and writes that of the buffers.
    pub len: u64,
    /// Whether a modification has to be durable before it completes.
    pub durable: bool,
    /// The data of reads and writes, else [`Buffers::none`].
    pub buffers: Buffers,
}

/// The end of a request.
#[derive(Debug)]
pub struct IoCompletion {
    /// The request's tag.
    pub tag: u64,
    /// Done as a whole, or the errno.
    pub result: Result<(), i32>,
    /// The request's buffers, unchanged in place and length.
    pub buffers: Buffers,
}

/// A disk's contents.
pub trait BlockDevice: Debug + Send + Sync {
    /// What it is like now.
    fn properties(&self) -> Properties;

    /// Opens a channel for one queue. Called on the thread that will use it.
    fn open_channel(&self, context: &mut ChannelContext<'_>) -> io::Result<Box<dyn IoChannel>>;

    /// Makes all completed writes durable, in the calling thread, which may wait.
    fn sync(&self) -> io::Result<()>;

    /// Looks again how large it is, after its file was enlarged. Returns the size in bytes.
    fn remeasure(&self) -> io::Result<u64> {
        Ok(self.properties().bytes)
    }
}

/// One queue's way to a device.
///
/// A channel that is dropped with operations in the ring must leak their memory: the kernel may
/// still write into it.
pub trait IoChannel: Debug {
    /// Takes a request. It may be complete when this returns.
    fn submit(&mut self, request: IoRequest, ring: &mut RingOperations);

    /// Takes the result of one of the channel's ring operations: bytes, or a negated errno. False
    /// if the token belongs to another channel; a layer asks its lower channels one by one.
    fn complete(&mut self, token: Token, result: i32, ring: &mut RingOperations) -> bool;

    /// A completed request, until there is none.
    fn take_completion(&mut self) -> Option<IoCompletion>;

    /// Called after [`Waker::wake`], and when [`deadline`](Self::deadline) has passed.
    fn wake(&mut self, _now: Instant, _ring: &mut RingOperations) {}

    /// When to call [`wake`](Self::wake) at the latest.
    fn deadline(&self) -> Option<Instant> {
        None
    }
}
