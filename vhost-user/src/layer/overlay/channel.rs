//! Where a queue's requests go: to the layers' files, to threads, or aside until chunks are here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use super::super::{
    Buffers, IoChannel, IoCompletion, IoRequest, Operation, RingOperations, Token, Waker,
};
use super::job::{Action, Job, JobResult, Pool, perform};
use crate::overlay::{Chain, Place};

/// Copies that a queue's requests may hold, in bytes. More wait.
const COPY_LIMIT: u64 = 8 << 20;

// A request of which parts are under way.
#[derive(Debug)]
struct Pending {
    tag: u64,
    parts: usize,
    result: Result<(), i32>,
    /// Unless the only part has them.
    buffers: Option<Buffers>,
}

// A request that can only start when chunks of its base are here.
#[derive(Debug)]
struct Parked {
    request: IoRequest,
    chunks: usize,
    result: Result<(), i32>,
}

// What other threads tell a channel.
#[derive(Debug)]
enum Told {
    Done(JobResult),
    /// A chunk for the parked request of a slot.
    Fetched(usize, Result<(), i32>),
}

/// A queue's way to an overlay.
#[derive(Debug)]
pub struct OverlayChannel {
    chain: Arc<Chain>,
    offsets: Vec<u64>,
    layers: Vec<Box<dyn IoChannel>>,
    raw: Option<Box<dyn IoChannel>>,
    pool: Arc<Pool>,
    waker: Waker,
    results: Sender<Told>,
    told: Receiver<Told>,
    parked: Vec<Option<Parked>>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    copied: u64,
    /// Requests whose copies would be too many.
    held_back: VecDeque<IoRequest>,
    completed: VecDeque<IoCompletion>,
}

impl OverlayChannel {
    /// On the channels of the layers, the top one first, and of the raw base.
    pub fn new(
        chain: Arc<Chain>,
        layers: Vec<Box<dyn IoChannel>>,
        raw: Option<Box<dyn IoChannel>>,
        pool: Arc<Pool>,
        waker: Waker,
    ) -> Self {
        let (results, told) = channel();
        let offsets = chain.layers().iter().map(|layer| layer.data_offset());
        Self {
            offsets: offsets.collect(),
            chain,
            layers,
            raw,
            pool,
            waker,
            results,
            told,
            parked: Vec::new(),
            pending: Vec::new(),
            free: Vec::new(),
            copied: 0,
            held_back: VecDeque::new(),
            completed: VecDeque::new(),
        }
    }

    fn start(&mut self, request: IoRequest, ring: &mut RingOperations) {
        let Some(request) = self.park_if_absent(request) else {
            return;
        };
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

    // Has what the request needs and is not here fetched; the request starts again after that.
    fn park_if_absent(&mut self, request: IoRequest) -> Option<IoRequest> {
        let Some(source) = self.chain.source() else {
            return Some(request);
        };
        let chunks = match request.operation {
            Operation::Read => self.chain.absent_for_reading(request.offset, request.len),
            Operation::Write | Operation::WriteZeroes { .. } => {
                self.chain.absent_for_writing(request.offset, request.len)
            }
            Operation::Discard | Operation::Flush => Vec::new(),
        };
        if chunks.is_empty() {
            return Some(request);
        }
        let source = Arc::clone(source);
        let parked = Some(Parked {
            request,
            chunks: chunks.len(),
            result: Ok(()),
        });
        let free = self.parked.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.parked.len());
        match self.parked.get_mut(slot) {
            Some(entry) => *entry = parked,
            None => self.parked.push(parked),
        }
        for chunk in chunks {
            let results = self.results.clone();
            let waker = self.waker.clone();
            let fetched = move |result| {
                // Nobody is left to tell if the queue has gone.
                let _ = results.send(Told::Fetched(slot, result));
                waker.wake();
            };
            source.fetch(chunk, Box::new(fetched));
        }
        None
    }

    fn chunk_fetched(&mut self, slot: usize, result: Result<(), i32>, ring: &mut RingOperations) {
        let Some(entry) = self.parked.get_mut(slot) else {
            return;
        };
        let Some(parked) = entry else { return };
        parked.chunks = parked.chunks.saturating_sub(1);
        parked.result = parked.result.and(result);
        if parked.chunks > 0 {
            return;
        }
        let Some(parked) = entry.take() else { return };
        match parked.result {
            Ok(()) => self.start(parked.request, ring),
            result => self.completed.push_back(IoCompletion {
                tag: parked.request.tag,
                result,
                buffers: parked.request.buffers,
            }),
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
            let done = perform(&chain, job);
            // The last one to hold it removes its session, which is not for this thread.
            drop(chain);
            // Nobody is left to tell if the queue has gone.
            let _ = results.send(Told::Done(done));
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
            let _ = self.results.send(Told::Done(failed));
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
        while let Ok(told) = self.told.try_recv() {
            let done = match told {
                Told::Done(done) => done,
                Told::Fetched(slot, result) => {
                    self.chunk_fetched(slot, result, ring);
                    continue;
                }
            };
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
