//! Fetches the chunks of an image that somebody waits for, and those that will be read next.
//!
//! Its threads start when there is something to fetch and end when there is nothing, so an idle
//! disk has none. Whoever waits is told by a call back, within a bounded time.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::client::{ClientOptions, Description, HttpImage, read_exact};
use super::fetch_plan::{Failure, FetchPlan, Run};
use super::{Manifest, RemoteError};
use crate::isolation::{self, Role};
use crate::overlay::Chain;
use crate::overlay::chain::{Fetched, Source, SourceCounters};

/// Threads, and so connections, of one disk.
const THREADS: usize = 4;
/// Bytes of their stacks, TLS included.
const STACK_BYTES: usize = 2 << 20;
/// After which a thread with nothing to do ends.
const IDLE: Duration = Duration::from_secs(5);
/// How long a run that nobody waits for may take.
const RUN_PATIENCE: Duration = Duration::from_mins(1);
/// How a base is fetched.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// How its server is reached.
    pub client: ClientOptions,
    /// After which a request that waits for the server fails.
    pub patience: Duration,
    /// Also fetch what nobody has asked for, at this many bytes a second.
    pub fill: Option<u64>,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            client: ClientOptions::default(),
            patience: Duration::from_secs(30),
            fill: None,
        }
    }
}

/// Fetches one image.
#[derive(Debug)]
pub struct Fetcher(Arc<Shared>);

pub(super) struct Shared {
    pub(super) image: HttpImage,
    pub(super) expected: Description,
    manifest: Option<Manifest>,
    pub(super) chunk_bytes: u64,
    zeroes: [u8; 32],
    pub(super) patience: Duration,
    /// Where fetched chunks go. Locked while one goes there.
    chain: RwLock<Weak<Chain>>,
    state: Mutex<State>,
    /// There is something to fetch.
    planned: Condvar,
    closing: Condvar,
    fetched_bytes: AtomicU64,
    failed_attempts: AtomicU64,
    corrupt_chunks: AtomicU64,
}

pub(super) struct State {
    pub(super) plan: FetchPlan<Fetched>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("url", &self.image.url())
            .field("chunk_bytes", &self.chunk_bytes)
            .finish_non_exhaustive()
    }
}

impl Fetcher {
    /// Of an image that is expected to be as described; with a manifest, its chunks decide rather
    /// than the server's validator.
    pub fn new(
        image: HttpImage,
        mut expected: Description,
        manifest: Option<Manifest>,
        options: &FetchOptions,
    ) -> io::Result<Self> {
        let chunk_bytes = manifest
            .as_ref()
            .map_or(super::manifest::DEFAULT_CHUNK, Manifest::chunk_bytes);
        if manifest.is_some() {
            expected.validator = None;
        }
        let chunks = expected.bytes.div_ceil(chunk_bytes);
        let zeroes = vec![0; usize::try_from(chunk_bytes).map_err(io::Error::other)?];
        let shared = Arc::new(Shared {
            image,
            expected,
            manifest,
            chunk_bytes,
            zeroes: Sha256::digest(zeroes).into(),
            patience: options.patience,
            chain: RwLock::default(),
            state: Mutex::new(State {
                plan: FetchPlan::new(chunks, chunk_bytes),
                threads: 0,
                idle: 0,
                closed: false,
            }),
            planned: Condvar::new(),
            closing: Condvar::new(),
            fetched_bytes: AtomicU64::new(0),
            failed_attempts: AtomicU64::new(0),
            corrupt_chunks: AtomicU64::new(0),
        });
        if let Some(rate) = options.fill {
            let shared = Arc::clone(&shared);
            isolation::spawn("fill", STACK_BYTES, move || {
                isolation::enter_or_end(Role::Fetch);
                shared.fill(rate);
            })?;
        }
        Ok(Self(shared))
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        let waiters = {
            let mut state = self.0.lock();
            state.closed = true;
            state.plan.clear()
        };
        self.0.planned.notify_all();
        self.0.closing.notify_all();
        for waiter in waiters {
            waiter(Err(libc::ECANCELED));
        }
    }
}

