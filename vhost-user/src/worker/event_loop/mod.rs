//! A worker's loop, with a single place to wait, its ring: kicks, commands and the disks'
//! completions all arrive there.

mod commands;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::polling::Polling;
use super::queue::{Outcome, Queue};
use super::{Mailbox, WorkerOptions};
use crate::layer::Token;
use crate::layer::ring::{FileTable, MAX_FILES, queue_of};
use crate::pinned_memory::{MAX_BUFFERS, PinnedTable};
use crate::uring;

/// Entries of the submission ring. What doesn't fit is submitted in several goes.
const ENTRIES: u32 = 256;

/// `IORING_ENTER_GETEVENTS` (linux/io_uring.h).
const ENTER_GETEVENTS: u32 = 1;

/// Looks between two readings of the clock.
const LOOKS: u32 = 32;

// User data of what belongs to no channel: beside the queue's number, a leaf that no channel has.
const OWN: u64 = 0xffff << 32;
const KICK: u64 = OWN;
const MAILBOX: u64 = OWN | 1;
const IGNORED: u64 = OWN | 2;

pub(super) struct EventLoop {
    // Before the queues, so that the ring is closed when their requests' memory goes.
    ring: IoUring,
    queues: Vec<Option<Box<Queue>>>,
    files: FileTable,
    pinned: Option<PinnedTable>,
    mailbox: Arc<Mailbox>,
    hot: Vec<u16>,
    /// Queues with a deadline.
    timed: Vec<u16>,
    completions: Vec<(u64, i32, bool)>,
    polling: Polling,
    /// Since when guests have had their last answers, without having asked for more.
    pause: Option<Instant>,
    /// Whether some of that time was slept through.
    slept: bool,
    /// Whether the mailbox's event was seen, by which channels are woken as well.
    told: bool,
    quitting: bool,
}

impl EventLoop {
    pub fn new(options: &WorkerOptions, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let ring = uring::create(ENTRIES, options.submission_poll)?;
        ring.submitter().register_files_sparse(MAX_FILES)?;
        if options.pin_memory {
            ring.submitter().register_buffers_sparse(MAX_BUFFERS)?;
        }
        Ok(Self {
            ring,
            queues: Vec::new(),
            files: FileTable::default(),
            pinned: options.pin_memory.then(PinnedTable::default),
            mailbox,
            hot: Vec::new(),
            timed: Vec::new(),
            completions: Vec::new(),
            polling: Polling::new(options.poll),
            pause: None,
            slept: false,
            told: false,
            quitting: false,
        })
    }

