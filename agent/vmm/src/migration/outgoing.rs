//! The source's side: a thread that sends the guest's memory while it runs.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::bandwidth::Bandwidth;
use super::stream::{Frame, MAX_PAGES_BYTES, Receiver, Sender, StreamError};
use super::{Hello, MigrationError, MigrationLimits, ProgressCell};
use crate::isolation::seccomp::{self, Mode, Thread};
use crate::machine::RunningMemory;
use crate::memory::PAGE;
use crate::snapshot::PageRange;
use crate::snapshot::memory_file::{for_each_piece, union};

/// So little memory is sent with the guest stopped whatever was measured: stopping it takes as long.
const LITTLE: u64 = 1 << 20;
/// How often a thread that waits for the guest's owner looks whether it is still wanted.
const CANCEL_INTERVAL: Duration = Duration::from_millis(20);

/// What the thread wants of, or says to, the one that owns the guest.
pub(crate) enum Step {
    /// Stop the guest, and answer with its state.
    Stop(SyncSender<Result<Vec<u8>, MigrationError>>),
    /// The other side has all of it.
    Loaded,
    /// It failed.
    Failed(MigrationError),
}

/// A guest on its way. Dropped, it is canceled.
pub(crate) struct Departure {
    stream: UnixStream,
    canceled: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What is sent how.
pub(crate) struct Load {
    pub(crate) hello: Hello,
    pub(crate) memory: RunningMemory,
    pub(crate) limits: MigrationLimits,
    pub(crate) progress: Arc<ProgressCell>,
}

impl Departure {
    /// Begins to send over `stream`.
    pub(crate) fn start(
        stream: UnixStream,
        load: Load,
        report: impl Fn(Step) + Send + 'static,
        mode: Mode,
    ) -> io::Result<Self> {
        let canceled = Arc::new(AtomicBool::new(false));
        let (own, flag) = (stream.try_clone()?, Arc::clone(&canceled));
        let thread = std::thread::Builder::new()
            .name("migration".into())
            .spawn(move || {
                if let Err(e) = seccomp::apply(Thread::Migration, mode) {
                    return report(Step::Failed(MigrationError::Build(e.to_string())));
                }
                let mut outgoing = Outgoing {
                    stream: &own,
                    load,
                    canceled: flag,
                    report: &report,
                };
                if let Err(e) = outgoing.run() {
                    let canceled = outgoing.canceled.load(Ordering::Acquire);
                    report(Step::Failed(if canceled {
                        MigrationError::Canceled
                    } else {
                        e
                    }));
                }
            })?;
        Ok(Self {
            stream,
            canceled,
            thread: Some(thread),
        })
    }

    /// Lets it end soon.
    pub(crate) fn cancel(&self) {
        self.canceled.store(true, Ordering::Release);
        // Fails only if the connection has ended.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that sends the guest panicked");
        }
    }
}

struct Outgoing<'a> {
    stream: &'a UnixStream,
    load: Load,
    canceled: Arc<AtomicBool>,
    report: &'a dyn Fn(Step),
}

type Output<'a> = Sender<&'a UnixStream>;
type Input<'a> = Receiver<&'a UnixStream>;

