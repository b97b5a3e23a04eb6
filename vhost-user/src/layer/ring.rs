//! The part of a worker's ring that channels see.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::{Submitter, squeue, types};

/// Files that one worker's ring can hold. Below the usual limit of open files, which the kernel
/// applies here as well.
pub const MAX_FILES: u32 = 512;

/// A bottom channel of a queue, which has operations in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf(u16);

/// Names one operation of one leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Whose it is.
    pub leaf: Leaf,
    /// The leaf's own number for it.
    pub index: u32,
}

impl Token {
    /// The token in an entry's user data.
    pub fn from_user_data(data: u64) -> Self {
        Self {
            leaf: Leaf(u16::try_from(data >> 32 & 0xffff).unwrap_or(0)),
            index: u32::try_from(data & 0xffff_ffff).unwrap_or(0),
        }
    }

    fn user_data(self, queue: u16) -> u64 {
        u64::from(queue) << 48 | u64::from(self.leaf.0) << 32 | u64::from(self.index)
    }
}

/// The queue in an entry's user data.
pub(crate) fn queue_of(data: u64) -> u16 {
    u16::try_from(data >> 48).unwrap_or(0)
}

/// Operations on their way into the ring. A plain list, so that channels run in tests without one.
#[derive(Debug, Default)]
pub struct RingOperations {
    queue: u16,
    entries: Vec<squeue::Entry>,
}

impl RingOperations {
    /// For the queue that the worker knows by this number.
    pub fn new(queue: u16) -> Self {
        Self {
            queue,
            entries: Vec::new(),
        }
    }

    /// Adds an operation. Its result comes back under the token.
    ///
    /// # Safety
    ///
    /// What the entry points to has to stay valid, and unused by others, until its result is back.
    pub unsafe fn push(&mut self, entry: squeue::Entry, token: Token) {
        self.entries
            .push(entry.user_data(token.user_data(self.queue)));
    }

    /// What was added since the last call to `clear`.
    pub fn entries(&self) -> &[squeue::Entry] {
        &self.entries
    }

    /// Forgets the entries, which are in the ring now.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
}

/// A file in the worker's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(pub u32);

impl FileSlot {
    /// As operations name it.
    pub fn fixed(self) -> types::Fixed {
        types::Fixed(self.0)
    }
}

/// The files of one worker's ring.
#[derive(Debug)]
pub struct FileTable {
    free: Vec<u32>,
}

impl Default for FileTable {
    fn default() -> Self {
        Self {
            free: (0..MAX_FILES).rev().collect(),
        }
    }
}

impl FileTable {
    fn put(&mut self, submitter: Option<&Submitter<'_>>, file: RawFd) -> io::Result<FileSlot> {
        let slot = self.free.pop().ok_or_else(|| {
            io::Error::other(format!(
                "the worker's ring has no room for more than {MAX_FILES} files"
            ))
        })?;
        let registered = submitter.map_or(Ok(1), |ring| ring.register_files_update(slot, &[file]));
        if let Err(error) = registered {
            self.free.push(slot);
            return Err(error);
        }
        Ok(FileSlot(slot))
    }

    /// Takes files out of the ring. Nothing may use them any more.
    pub fn remove(&mut self, submitter: Option<&Submitter<'_>>, slots: &[FileSlot]) {
        for FileSlot(slot) in slots {
            // Can't fail for a slot in the table; if it did, the slot would be lost.
            if submitter.is_none_or(|ring| ring.register_files_update(*slot, &[-1]).is_ok()) {
                self.free.push(*slot);
            }
        }
    }
}

/// What a channel is given when it is opened.
pub struct ChannelContext<'a> {
    files: &'a mut FileTable,
    submitter: Option<&'a Submitter<'a>>,
    waker: &'a Waker,
    leaves: u16,
    slots: Vec<FileSlot>,
}

impl<'a> ChannelContext<'a> {
    /// For a queue of the worker whose ring has these files; without a ring in tests.
    pub fn new(
        files: &'a mut FileTable,
        submitter: Option<&'a Submitter<'a>>,
        waker: &'a Waker,
    ) -> Self {
        Self {
            files,
            submitter,
            waker,
            leaves: 0,
            slots: Vec::new(),
        }
    }

    /// A name for a channel that uses the ring itself.
    pub fn leaf(&mut self) -> Leaf {
        self.leaves += 1;
        Leaf(self.leaves - 1)
    }

    /// Puts a file into the ring, for as long as the queue runs.
    pub fn register(&mut self, file: BorrowedFd<'_>) -> io::Result<FileSlot> {
        let slot = self.files.put(self.submitter, file.as_raw_fd())?;
        self.slots.push(slot);
        Ok(slot)
    }

    /// By which other threads make the worker call [`IoChannel::wake`](super::IoChannel::wake).
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// The files that were registered, to remove when the queue has ended.
    pub fn into_slots(self) -> Vec<FileSlot> {
        self.slots
    }
}

impl std::fmt::Debug for ChannelContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChannelContext")
            .field("leaves", &self.leaves)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

/// Wakes a queue's channel from any thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Waker(Arc<WakeState>);

#[derive(Debug)]
struct WakeState {
    event: Arc<OwnedFd>,
    wanted: AtomicBool,
}

impl Waker {
    /// One that writes to the worker's eventfd.
    pub fn new(event: Arc<OwnedFd>) -> Self {
        Self(Arc::new(WakeState {
            event,
            wanted: AtomicBool::new(false),
        }))
    }

    /// Makes the worker call the channel's `wake` soon.
    pub fn wake(&self) {
        if !self.0.wanted.swap(true, Ordering::AcqRel) {
            // Fails only if the counter is full, and then the worker is being woken already.
            let _ = rustix::io::write(self.0.event.as_fd(), &1_u64.to_ne_bytes());
        }
    }

    /// Whether someone has called `wake` since the last call.
    pub(crate) fn take(&self) -> bool {
        self.0.wanted.load(Ordering::Relaxed) && self.0.wanted.swap(false, Ordering::AcqRel)
    }
}