    pub fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(%error, "a worker's io_uring failed; its queues stop");
            self.fail();
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        self.arm_poll(self.mailbox.event.as_raw_fd(), MAILBOX)?;
        loop {
            self.obey()?;
            if self.quitting && self.queues.iter().all(Option::is_none) {
                return Ok(());
            }
            let busy = self.run_hot_queues()?;
            if busy || self.look() {
                self.enter_if_needed()?;
            } else if !self.cool() {
                self.sleep()?;
            }
            self.reap()?;
        }
    }

    // Runs the queues that are looked at without kicks. True if some have more to do at once.
    fn run_hot_queues(&mut self) -> io::Result<bool> {
        let (mut busy, mut outcome) = (false, Outcome::default());
        for place in (0..self.hot.len()).rev() {
            let Some(number) = self.hot.get(place).copied() else {
                continue;
            };
            if let Some(queue) = self.queue(number) {
                outcome |= queue.run();
                busy |= queue.more;
                self.submit_operations(number)?;
                self.release_if_ended(number);
            }
        }
        self.follow_pause(outcome);
        Ok(busy)
    }

    fn follow_pause(&mut self, outcome: Outcome) {
        if outcome.taken
            && let Some(begin) = self.pause.take()
        {
            if self.slept {
                self.polling.slept(begin.elapsed());
            } else {
                self.polling.found(begin.elapsed());
            }
        }
        if outcome.answered {
            self.pause = Some(Instant::now());
            self.slept = false;
        }
    }

    // Looks for requests for a while after the last answers, if that has paid off lately. The ring is
    // looked at as well: it has the disks' completions, the kicks of the other queues, and the mailbox.
    fn look(&mut self) -> bool {
        let budget = self.polling.budget();
        let Some(begin) = self.pause.filter(|_| !self.slept) else {
            return false;
        };
        if budget.is_zero() || self.hot.is_empty() {
            return false;
        }
        if !self.ring.submission().is_empty() && self.ring.submit().is_err() {
            return false;
        }
        loop {
            for _ in 0..LOOKS {
                if self.has_requests() || !self.ring.completion().is_empty() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let told = self.mailbox.pending.load(Ordering::Relaxed);
            if told || self.ring.submission().taskrun() {
                return true;
            }
            if begin.elapsed() > budget {
                return false;
            }
        }
    }

    fn has_requests(&self) -> bool {
        self.hot.iter().any(|number| {
            let queue = self.queues.get(usize::from(*number));
            let queue = queue.and_then(Option::as_ref);
            queue.is_some_and(|queue| queue.is_serving() && queue.executor.has_available())
        })
    }

    // Asks all drivers for kicks again. True if requests came in meanwhile.
    fn cool(&mut self) -> bool {
        let mut hot = std::mem::take(&mut self.hot);
        hot.retain(|number| self.queue(*number).is_some_and(Queue::cool));
        self.hot = hot;
        !self.hot.is_empty()
    }

    fn sleep(&mut self) -> io::Result<()> {
        let deadline = self.next_deadline();
        self.slept = true;
        self.enter(1, deadline)
    }

    fn next_deadline(&mut self) -> Option<Instant> {
        self.timed.clear();
        let mut earliest = None;
        for (number, queue) in self.queues.iter().enumerate() {
            let deadline = queue.as_ref().and_then(|queue| queue.executor.deadline());
            if let Some(deadline) = deadline {
                self.timed.extend(u16::try_from(number));
                earliest =
                    Some(earliest.map_or(deadline, |earliest: Instant| earliest.min(deadline)));
            }
        }
        earliest
    }

    // Submits and lets the kernel post what is complete, if there is any of that: a worker that
    // finds its requests by looking makes no system call for a disk that answers at once.
    fn enter_if_needed(&mut self) -> io::Result<()> {
        let submission = self.ring.submission();
        let idle = submission.is_empty() && !submission.taskrun() && !submission.cq_overflow();
        drop(submission);
        // Without the flag nothing says whether completions wait to be posted.
        if idle && self.ring.params().is_setup_single_issuer() {
            return Ok(());
        }
        self.enter(0, None)
    }

    // Submits, and waits for this many completions, or until the deadline.
    fn enter(&mut self, completions: usize, deadline: Option<Instant>) -> io::Result<()> {
        let result = match deadline {
            None if completions == 0 => {
                let pending = u32::try_from(self.ring.submission().len()).unwrap_or(0);
                // The flag makes the kernel post what is complete, though nothing is waited for.
                // SAFETY: no signal mask is given.
                unsafe {
                    let submitter = self.ring.submitter();
                    submitter.enter::<libc::sigset_t>(pending, 0, ENTER_GETEVENTS, None)
                }
            }
            None => self.ring.submit_and_wait(completions),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let timeout = types::Timespec::from(left);
                let arguments = types::SubmitArgs::new().timespec(&timeout);
                self.ring
                    .submitter()
                    .submit_with_args(completions, &arguments)
            }
        };
        match result {
            Ok(_) => Ok(()),
            // Interrupted, the deadline, or out of memory or room for now: go on with what is there.
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn reap(&mut self) -> io::Result<()> {
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.ring.completion().map(|entry: cqueue::Entry| {
            (
                entry.user_data(),
                entry.result(),
                cqueue::more(entry.flags()),
            )
        }));
        for (data, result, more) in completions.drain(..) {
            let number = queue_of(data);
            match data & 0xffff_ffff_ffff {
                MAILBOX => {
                    self.told = true;
                    if !more {
                        self.arm_poll(self.mailbox.event.as_raw_fd(), MAILBOX)?;
                    }
                }
                IGNORED => {}
                KICK => self.kicked(number, result, more)?,
                _ => self.completed(number, data, result)?,
            }
        }
        self.completions = completions;
        self.wake_timed()
    }

    fn completed(&mut self, number: u16, data: u64, result: i32) -> io::Result<()> {
        if let Some(queue) = self.queue(number) {
            let token = Token::from_user_data(data);
            queue
                .executor
                .complete(token, result, &mut queue.operations);
            self.heat(number);
            self.submit_operations(number)?;
        }
        Ok(())
    }

    fn kicked(&mut self, number: u16, result: i32, more: bool) -> io::Result<()> {
        let Some(queue) = self.queue(number) else {
            return Ok(());
        };
        queue.kick_armed = more;
        if result < 0 && queue.stopping.is_none() {
            let error = io::Error::from_raw_os_error(-result);
            tracing::error!(queue = queue.index, %error, "can't wait for the guest's kicks");
            queue.announce_broken();
        } else if !more && queue.is_serving() {
            queue.kick_armed = true;
            let descriptor = queue.kick_descriptor();
            self.arm_poll(descriptor, KICK | u64::from(number) << 48)?;
        }
        self.heat(number);
        Ok(())
    }

    // Looks at a queue without kicks from now on.
    fn heat(&mut self, number: u16) {
        if let Some(queue) = self.queue(number)
            && !std::mem::replace(&mut queue.hot, true)
        {
            self.hot.push(number);
        }
    }

    fn wake_timed(&mut self) -> io::Result<()> {
        if self.timed.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let mut timed = std::mem::take(&mut self.timed);
        for number in timed.drain(..) {
            let due = |queue: &mut Queue| queue.executor.deadline().is_some_and(|at| at <= now);
            if self.queue(number).is_some_and(due) {
                self.wake(number, now)?;
            }
        }
        self.timed = timed;
        Ok(())
    }

    fn wake(&mut self, number: u16, now: Instant) -> io::Result<()> {
        if let Some(queue) = self.queue(number) {
            queue.executor.wake(now, &mut queue.operations);
            self.heat(number);
            self.submit_operations(number)?;
        }
        Ok(())
    }

    fn submit_operations(&mut self, number: u16) -> io::Result<()> {
        let entry = self.queues.get_mut(usize::from(number));
        let Some(queue) = entry.and_then(Option::as_mut) else {
            return Ok(());
        };
        let mut rest = queue.operations.entries();
        while !rest.is_empty() {
            let mut submission = self.ring.submission();
            while let Some((first, after)) = rest.split_first() {
                // SAFETY: `RingOperations::push` took the promise for what the entry points to.
                if unsafe { submission.push(first) }.is_err() {
                    break;
                }
                rest = after;
            }
            drop(submission);
            if !rest.is_empty() {
                submit(&self.ring)?;
            }
        }
        queue.operations.clear();
        Ok(())
    }

    // A multishot poll reports every write to the eventfd, so its counter is never read: that
    // saves a system call for each kick, and a leftover count only means one look too many.
    fn arm_poll(&mut self, descriptor: RawFd, data: u64) -> io::Result<()> {
        let events = u32::from(libc::POLLIN.unsigned_abs());
        let entry = opcode::PollAdd::new(types::Fd(descriptor), events)
            .multi(true)
            .build()
            .user_data(data);
        self.push(&entry)
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: polls point to no memory.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            submit(&self.ring)?;
        }
        Ok(())
    }

    fn queue(&mut self, number: u16) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(number))?.as_deref_mut()
    }
}

fn submit(ring: &IoUring) -> io::Result<()> {
    match ring.submit() {
        Ok(_) => Ok(()),
        Err(error) if is_passing(&error) => {
            thread::yield_now();
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn is_passing(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(
        errno,
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME)
    )
}
