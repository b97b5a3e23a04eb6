//! A raw file whose reads and writes are polled for (`IORING_SETUP_IOPOLL`): the device raises no
//! interrupt, the worker looks whether it is done.
//!
//! A ring that polls takes nothing but reads and writes around the page cache: no kicks, no flushes. So
//! each queue has one beside its worker's ring. While something is under way there, the channel has its
//! worker wake it again and again.

use std::fmt::{self, Debug, Formatter};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::fs::{major, minor};

use super::file::FileDevice;
use super::ring::MAX_FILES;
use super::{
    BlockDevice, ChannelContext, IoChannel, IoCompletion, IoRequest, Properties, RingOperations,
    Token, Waker,
};
use crate::aligned_buffer::AlignedBuffer;
use crate::image::Image;
use crate::{Error, isolation};

/// Operations that a queue can have under way: as many as the largest queue has descriptors.
const ENTRIES: u32 = 1024;
const STACK_BYTES: usize = 128 << 10;
/// `IORING_ENTER_GETEVENTS` (linux/io_uring.h).
const ENTER_GETEVENTS: u32 = 1;
/// `IOSQE_FIXED_FILE`: operations name files by their place in the ring's table.
const FIXED_FILE: u8 = 1;
/// What is polled for. Others, and what uses memory that is registered with the worker's ring, goes
/// there.
const OPERATIONS: [u8; 4] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
];

/// A raw file or block device that is polled.
pub struct PolledDevice {
    below: FileDevice,
    /// Those that no channel uses.
    rings: Arc<Mutex<Vec<IoUring>>>,
}

impl PolledDevice {
    /// Of an open image, with a ring for each of so many queues.
    ///
    /// # Errors
    /// [`Error::NoPolling`] if the image goes through the page cache, its device has no queue that
    /// polls, or its file system doesn't hand that on.
    pub fn new(image: Arc<Image>, path: &Path, queues: u16) -> Result<Self, Error> {
        let refuse = |reason: String| Error::NoPolling {
            path: path.into(),
            reason,
        };
        let alignment = image
            .direct()
            .ok_or_else(|| refuse("it goes through the page cache; see --direct".into()))?;
        check_device(image.file()).map_err(refuse)?;
        let file = image.file().try_clone();
        let file = file.map_err(|error| refuse(error.to_string()))?;
        // Whoever opens disks for the control socket may not make rings.
        let block = alignment.offset.max(alignment.memory);
        let create_all = move || (0..queues).map(|_| create(&file, block)).collect();
        let rings: Result<Vec<IoUring>, String> =
            isolation::spawn("polled rings", STACK_BYTES, create_all)
                .map(|thread| thread.join().unwrap_or_else(|_| Err("a panic".into())))
                .map_err(|error| refuse(error.to_string()))?;
        Ok(Self {
            below: FileDevice::new(image),
            rings: Arc::new(Mutex::new(rings.map_err(refuse)?)),
        })
    }
}

