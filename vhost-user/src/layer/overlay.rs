//! An overlay on its layers' files: see [`Chain`].
//!
//! What is in one place goes there as it is, on the ring. What needs a stripe brought up, the map
//! changed, or a server asked, is rare once a disk is in use, and is done by a few threads of the
//! disk, with ordinary system calls on copies of the data.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::Instant;

use super::crypt::CryptDevice;
use super::file::FileDevice;
use super::{
    BlockDevice, Buffers, ChannelContext, IoChannel, IoCompletion, IoRequest, Operation,
    Properties, RingOperations, Token, Waker,
};
use crate::Error;
use crate::image::BlockSizes;
use crate::overlay::files::{self, OpenOverlay};
use crate::overlay::{Chain, Place};

/// Threads of a disk for what the ring can't do. They start when they are needed.
const THREADS: usize = 4;
/// Copies that a queue's requests may hold, in bytes. More wait.
const COPY_LIMIT: u64 = 8 << 20;

/// An overlay as a device.
#[derive(Debug)]
pub struct OverlayDevice {
    stack: RwLock<Arc<Stack>>,
    pool: Arc<Pool>,
}

// The layers as they are between two snapshots.
#[derive(Debug)]
struct Stack {
    open: OpenOverlay,
    layers: Vec<Arc<dyn BlockDevice>>,
    raw: Option<Arc<dyn BlockDevice>>,
}

impl Stack {
    fn new(open: OpenOverlay) -> Self {
        let layers = open.images.iter().zip(open.chain.layers());
        let layers = layers.map(|(image, layer)| -> Arc<dyn BlockDevice> {
            let file = Arc::new(FileDevice::new(Arc::clone(image)));
            match layer.cipher() {
                Some(cipher) => {
                    let cipher = Arc::clone(cipher);
                    Arc::new(CryptDevice::new(file, cipher, layer.data_offset()))
                }
                None => file,
            }
        });
        Self {
            layers: layers.collect(),
            raw: open
                .raw
                .clone()
                .map(|image| Arc::new(FileDevice::new(image)) as Arc<dyn BlockDevice>),
            open,
        }
    }
}

impl OverlayDevice {
    /// Of an open overlay.
    pub fn new(open: OpenOverlay) -> Self {
        Self {
            stack: RwLock::new(Arc::new(Stack::new(open))),
            pool: Arc::default(),
        }
    }

