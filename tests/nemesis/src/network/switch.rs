use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Link, Links, tap};

/// Bytes of delayed frames beyond which more are lost, as a router would.
const MAX_DELAYED_BYTES: usize = 64 << 20;
/// Ethernet's header.
const HEADER: usize = 14;

/// A switch between devices, in a thread of its own; it ends when this is dropped.
pub struct Switch {
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Switch {
    /// Starts it.
    pub fn start(taps: Vec<File>, links: Links, seed: u64) -> anyhow::Result<Self> {
        let stopped = Arc::new(AtomicBool::new(false));
        let fabric = Fabric {
            taps,
            links,
            random: fastrand::Rng::with_seed(seed),
            delayed: BinaryHeap::new(),
            delayed_bytes: 0,
            count: 0,
        };
        let until = stopped.clone();
        let thread = std::thread::Builder::new()
            .name("switch".to_owned())
            .spawn(move || fabric.run(&until))
            .context("start the switch's thread")?;
        Ok(Self {
            stopped,
            thread: Some(thread),
        })
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say, not even if it panicked.
            let _ = thread.join();
        }
    }
}

struct Fabric {
    taps: Vec<File>,
    links: Links,
    random: fastrand::Rng,
    delayed: BinaryHeap<Reverse<Delayed>>,
    delayed_bytes: usize,
    /// Frames that were delayed, to keep those that are due at once in order.
    count: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Delayed {
    due: Instant,
    number: u64,
    to: usize,
    frame: Vec<u8>,
}

impl Fabric {
    fn run(mut self, stopped: &AtomicBool) {
        let mut frame = vec![0; tap::MTU + HEADER];
        while !stopped.load(Ordering::Relaxed) {
            self.wait();
            for from in 0..self.taps.len() {
                // A limit, so that no host starves the others.
                for _ in 0..64 {
                    let Some(tap) = self.taps.get_mut(from) else {
                        break;
                    };
                    match tap.read(&mut frame) {
                        Ok(length) => self.forward(from, frame.get(..length).unwrap_or_default()),
                        Err(error) if error.kind() == ErrorKind::Interrupted => {}
                        // Nothing more, or the device is down.
                        Err(_) => break,
                    }
                }
            }
            self.send_due();
        }
    }

    fn wait(&self) {
        let readable = self.taps.iter().map(|tap| PollFd::new(tap, PollFlags::IN));
        let mut readable: Vec<PollFd<'_>> = readable.collect();
        let next = self
            .delayed
            .peek()
            .map_or(Duration::from_secs(1), |Reverse(next)| {
                next.due.saturating_duration_since(Instant::now())
            });
        let limit = Timespec::try_from(next).ok();
        // Interrupted is as good as ready.
        let _ = poll(&mut readable, limit.as_ref());
    }

    fn forward(&mut self, from: usize, frame: &[u8]) {
        let Some(destination) = frame.get(..6) else {
            return;
        };
        let is_for_all = destination.first().is_some_and(|byte| byte & 1 == 1);
        for to in 0..self.taps.len() {
            let is_for = usize::from(destination[5]) == to;
            if to != from && (is_for || is_for_all) {
                self.pass(from, to, frame);
            }
        }
    }

    fn pass(&mut self, from: usize, to: usize, frame: &[u8]) {
        let links = self.links.lock();
        let link = links.get(from).and_then(|row| row.get(to)).copied();
        drop(links);
        let Link {
            cut,
            loss_permille,
            delay,
            jitter,
        } = link.unwrap_or_default();
        if cut || self.random.u32(..1000) < loss_permille {
            return;
        }
        if delay + jitter == Duration::ZERO {
            self.send(to, frame);
        } else if self.delayed_bytes + frame.len() <= MAX_DELAYED_BYTES {
            let due = Instant::now() + delay + jitter.mul_f64(self.random.f64());
            self.count += 1;
            self.delayed_bytes += frame.len();
            self.delayed.push(Reverse(Delayed {
                due,
                number: self.count,
                to,
                frame: frame.to_vec(),
            }));
        }
    }

    fn send_due(&mut self) {
        let now = Instant::now();
        while let Some(Reverse(next)) = self.delayed.peek()
            && next.due <= now
        {
            let Some(Reverse(next)) = self.delayed.pop() else {
                return;
            };
            self.delayed_bytes -= next.frame.len();
            self.send(next.to, &next.frame);
        }
    }

    fn send(&mut self, to: usize, frame: &[u8]) {
        if let Some(tap) = self.taps.get_mut(to) {
            // A full or absent device loses it, as a network would.
            let _ = tap.write(frame);
        }
    }
}
