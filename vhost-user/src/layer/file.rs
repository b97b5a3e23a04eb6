//! The bottom of every disk: a raw file or block device on io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use io_uring::squeue;

use super::transfer::{Step, Transfer};
use super::{
    BlockDevice, ChannelContext, FileSlot, IoChannel, IoCompletion, IoRequest, Leaf, Properties,
    RingOperations, Token,
};
use crate::image::Image;

/// An image as a device.
#[derive(Clone, Debug)]
pub struct FileDevice {
    image: Arc<Image>,
}

impl FileDevice {
    /// Of an open image.
    pub fn new(image: Arc<Image>) -> Self {
        Self { image }
    }
}

impl BlockDevice for FileDevice {
    fn properties(&self) -> Properties {
        let alignment = self.image.direct();
        Properties {
            bytes: self.image.bytes(),
            block_sizes: self.image.block_sizes(),
            read_only: self.image.read_only(),
            alignment: alignment.map_or(1, |alignment| alignment.memory.max(alignment.offset)),
            discard: !self.image.read_only(),
        }
    }

    fn open_channel(&self, context: &mut ChannelContext<'_>) -> io::Result<Box<dyn IoChannel>> {
        Ok(Box::new(FileChannel {
            leaf: context.leaf(),
            file: context.register(self.image.file().as_fd())?,
            image: Arc::clone(&self.image),
            transfers: Vec::new(),
            free: Vec::new(),
            completed: VecDeque::new(),
        }))
    }

    fn sync(&self) -> io::Result<()> {
        self.image.sync()
    }

    fn remeasure(&self) -> io::Result<u64> {
        self.image.remeasure()
    }
}

/// A queue's operations on a file. Each request has at most one in the ring.
#[derive(Debug)]
struct FileChannel {
    leaf: Leaf,
    file: FileSlot,
    image: Arc<Image>,
    transfers: Vec<Option<Transfer>>,
    free: Vec<u32>,
    completed: VecDeque<IoCompletion>,
}

impl FileChannel {
    fn insert(&mut self, transfer: Transfer) -> u32 {
        let transfer = Some(transfer);
        if let Some(index) = self.free.pop()
            && let Some(entry) = self.transfers.get_mut(index as usize)
        {
            *entry = transfer;
            return index;
        }
        self.transfers.push(transfer);
        // Far fewer than 2^32 fit into memory.
        u32::try_from(self.transfers.len() - 1).unwrap_or(u32::MAX)
    }

    fn push(&self, entry: squeue::Entry, index: u32, ring: &mut RingOperations) {
        let leaf = self.leaf;
        // SAFETY: the entry points into the memory of the transfer at `index`, which stays in
        // the table, and on its heap, until `complete` is called with this token; the table is
        // leaked if that never happens.
        unsafe { ring.push(entry, Token { leaf, index }) };
    }
}

impl IoChannel for FileChannel {
    fn submit(&mut self, request: IoRequest, ring: &mut RingOperations) {
        let mut transfer = Transfer::new(request, &self.image);
        match transfer.next(self.file, &self.image) {
            Step::Submit(entry) => {
                let index = self.insert(transfer);
                self.push(entry, index, ring);
            }
            Step::Done(result) => self.completed.push_back(transfer.finish(result)),
        }
    }

    fn complete(&mut self, token: Token, result: i32, ring: &mut RingOperations) -> bool {
        if token.leaf != self.leaf {
            return false;
        }
        let entry = self.transfers.get_mut(token.index as usize);
        let Some(transfer) = entry.and_then(Option::as_mut) else {
            return true;
        };
        match transfer.complete(result, self.file, &self.image) {
            Step::Submit(entry) => self.push(entry, token.index, ring),
            Step::Done(result) => {
                let entry = self.transfers.get_mut(token.index as usize);
                if let Some(transfer) = entry.and_then(Option::take) {
                    self.free.push(token.index);
                    self.completed.push_back(transfer.finish(result));
                }
            }
        }
        true
    }

    fn take_completion(&mut self) -> Option<IoCompletion> {
        self.completed.pop_front()
    }
}

impl Drop for FileChannel {
    fn drop(&mut self) {
        let left = self.transfers.iter().flatten().count();
        if left > 0 {
            // Only after a ring failed: freeing would let the kernel write into reused memory.
            tracing::error!(requests = left, "leaking requests that never completed");
            std::mem::forget(std::mem::take(&mut self.transfers));
        }
    }
}