impl Outgoing<'_> {
    fn run(&mut self) -> Result<(), MigrationError> {
        let mut sender = Sender::start(self.stream)?;
        let hello = self.load.hello.encode().map_err(StreamError::from)?;
        sender.send(&Frame::Hello(hello))?;
        let mut receiver = Receiver::start(self.stream)?;
        match receiver.receive()? {
            Frame::Ready => {}
            other => return Err(unexpected(other, "the word that the other side is ready")),
        }
        let sent = self.send_all(&mut sender, &mut receiver);
        sent.map_err(|e| explained(e, &mut receiver))?;
        (self.report)(Step::Loaded);
        // The other side has nothing more to say: this is the end of the connection.
        match receiver.receive() {
            Ok(frame) => Err(unexpected(frame, "nothing")),
            Err(e) => Err(e.into()),
        }
    }

    fn send_all(
        &self,
        sender: &mut Output<'_>,
        receiver: &mut Input<'_>,
    ) -> Result<(), MigrationError> {
        let left = self.copy(sender)?;
        let state = self.stop()?;
        // The guest stands still: this is all that it has written since, and no more comes.
        let last = union(&left, &self.load.memory.take_dirty()?);
        self.send_pages(
            sender,
            &last,
            Zeros::Send,
            &mut Bandwidth::new(None, Instant::now()),
        )?;
        sender.send(&Frame::State(state))?;
        self.count_transferred(sender);
        self.load
            .progress
            .count(|status| status.remaining_bytes = 0);
        match receiver.receive()? {
            Frame::Loaded => Ok(()),
            other => Err(unexpected(other, "the word that the guest is there")),
        }
    }

    /// Sends memory while the guest runs, until what is left can be sent in time. Returns that.
    fn copy(&self, sender: &mut Output<'_>) -> Result<Vec<PageRange>, MigrationError> {
        let limits = &self.load.limits;
        let progress = &self.load.progress;
        let mut bandwidth = Bandwidth::new(limits.bandwidth, Instant::now());
        let mut pages = self.load.memory.present();
        let mut zeros = Zeros::Skip;
        for round in 1.. {
            let began = Instant::now();
            let bytes = self.send_pages(sender, &pages, zeros, &mut bandwidth)?;
            let rate = rate(bytes, began.elapsed());
            pages = self.load.memory.take_dirty()?;
            zeros = Zeros::Send;
            let left = bytes_of(&pages);
            progress.count(|status| {
                status.rounds = round;
                status.remaining_bytes = left;
                status.bytes_per_second = rate;
            });
            if left <= LITTLE || left.saturating_mul(1000) / rate <= limits.downtime_ms {
                break;
            }
            if round >= limits.max_rounds {
                return Err(MigrationError::NotConverging {
                    rounds: round,
                    remaining_mib: left >> 20,
                    mib_per_second: rate >> 20,
                });
            }
        }
        Ok(pages)
    }

    /// Has the guest stopped; returns its state.
    fn stop(&self) -> Result<Vec<u8>, MigrationError> {
        let (answer, wait) = sync_channel(1);
        (self.report)(Step::Stop(answer));
        loop {
            match wait.recv_timeout(CANCEL_INTERVAL) {
                Ok(state) => return state,
                Err(RecvTimeoutError::Timeout) if !self.canceled.load(Ordering::Acquire) => {}
                Err(_) => return Err(MigrationError::Canceled),
            }
        }
    }

    /// Sends the contents of `pages`. Returns how many bytes of memory that were.
    fn send_pages(
        &self,
        sender: &mut Output<'_>,
        pages: &[PageRange],
        zeros: Zeros,
        bandwidth: &mut Bandwidth,
    ) -> Result<u64, MigrationError> {
        let mut sent = 0;
        for_each_piece(
            self.load.memory.ram(),
            pages,
            MAX_PAGES_BYTES,
            |first, bytes| {
                let before = sender.sent();
                for run in runs(first, bytes) {
                    match run {
                        Run::Zeros(_) if zeros == Zeros::Skip => {}
                        Run::Zeros(range) => sender.send(&Frame::Zeros(range))?,
                        Run::Data(first, bytes) => sender.pages(first, bytes)?,
                    }
                }
                sent += bytes.len() as u64;
                self.load.progress.count(|status| {
                    let length = bytes.len() as u64;
                    status.sent_bytes += length;
                    status.remaining_bytes = status.remaining_bytes.saturating_sub(length);
                });
                self.count_transferred(sender);
                self.wait(bandwidth.spend(sender.sent() - before, Instant::now()))
            },
        )?;
        Ok(sent)
    }

    fn count_transferred(&self, sender: &Output<'_>) {
        let sent = sender.sent();
        self.load
            .progress
            .count(|status| status.transferred_bytes = sent);
    }

    /// Waits, but not for longer than until it is canceled.
    fn wait(&self, mut duration: Duration) -> Result<(), MigrationError> {
        loop {
            if self.canceled.load(Ordering::Acquire) {
                return Err(MigrationError::Canceled);
            }
            if duration.is_zero() {
                return Ok(());
            }
            let part = duration.min(CANCEL_INTERVAL);
            std::thread::sleep(part);
            duration -= part;
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zeros {
    /// The other side's memory is zero.
    Skip,
    /// It may have had something else.
    Send,
}

#[derive(Debug, PartialEq, Eq)]
enum Run<'a> {
    Zeros(PageRange),
    Data(u64, &'a [u8]),
}

/// Whole pages as runs of those that are zero, and those that aren't.
fn runs(first: u64, bytes: &[u8]) -> Vec<Run<'_>> {
    let mut runs = Vec::new();
    let (pages, _) = bytes.as_chunks::<4096>();
    let is_zero = |page: &[u8; 4096]| page.iter().all(|byte| *byte == 0);
    let mut start = 0;
    for run in pages.chunk_by(|one, other| is_zero(one) == is_zero(other)) {
        let first = first + start as u64;
        runs.push(if run.first().is_some_and(is_zero) {
            let count = run.len() as u64;
            Run::Zeros(PageRange { first, count })
        } else {
            Run::Data(first, run.as_flattened())
        });
        start += run.len();
    }
    runs
}

/// Why the other side ended the connection, if it said so.
fn explained(error: MigrationError, receiver: &mut Input<'_>) -> MigrationError {
    if !matches!(error, MigrationError::Stream(StreamError::Cut)) {
        return error;
    }
    match receiver.receive() {
        Ok(Frame::Failed(reason)) => MigrationError::Refused(reason),
        _ => error,
    }
}

fn unexpected(frame: Frame, expected: &'static str) -> MigrationError {
    match frame {
        Frame::Failed(reason) => MigrationError::Refused(reason),
        other => MigrationError::OutOfOrder {
            found: other.name(),
            expected,
        },
    }
}

fn bytes_of(pages: &[PageRange]) -> u64 {
    pages.iter().map(|range| range.count * PAGE).sum()
}

/// Bytes a second, at least 1.
fn rate(bytes: u64, took: Duration) -> u64 {
    let micros = took.as_micros().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000 / micros)
        .unwrap_or(u64::MAX)
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pages_are_told_from_others() {
        let mut bytes = vec![0; 5 * 4096];
        bytes[4096] = 1;
        bytes[3 * 4096 - 1] = 1;
        assert_eq!(
            runs(7, &bytes),
            [
                Run::Zeros(PageRange { first: 7, count: 1 }),
                Run::Data(8, &bytes[4096..3 * 4096]),
                Run::Zeros(PageRange {
                    first: 10,
                    count: 2
                }),
            ]
        );
    }
}