    /// The disk's layers.
    pub fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.stack().open.chain)
    }

    /// Makes what the disk holds now a snapshot, and goes on in a new layer: see
    /// [`files::snapshot`]. Channels have to be closed meanwhile. Returns the snapshot's path.
    pub fn snapshot(&self, name: &str) -> Result<PathBuf, Error> {
        let stack = self.stack();
        let (snapshot, open) = files::snapshot_open(&stack.open, name)?;
        let mut current = self.stack.write().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(Stack::new(open));
        Ok(snapshot)
    }

    fn stack(&self) -> Arc<Stack> {
        Arc::clone(&self.stack.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for OverlayDevice {
    fn drop(&mut self) {
        self.pool.close();
    }
}

impl BlockDevice for OverlayDevice {
    fn properties(&self) -> Properties {
        let stack = self.stack();
        let all = || {
            let devices = stack.layers.iter().chain(&stack.raw);
            devices.map(|device| device.properties())
        };
        let unknown = BlockSizes {
            logical: 512,
            physical: 512,
            optimal: 0,
        };
        let top = stack.layers.first().map(|top| top.properties());
        let mut block_sizes = top.map_or(unknown, |top| top.block_sizes);
        let logical = all().map(|layer| layer.block_sizes.logical).max();
        block_sizes.logical = logical.unwrap_or(512);
        block_sizes.physical = block_sizes.physical.max(block_sizes.logical);
        let read_only = top.is_some_and(|top| top.read_only);
        Properties {
            bytes: stack.open.chain.bytes(),
            block_sizes,
            read_only,
            alignment: all().map(|layer| layer.alignment).max().unwrap_or(512),
            discard: !read_only,
        }
    }

    fn open_channel(&self, context: &mut ChannelContext<'_>) -> io::Result<Box<dyn IoChannel>> {
        let stack = self.stack();
        let mut layers = Vec::new();
        for layer in &stack.layers {
            layers.push(layer.open_channel(context)?);
        }
        let raw = match &stack.raw {
            Some(raw) => Some(raw.open_channel(context)?),
            None => None,
        };
        let chain = Arc::clone(&stack.open.chain);
        let (results, done) = channel();
        Ok(Box::new(OverlayChannel {
            offsets: chain
                .layers()
                .iter()
                .map(|layer| layer.data_offset())
                .collect(),
            chain,
            layers,
            raw,
            pool: Arc::clone(&self.pool),
            waker: context.waker(),
            results,
            done,
            pending: Vec::new(),
            free: Vec::new(),
            copied: 0,
            held_back: VecDeque::new(),
            completed: VecDeque::new(),
        }))
    }

    fn sync(&self) -> io::Result<()> {
        self.stack().open.chain.flush()
    }

    fn remeasure(&self) -> io::Result<u64> {
        let stack = self.stack();
        if let Some(top) = stack.layers.first() {
            top.remeasure()?;
        }
        Ok(stack.open.chain.bytes())
    }
}

// A request of which parts are under way.
#[derive(Debug)]
struct Pending {
    tag: u64,
    parts: usize,
    result: Result<(), i32>,
    /// Unless the only part has them.
    buffers: Option<Buffers>,
}

// What a thread has to do.
#[derive(Debug)]
struct Job {
    slot: usize,
    offset: u64,
    action: Action,
    durable: bool,
}

#[derive(Debug)]
enum Action {
    /// Into the request's buffers at a place.
    Read {
        place: u64,
        len: usize,
    },
    Write(Vec<u8>),
    Discard(u64),
    WriteZeroes(u64),
    Flush,
}

impl Action {
    fn copied(&self) -> u64 {
        match self {
            Self::Read { len, .. } => *len as u64,
            Self::Write(bytes) => bytes.len() as u64,
            Self::Discard(_) | Self::WriteZeroes(_) | Self::Flush => 0,
        }
    }
}

#[derive(Debug)]
struct JobResult {
    slot: usize,
    result: Result<(), i32>,
    copied: u64,
    /// What was read, and its place in the buffers.
    bytes: Option<(u64, Vec<u8>)>,
}

#[derive(Debug)]
struct OverlayChannel {
    chain: Arc<Chain>,
    offsets: Vec<u64>,
    layers: Vec<Box<dyn IoChannel>>,
    raw: Option<Box<dyn IoChannel>>,
    pool: Arc<Pool>,
    waker: Waker,
    results: Sender<JobResult>,
    done: Receiver<JobResult>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    copied: u64,
    /// Requests whose copies would be too many.
    held_back: VecDeque<IoRequest>,
    completed: VecDeque<IoCompletion>,
}

impl OverlayChannel {
    fn start(&mut self, request: IoRequest, ring: &mut RingOperations) {
        match request.operation {
            Operation::Read => self.read(request, ring),
            // Only while no bit of the map waits for a flush: a durable write needs its stripe's.
            Operation::Flush if self.chain.top().map_is_durable() => {
                self.forward(request, Place::Layer(0), ring);
            }
            Operation::Flush => self.delegate(request, Action::Flush),
            _ if self.chain.is_in_top(request.offset, request.len)
                && (!request.durable || self.chain.top().map_is_durable())
                && self.chain.top().outlives_process() =>
            {
                self.forward(request, Place::Layer(0), ring);
            }
            Operation::Write => {
                let mut bytes = vec![0; usize::try_from(request.len).unwrap_or(0)];
                request.buffers.copy_to(0, &mut bytes);
                self.delegate(request, Action::Write(bytes));
            }
            Operation::Discard => {
                let len = request.len;
                self.delegate(request, Action::Discard(len));
            }
            Operation::WriteZeroes { .. } => {
                let len = request.len;
                self.delegate(request, Action::WriteZeroes(len));
            }
        }
    }

    fn read(&mut self, request: IoRequest, ring: &mut RingOperations) {
        let first = self.chain.locate(request.offset, request.len);
        if first.len == request.len && matches!(first.place, Place::Layer(_) | Place::Raw) {
            return self.forward(request, first.place, ring);
        }
        let slot = self.insert(request.tag, None);
        let (offset, len) = (request.offset, request.len);
        let mut place = 0;
        // One more, so that it isn't complete before all parts are submitted.
        let mut parts = 1;
        while place < len {
            let segment = self.chain.locate(offset + place, len - place);
            let part = segment.len.max(1);
            match segment.place {
                Place::Zero => request.buffers.zero(place, part),
                Place::Absent => {
                    let part = usize::try_from(part).unwrap_or(0);
                    self.enqueue(Job {
                        slot,
                        offset: offset + place,
                        action: Action::Read { place, len: part },
                        durable: false,
                    });
                    parts += 1;
                }
                Place::Layer(_) | Place::Raw => {
                    let sub = IoRequest {
                        tag: slot as u64,
                        operation: Operation::Read,
                        offset: offset + place,
                        len: part,
                        durable: false,
                        buffers: request.buffers.slice(place, part),
                    };
                    self.pass(sub, segment.place, ring);
                    parts += 1;
                }
            }
            place += part;
        }
        if let Some(Some(pending)) = self.pending.get_mut(slot) {
            pending.parts = parts;
            pending.buffers = Some(request.buffers);
        }
        self.finish_part(slot, Ok(()));
    }

    // All of it is in one place.
    fn forward(&mut self, mut request: IoRequest, place: Place, ring: &mut RingOperations) {
        let slot = self.insert(request.tag, None);
        request.tag = slot as u64;
        self.pass(request, place, ring);
    }

    fn pass(&mut self, mut request: IoRequest, place: Place, ring: &mut RingOperations) {
        let flush = request.operation == Operation::Flush;
        let target = match place {
            Place::Layer(index) => {
                if !flush {
                    request.offset += self.offsets.get(index).copied().unwrap_or(0);
                }
                self.layers.get_mut(index)
            }
            _ => self.raw.as_mut(),
        };
        if let Some(channel) = target {
            channel.submit(request, ring);
        } else {
            let slot = usize::try_from(request.tag).unwrap_or(usize::MAX);
            self.finish_part(slot, Err(libc::EIO));
        }
    }

    // A thread does all of it.
    fn delegate(&mut self, request: IoRequest, action: Action) {
        let slot = self.insert(request.tag, Some(request.buffers));
        self.enqueue(Job {
            slot,
            offset: request.offset,
            action,
            durable: request.durable,
        });
    }

    fn enqueue(&mut self, job: Job) {
        self.copied += job.action.copied();
        let chain = Arc::clone(&self.chain);
        let results = self.results.clone();
        let waker = self.waker.clone();
        let slot = job.slot;
        let copied = job.action.copied();
        let queued = self.pool.run(Box::new(move || {
            // Nobody is left to tell if the queue has gone.
            let _ = results.send(perform(&chain, job));
            waker.wake();
        }));
        if let Err(error) = queued {
            tracing::error!(%error, "can't start a thread for an overlay");
            let result = Err(error.raw_os_error().unwrap_or(libc::EAGAIN));
            let failed = JobResult {
                slot,
                result,
                copied,
                bytes: None,
            };
            let _ = self.results.send(failed);
            self.waker.wake();
        }
    }

    fn insert(&mut self, tag: u64, buffers: Option<Buffers>) -> usize {
        let pending = Some(Pending {
            tag,
            parts: 1,
            result: Ok(()),
            buffers,
        });
        let slot = self.free.pop().unwrap_or(self.pending.len());
        match self.pending.get_mut(slot) {
            Some(entry) => *entry = pending,
            None => self.pending.push(pending),
        }
        slot
    }

    fn finish_part(&mut self, slot: usize, result: Result<(), i32>) {
        let Some(entry) = self.pending.get_mut(slot) else {
            return;
        };
        let Some(pending) = entry else {
            return;
        };
        pending.parts = pending.parts.saturating_sub(1);
        pending.result = pending.result.and(result);
        if pending.parts > 0 {
            return;
        }
        if let Some(pending) = entry.take() {
            self.free.push(slot);
            self.completed.push_back(IoCompletion {
                tag: pending.tag,
                result: pending.result,
                buffers: pending.buffers.unwrap_or_else(Buffers::none),
            });
        }
    }

    // Takes what the layers have completed.
    fn collect(&mut self) {
        for index in 0..=self.layers.len() {
            loop {
                let channel = self.layers.get_mut(index).or(self.raw.as_mut());
                let Some(completion) = channel.and_then(|channel| channel.take_completion()) else {
                    break;
                };
                let slot = usize::try_from(completion.tag).unwrap_or(usize::MAX);
                if let Some(Some(pending)) = self.pending.get_mut(slot) {
                    // A part's buffers are a slice of the request's.
                    pending.buffers.get_or_insert(completion.buffers);
                }
                self.finish_part(slot, completion.result);
            }
        }
    }

    fn take_results(&mut self, ring: &mut RingOperations) {
        while let Ok(done) = self.done.try_recv() {
            self.copied = self.copied.saturating_sub(done.copied);
            if let Some((place, bytes)) = &done.bytes
                && let Some(Some(pending)) = self.pending.get(done.slot)
                && let Some(buffers) = &pending.buffers
            {
                buffers.copy_from(*place, bytes);
            }
            self.finish_part(done.slot, done.result);
        }
        while self.copied < COPY_LIMIT
            && let Some(request) = self.held_back.pop_front()
        {
            self.start(request, ring);
        }
    }
}

impl IoChannel for OverlayChannel {
    fn submit(&mut self, request: IoRequest, ring: &mut RingOperations) {
        let data = !request.buffers.is_empty();
        if data && self.copied >= COPY_LIMIT {
            self.held_back.push_back(request);
        } else {
            self.start(request, ring);
        }
    }

    fn complete(&mut self, token: Token, result: i32, ring: &mut RingOperations) -> bool {
        let mut channels = self.layers.iter_mut().chain(&mut self.raw);
        channels.any(|channel| channel.complete(token, result, ring))
    }

    fn take_completion(&mut self) -> Option<IoCompletion> {
        if self.completed.is_empty() {
            self.collect();
        }
        self.completed.pop_front()
    }

    fn wake(&mut self, now: Instant, ring: &mut RingOperations) {
        for channel in self.layers.iter_mut().chain(&mut self.raw) {
            channel.wake(now, ring);
        }
        self.take_results(ring);
    }

    fn deadline(&self) -> Option<Instant> {
        let channels = self.layers.iter().chain(&self.raw);
        channels.filter_map(|channel| channel.deadline()).min()
    }
}

fn perform(chain: &Chain, job: Job) -> JobResult {
    let modifies = !matches!(job.action, Action::Read { .. } | Action::Flush);
    let copied = job.action.copied();
    let mut bytes = None;
    let result = match job.action {
        Action::Read { place, len } => {
            let mut buffer = vec![0; len];
            let result = chain.read(&mut buffer, job.offset);
            bytes = Some((place, buffer));
            result
        }
        Action::Write(data) => chain.write(&data, job.offset),
        Action::Discard(len) => chain.discard(job.offset, len),
        Action::WriteZeroes(len) => chain.write_zeroes(job.offset, len),
        Action::Flush => chain.flush(),
    };
    let result = match result {
        Ok(()) if modifies && (job.durable || !chain.top().outlives_process()) => chain.flush(),
        result => result,
    };
    JobResult {
        slot: job.slot,
        copied,
        bytes: bytes.filter(|_| result.is_ok()),
        result: result.map_err(|error| {
            tracing::warn!(image = %chain.top().path().display(), offset = job.offset, %error, "a request failed");
            error.raw_os_error().unwrap_or(libc::EIO)
        }),
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// Threads for blocking work, started as they are needed.
#[derive(Debug, Default)]
struct Pool {
    state: Mutex<PoolState>,
    ready: Condvar,
}

#[derive(Default)]
struct PoolState {
    work: VecDeque<Work>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl std::fmt::Debug for PoolState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolState")
            .field("work", &self.work.len())
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl Pool {
    fn run(self: &Arc<Self>, work: Work) -> io::Result<()> {
        let mut state = self.lock();
        if state.idle < state.work.len() + 1 && state.threads < THREADS {
            let pool = Arc::clone(self);
            let thread = thread::Builder::new().name("overlay".into());
            match thread.spawn(move || pool.serve()) {
                Ok(_) => state.threads += 1,
                Err(error) if state.threads == 0 => return Err(error),
                // The others will do it.
                Err(_) => {}
            }
        }
        state.work.push_back(work);
        self.ready.notify_one();
        Ok(())
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(work) = state.work.pop_front() {
                drop(state);
                work();
                state = self.lock();
                continue;
            }
            if state.closed {
                return;
            }
            state.idle += 1;
            state = self
                .ready
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