/// Says why the device that a file is, or is on, can't be polled.
fn check_device(file: &File) -> Result<(), String> {
    let failed = |error: io::Error| error.to_string();
    let metadata = file.metadata().map_err(failed)?;
    let device = if metadata.file_type().is_block_device() {
        metadata.rdev()
    } else {
        metadata.dev()
    };
    let device = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    // A partition's queue is that of the whole.
    let places = ["queue/io_poll", "../queue/io_poll"].map(|place| format!("{device}/{place}"));
    let read = places.iter().map(fs::read_to_string);
    let mut unknown = "it is on no block device".to_owned();
    for polls in read {
        match polls {
            Ok(text) if text.trim() == "1" => return Ok(()),
            Ok(_) => {
                return Err(format!(
                    "its device has no queue that polls ({device}/queue/io_poll is 0); give its driver some, for \
                     example with nvme.poll_queues=2 on the kernel's command line"
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                unknown = format!(
                    "whether its device polls can't be read any more ({error}); name the disk on the command line"
                );
            }
        }
    }
    Err(unknown)
}

/// A ring for polled reads and writes of this file alone, tried out with one block.
fn create(file: &File, block: usize) -> Result<IoUring, String> {
    let failed = |error: io::Error| error.to_string();
    let ring = IoUring::builder()
        .dontfork()
        .setup_iopoll()
        .setup_r_disabled()
        .build(ENTRIES);
    let mut ring = ring.map_err(failed)?;
    // Whatever its number is in the worker's ring.
    let table = vec![file.as_raw_fd(); usize::try_from(MAX_FILES).unwrap_or(0)];
    let submitter = ring.submitter();
    submitter.register_files(&table).map_err(failed)?;
    let mut restrictions: Vec<_> = OPERATIONS.map(Restriction::sqe_op).into();
    restrictions.push(Restriction::sqe_flags_allowed(FIXED_FILE));
    let restricted = submitter.register_restrictions(&mut restrictions);
    restricted.map_err(failed)?;
    submitter.register_enable_rings().map_err(failed)?;
    let mut buffer = AlignedBuffer::new(block, block).ok_or("no memory")?;
    let len = u32::try_from(block).unwrap_or(0);
    let read = opcode::Read::new(types::Fixed(0), buffer.as_mut_ptr(), len).build();
    // SAFETY: the buffer outlives the operation, which is waited for; if that fails it is leaked.
    let pushed = unsafe { ring.submission().push(&read) };
    pushed.map_err(|error| error.to_string())?;
    if let Err(error) = ring.submit_and_wait(1) {
        std::mem::forget(buffer);
        return Err(error.to_string());
    }
    let result = ring.completion().next();
    let result = result.map_or(0, |done: cqueue::Entry| done.result());
    if result < 0 {
        let error = io::Error::from_raw_os_error(-result);
        return Err(format!("a polled read fails ({error})"));
    }
    Ok(ring)
}

impl BlockDevice for PolledDevice {
    fn properties(&self) -> Properties {
        self.below.properties()
    }

    fn open_channel(&self, context: &mut ChannelContext<'_>) -> io::Result<Box<dyn IoChannel>> {
        let below = self.below.open_channel(context)?;
        let ring = lock(&self.rings).pop();
        let none = || io::Error::other("each polled ring has a queue already");
        Ok(Box::new(PolledChannel {
            ring: Some(ring.ok_or_else(none)?),
            below,
            operations: RingOperations::new(0),
            results: Vec::new(),
            under_way: 0,
            has_failed: false,
            waker: context.waker(),
            rings: Arc::clone(&self.rings),
        }))
    }

    fn sync(&self) -> io::Result<()> {
        self.below.sync()
    }

    fn remeasure(&self) -> io::Result<u64> {
        self.below.remeasure()
    }
}

impl Debug for PolledDevice {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolledDevice")
            .field("below", &self.below)
            .finish_non_exhaustive()
    }
}

/// A queue's operations on a polled file: those of the channel below, each in the ring that takes it.
struct PolledChannel {
    /// Gone only while the channel is dropped.
    ring: Option<IoUring>,
    below: Box<dyn IoChannel>,
    /// What the channel below asks for.
    operations: RingOperations,
    results: Vec<(u64, i32)>,
    /// Operations in the ring, submitted or not.
    under_way: usize,
    has_failed: bool,
    waker: Waker,
    rings: Arc<Mutex<Vec<IoUring>>>,
}

impl PolledChannel {
    /// Puts what the channel below has asked for into the rings.
    fn route(&mut self, worker: &mut RingOperations) {
        for entry in self.operations.entries() {
            let polled = OPERATIONS
                .iter()
                .any(|op| u32::from(*op) == entry.get_opcode());
            if polled && self.ring.as_mut().is_some_and(|ring| push(ring, entry)) {
                self.under_way += 1;
                continue;
            }
            let token = Token::from_user_data(entry.get_user_data());
            // SAFETY: the channel below has promised it for the very same entry.
            unsafe { worker.push(entry.clone(), token) };
        }
        self.operations.clear();
        if self.under_way > 0 {
            self.waker.wake();
        }
    }

    /// Submits what is new and looks for what is done.
    fn poll(&mut self, worker: &mut RingOperations) {
        let Some(ring) = self.ring.as_mut().filter(|_| self.under_way > 0) else {
            return;
        };
        let pending = u32::try_from(ring.submission().len()).unwrap_or(0);
        // SAFETY: no signal mask is given.
        let entered = unsafe {
            let submitter = ring.submitter();
            submitter.enter::<libc::sigset_t>(pending, 0, ENTER_GETEVENTS, None)
        };
        if let Err(error) = entered
            && !matches!(
                error.raw_os_error(),
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
            )
            && !std::mem::replace(&mut self.has_failed, true)
        {
            tracing::error!(%error, "a polled ring failed; its requests don't come back");
        }
        let done = ring
            .completion()
            .map(|done| (done.user_data(), done.result()));
        let mut results = std::mem::take(&mut self.results);
        results.extend(done);
        for (data, result) in results.drain(..) {
            self.under_way = self.under_way.saturating_sub(1);
            let token = Token::from_user_data(data);
            self.below.complete(token, result, &mut self.operations);
        }
        self.results = results;
        // Those that were short go on.
        self.route(worker);
    }
}

/// Whether the entry is in the ring.
fn push(ring: &mut IoUring, entry: &squeue::Entry) -> bool {
    // SAFETY: the channel below has promised that what the entry points to stays until its result is
    // back, and the ring is leaked if it never comes.
    unsafe { ring.submission().push(entry) }.is_ok()
}

impl IoChannel for PolledChannel {
    fn submit(&mut self, request: IoRequest, ring: &mut RingOperations) {
        self.below.submit(request, &mut self.operations);
        self.route(ring);
    }

    fn complete(&mut self, token: Token, result: i32, ring: &mut RingOperations) -> bool {
        let own = self.below.complete(token, result, &mut self.operations);
        self.route(ring);
        own
    }

    fn take_completion(&mut self) -> Option<IoCompletion> {
        self.below.take_completion()
    }

    fn wake(&mut self, now: Instant, ring: &mut RingOperations) {
        self.poll(ring);
        self.below.wake(now, &mut self.operations);
        self.route(ring);
    }

    fn deadline(&self) -> Option<Instant> {
        self.below.deadline()
    }
}

impl Drop for PolledChannel {
    fn drop(&mut self) {
        let Some(ring) = self.ring.take() else {
            return;
        };
        if self.under_way == 0 {
            lock(&self.rings).push(ring);
        } else {
            // As the channel below does with their memory.
            std::mem::forget(ring);
        }
    }
}

impl Debug for PolledChannel {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolledChannel")
            .field("below", &self.below)
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}

fn lock(rings: &Mutex<Vec<IoUring>>) -> std::sync::MutexGuard<'_, Vec<IoUring>> {
    rings.lock().unwrap_or_else(PoisonError::into_inner)
}
