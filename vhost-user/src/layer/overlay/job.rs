//! What the ring can't do, done by threads of the disk.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::isolation::{self, Role};
use crate::overlay::Chain;

/// Threads of a disk. They start when they are needed.
const THREADS: usize = 4;
/// Bytes of their stacks.
const STACK_BYTES: usize = 512 << 10;

/// What a thread has to do for a request of a slot.
#[derive(Debug)]
pub struct Job {
    pub slot: usize,
    pub offset: u64,
    pub action: Action,
    pub durable: bool,
}

/// What to do at the job's offset.
#[derive(Debug)]
pub enum Action {
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
    /// Bytes that it holds.
    pub fn copied(&self) -> u64 {
        match self {
            Self::Read { len, .. } => *len as u64,
            Self::Write(bytes) => bytes.len() as u64,
            Self::Discard(_) | Self::WriteZeroes(_) | Self::Flush => 0,
        }
    }
}

/// What came of a job.
#[derive(Debug)]
pub struct JobResult {
    pub slot: usize,
    pub result: Result<(), i32>,
    pub copied: u64,
    /// What was read, and its place in the buffers.
    pub bytes: Option<(u64, Vec<u8>)>,
}

/// Does it, in the calling thread.
pub fn perform(chain: &Chain, job: Job) -> JobResult {
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
pub struct Pool {
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
    /// Has it done by the next free thread.
    pub fn run(self: &Arc<Self>, work: Work) -> io::Result<()> {
        let mut state = self.lock();
        if state.idle < state.work.len() + 1 && state.threads < THREADS {
            let pool = Arc::clone(self);
            let serve = move || {
                isolation::enter_or_end(Role::Layer);
                pool.serve();
            };
            match isolation::spawn("overlay", STACK_BYTES, serve) {
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

    /// Lets the threads end when there is nothing left to do.
    pub fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
