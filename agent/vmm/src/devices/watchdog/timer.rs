//! The thread that waits for a watchdog's end.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::WatchdogReporter;
use crate::isolation::seccomp::{self, Mode, Thread};

const STACK_BYTES: usize = 128 << 10;

/// A timer with its thread, which ends when it is dropped.
pub struct Timer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    clock: Mutex<Clock>,
    changed: Condvar,
}

#[derive(Default)]
struct Clock {
    /// When it ends, while it runs.
    end: Option<Instant>,
    /// What was left when it was paused.
    left: Option<Duration>,
    paused: bool,
    ended: bool,
    stop: bool,
}

impl Timer {
    /// A timer that doesn't run.
    pub fn start(report: WatchdogReporter, seccomp: Mode) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let waited = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("watchdog".into())
            .stack_size(STACK_BYTES)
            .spawn(move || match seccomp::apply(Thread::Watchdog, seccomp) {
                Ok(()) => waited.wait(&report),
                Err(e) => tracing::error!("{e}"),
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Lets it end after `period`, or never.
    pub fn set(&self, period: Option<Duration>) {
        let mut clock = self.shared.clock();
        if clock.paused {
            clock.left = period;
        } else {
            clock.end = period.map(|period| Instant::now() + period);
        }
        self.shared.changed.notify_all();
    }

    /// Stops the time.
    pub fn pause(&self) {
        let mut clock = self.shared.clock();
        if !clock.paused {
            let end = clock.end.take();
            clock.left = end.map(|end| end.saturating_duration_since(Instant::now()));
            clock.paused = true;
        }
    }

    /// Lets it go on.
    pub fn resume(&self) {
        let mut clock = self.shared.clock();
        if clock.paused {
            clock.paused = false;
            clock.end = clock.left.take().map(|left| Instant::now() + left);
            self.shared.changed.notify_all();
        }
    }

    /// What is left, if it runs.
    pub fn left(&self) -> Option<Duration> {
        let clock = self.shared.clock();
        if clock.paused {
            return clock.left;
        }
        let now = Instant::now();
        clock.end.map(|end| end.saturating_duration_since(now))
    }

    /// Whether it has ended since [`Self::forget_end`].
    pub fn has_ended(&self) -> bool {
        self.shared.clock().ended
    }

    /// Forgets that it has ended.
    pub fn forget_end(&self) {
        self.shared.clock().ended = false;
    }
}

impl Shared {
    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, report: &WatchdogReporter) {
        let mut clock = self.clock();
        while !clock.stop {
            let now = Instant::now();
            clock = match clock.end {
                None => self
                    .changed
                    .wait(clock)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(end) if end > now => {
                    self.changed
                        .wait_timeout(clock, end - now)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                Some(_) => {
                    clock.end = None;
                    clock.ended = true;
                    drop(clock);
                    report();
                    self.clock()
                }
            };
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.shared.clock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watchdog's thread panicked");
        }
    }
}
