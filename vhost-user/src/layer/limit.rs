//! Limits on bytes and operations: see [`Limiter`].

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::{
    BlockDevice, ChannelContext, IoChannel, IoCompletion, IoRequest, Properties, RingOperations,
    Token, Waker,
};
use crate::rate_limit::{Claim, Decision, Limiter, Wake};

/// A device whose requests start no faster than its limits allow: its own, and its group's.
#[derive(Clone, Debug)]
pub struct LimitDevice {
    below: Arc<dyn BlockDevice>,
    limiters: Vec<Arc<Limiter>>,
    disk: u64,
}

impl LimitDevice {
    /// Of the device below, under all of these limits.
    pub fn new(below: Arc<dyn BlockDevice>, limiters: Vec<Arc<Limiter>>) -> Self {
        Self {
            below,
            limiters,
            disk: next_number(),
        }
    }
}

// Names disks and queues in limiters that they share.
fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl BlockDevice for LimitDevice {
    fn properties(&self) -> Properties {
        self.below.properties()
    }

    fn open_channel(&self, context: &mut ChannelContext<'_>) -> io::Result<Box<dyn IoChannel>> {
        Ok(Box::new(LimitChannel {
            below: self.below.open_channel(context)?,
            limiters: self.limiters.clone(),
            disk: self.disk,
            queue: next_number(),
            waker: context.waker(),
            waiting: VecDeque::new(),
            passed: 0,
            deadline: None,
        }))
    }

    fn sync(&self) -> io::Result<()> {
        self.below.sync()
    }

    fn remeasure(&self) -> io::Result<u64> {
        self.below.remeasure()
    }
}

#[derive(Debug)]
struct LimitChannel {
    below: Box<dyn IoChannel>,
    limiters: Vec<Arc<Limiter>>,
    disk: u64,
    queue: u64,
    waker: Waker,
    /// In order of arrival; no more than the virtqueue has room for.
    waiting: VecDeque<(IoRequest, bool)>,
    /// Limiters that have granted the first one.
    passed: usize,
    deadline: Option<Instant>,
}

impl LimitChannel {
    // Starts what may start.
    fn advance(&mut self, now: Instant, ring: &mut RingOperations) {
        self.deadline = None;
        while let Some((request, waited)) = self.waiting.front() {
            let Some(limiter) = self.limiters.get(self.passed) else {
                self.passed = 0;
                if let Some((request, _)) = self.waiting.pop_front() {
                    self.below.submit(request, ring);
                }
                continue;
            };
            let claim = Claim {
                queue: self.queue,
                disk: self.disk,
                bytes: request.buffers.len(),
                waited: *waited,
                more: self.waiting.len() > 1,
            };
            let waker = &self.waker;
            let wake = || -> Wake {
                let waker = waker.clone();
                Box::new(move || waker.wake())
            };
            match limiter.claim(claim, now, wake) {
                Decision::Granted => self.passed += 1,
                Decision::WaitUntil(at) => {
                    self.deadline = Some(at);
                    for (_, waited) in &mut self.waiting {
                        *waited = true;
                    }
                    return;
                }
            }
        }
    }
}

impl IoChannel for LimitChannel {
    fn submit(&mut self, request: IoRequest, ring: &mut RingOperations) {
        let unlimited = self.limiters.iter().all(|limiter| limiter.is_unlimited());
        if unlimited && self.waiting.is_empty() {
            self.below.submit(request, ring);
            return;
        }
        let waits = !self.waiting.is_empty();
        self.waiting.push_back((request, waits));
        // Behind others it is not its turn.
        if !waits {
            self.advance(Instant::now(), ring);
        }
    }

    fn complete(&mut self, token: Token, result: i32, ring: &mut RingOperations) -> bool {
        self.below.complete(token, result, ring)
    }

    fn take_completion(&mut self) -> Option<IoCompletion> {
        self.below.take_completion()
    }

    fn wake(&mut self, now: Instant, ring: &mut RingOperations) {
        self.below.wake(now, ring);
        self.advance(now, ring);
    }

    fn deadline(&self) -> Option<Instant> {
        [self.deadline, self.below.deadline()]
            .into_iter()
            .flatten()
            .min()
    }
}

impl Drop for LimitChannel {
    fn drop(&mut self) {
        for limiter in &self.limiters {
            limiter.cancel(self.queue);
        }
    }
}