impl Source for Fetcher {
    fn chunk_bytes(&self) -> u64 {
        self.0.chunk_bytes
    }

    fn load(&self, chunk: u64) -> io::Result<Vec<u8>> {
        let deadline = Instant::now() + self.0.patience;
        let mut bytes = Vec::new();
        let mut pause = Duration::from_millis(100);
        loop {
            let fetched = self
                .0
                .download(chunk..chunk + 1, Some(deadline), |_, chunk| {
                    bytes = chunk.to_vec();
                    Ok(())
                });
            match fetched {
                Ok(()) => return Ok(bytes),
                Err(error) if error.is_temporary() && Instant::now() + pause < deadline => {
                    tracing::warn!(%error, "trying again");
                    thread::sleep(pause);
                    pause *= 2;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }

    fn fetch(&self, chunk: u64, done: Fetched) {
        let shared = &self.0;
        let deadline = Instant::now() + shared.patience;
        let chain = shared.chain();
        let mut state = shared.lock();
        let ahead = state.plan.demand(chunk, done, deadline);
        if let Some(chain) = chain {
            state
                .plan
                .ahead(ahead, |chunk| shared.is_absent(&chain, chunk));
        }
        shared.start_thread(&mut state);
    }

    fn attach(&self, chain: Option<&Arc<Chain>>) {
        let chain = chain.map_or_else(Weak::new, Arc::downgrade);
        let place = &self.0.chain;
        *place.write().unwrap_or_else(PoisonError::into_inner) = chain;
    }

    fn counters(&self) -> SourceCounters {
        SourceCounters {
            url: self.0.image.url().into(),
            fetched_bytes: self.0.fetched_bytes.load(Ordering::Relaxed),
            failed_attempts: self.0.failed_attempts.load(Ordering::Relaxed),
            corrupt_chunks: self.0.corrupt_chunks.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    // A thread for what has just been planned, unless there are enough.
    pub(super) fn start_thread(self: &Arc<Self>, state: &mut State) {
        if !state.plan.can_start() {
            return;
        }
        self.planned.notify_one();
        if state.idle > 0 || state.threads >= THREADS {
            return;
        }
        let shared = Arc::clone(self);
        let serve = move || {
            isolation::enter_or_end(Role::Fetch);
            shared.serve();
        };
        match isolation::spawn("fetch", STACK_BYTES, serve) {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads == 0 => {
                tracing::error!(%error, "can't start a thread to fetch with");
                for waiter in state.plan.clear() {
                    waiter(Err(libc::EAGAIN));
                }
            }
            // The others will do it.
            Err(_) => {}
        }
    }

    fn serve(self: Arc<Self>) {
        let mut state = self.lock();
        while !state.closed {
            if let Some(run) = state.plan.start_next() {
                // Several runs may have been planned at once.
                self.start_thread(&mut state);
                drop(state);
                self.run(&run);
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let waited = self.planned.wait_timeout(state, IDLE);
            let (next, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = next;
            state.idle -= 1;
            if timeout.timed_out() {
                break;
            }
        }
        state.threads -= 1;
    }

    fn run(self: &Arc<Self>, run: &Run) {
        let mut left = run.chunks.clone();
        let deadline = (!run.ahead)
            .then(|| self.lock().plan.deadline(run.chunks.start))
            .flatten();
        let fetched = self.download(run.chunks.clone(), deadline, |chunk, bytes| {
            let placed = self.place(chunk, bytes);
            left.start = chunk + 1;
            self.settle(chunk, placed);
            Ok(())
        });
        let failure = match &fetched {
            Err(RemoteError::Corrupt { .. }) => Failure::Corrupt,
            Err(error) if error.is_temporary() => Failure::Temporary,
            Ok(()) | Err(_) => Failure::Final,
        };
        if let Err(error) = &fetched {
            self.failed_attempts.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%error, chunk = left.start, "a part of an image could not be fetched");
        }
        let mut state = self.lock();
        let (told, pause) = state.plan.end(run, left, failure, Instant::now());
        if let Some(pause) = pause
            && !state.closed
        {
            state = self.pause(state, pause);
        }
        drop(state);
        for waiter in told {
            waiter(Err(libc::EIO));
        }
    }

    // Gives each chunk of a run to `take` as soon as it is there and verified.
    fn download(
        &self,
        chunks: Range<u64>,
        deadline: Option<Instant>,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), RemoteError>,
    ) -> Result<(), RemoteError> {
        let size = usize::try_from(self.chunk_bytes).unwrap_or(usize::MAX);
        let mut buffer = vec![0; size];
        let mut first = chunks.start;
        while first < chunks.end && self.is_zero(first) {
            take(first, self.part_of(first, &mut buffer))?;
            first += 1;
        }
        if first == chunks.end {
            return Ok(());
        }
        let offset = first * self.chunk_bytes;
        let end = (chunks.end * self.chunk_bytes).min(self.expected.bytes);
        let started = Instant::now();
        let mut reader = self.image.read(offset, end - offset, &self.expected)?;
        for chunk in first..chunks.end {
            let part = self.part_of(chunk, &mut buffer);
            let in_time = || {
                let late = match deadline {
                    Some(deadline) => Instant::now() >= deadline,
                    None => started.elapsed() > RUN_PATIENCE,
                };
                if late || self.lock().closed {
                    return Err("it takes too long".to_owned());
                }
                Ok(())
            };
            read_exact(&mut reader, part, in_time).map_err(|reason| self.image.failed(reason))?;
            if let Some(manifest) = &self.manifest
                && !manifest.matches(chunk, part)
            {
                self.corrupt_chunks.fetch_add(1, Ordering::Relaxed);
                return Err(RemoteError::Corrupt {
                    url: self.image.url().into(),
                    offset: chunk * self.chunk_bytes,
                });
            }
            take(chunk, part)?;
        }
        // So that the connection can be used again.
        let _ = io::copy(&mut reader, &mut io::sink());
        Ok(())
    }

    fn part_of<'a>(&self, chunk: u64, buffer: &'a mut [u8]) -> &'a mut [u8] {
        let rest = self.expected.bytes.saturating_sub(chunk * self.chunk_bytes);
        let len = usize::try_from(rest.min(self.chunk_bytes)).unwrap_or(0);
        buffer.get_mut(..len).unwrap_or_default()
    }

    fn is_zero(&self, chunk: u64) -> bool {
        let manifest = self.manifest.as_ref();
        manifest.is_some_and(|manifest| manifest.is(chunk, &self.zeroes))
    }

    pub(super) fn is_absent(&self, chain: &Chain, chunk: u64) -> bool {
        let offset = chunk * self.chunk_bytes;
        let len = self.chunk_bytes.min(self.expected.bytes - offset);
        !chain.absent_for_reading(offset, len).is_empty()
    }

    fn place(&self, chunk: u64, bytes: &[u8]) -> Result<(), i32> {
        // Locked, so that nothing is written any more once another chain is attached.
        let chain = self.chain.read().unwrap_or_else(PoisonError::into_inner);
        let target = chain.upgrade().ok_or(libc::ECANCELED)?;
        target
            .place(bytes, chunk * self.chunk_bytes)
            .map_err(|error| {
                let image = target.top().path().display().to_string();
                tracing::warn!(image, chunk, %error, "what was fetched can't be kept");
                error.raw_os_error().unwrap_or(libc::EIO)
            })?;
        self.fetched_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn settle(&self, chunk: u64, result: Result<(), i32>) {
        let waiters = self.lock().plan.settle(chunk);
        for waiter in waiters {
            waiter(result);
        }
    }

    // Whether the end has come meanwhile.
    pub(super) fn wait(&self, time: Duration) -> bool {
        self.pause(self.lock(), time).closed
    }

    fn pause<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        time: Duration,
    ) -> MutexGuard<'a, State> {
        let end = Instant::now() + time;
        while !state.closed {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.closing.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state
    }

    pub(super) fn chain(&self) -> Option<Arc<Chain>> {
        let chain: RwLockReadGuard<'_, Weak<Chain>> =
            self.chain.read().unwrap_or_else(PoisonError::into_inner);
        chain.upgrade()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
