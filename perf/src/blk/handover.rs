//! What handing operations over costs by itself: a thread straight on the file, as in
//! [`Straight`], but for a client in another thread. Each wakes the other with an eventfd for every
//! batch, and sleeps when it has nothing to do.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::client::PATIENCE;
use super::figures::Times;
use super::placement::Placement;
use super::straight::{KICK, Straight};
use super::work::{Operation, Operations, Work};
use crate::process::thread_processor_time;

/// A client's operation and the slot that its memory is in.
type Request = (usize, Operation);

/// Two threads for a file.
pub struct Handover {
    path: PathBuf,
    work: Work,
    placement: Placement,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Handover {
    pub fn new(path: &Path, work: Work, placement: &Placement) -> anyhow::Result<Self> {
        Ok(Self {
            path: path.to_path_buf(),
            work,
            placement: placement.clone(),
            kick: eventfd(0, EventfdFlags::CLOEXEC)?,
            call: eventfd(0, EventfdFlags::CLOEXEC)?,
        })
    }

    /// As [`Straight::run`]. The processor time is that of the thread on the file.
    pub fn run(
        &self,
        operations: &mut Operations,
        duration: Duration,
        times: &mut Times,
    ) -> anyhow::Result<(Duration, Duration)> {
        let depth = self.work.depth;
        let (requests, taken) = sync_channel::<Request>(depth);
        let (done, answers) = sync_channel::<usize>(depth);
        thread::scope(|scope| {
            let backend = self
                .placement
                .as_backend(|| Ok(scope.spawn(move || self.serve(&taken, &done))))?;
            let elapsed = self.ask(operations, duration, times, &requests, &answers);
            drop(requests);
            signal(&self.kick)?;
            let cpu = backend.join();
            let cpu = cpu.map_err(|_| anyhow::anyhow!("the thread on the file panicked"))?;
            Ok((elapsed?, cpu?))
        })
    }

    fn ask(
        &self,
        operations: &mut Operations,
        duration: Duration,
        times: &mut Times,
        requests: &SyncSender<Request>,
        answers: &Receiver<usize>,
    ) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let mut started = vec![begin; self.work.depth];
        for slot in 0..self.work.depth {
            requests.send((slot, operations.next()))?;
        }
        signal(&self.kick)?;
        let mut in_flight = self.work.depth;
        while in_flight > 0 {
            let mut event = [PollFd::new(&self.call, PollFlags::IN)];
            let told = poll(&mut event, Some(&PATIENCE))?;
            anyhow::ensure!(told > 0, "the thread on the file doesn't answer");
            rustix::io::read(&self.call, &mut [0; 8])?;
            let (running, mut asked) = (begin.elapsed() < duration, false);
            while let Ok(slot) = answers.try_recv() {
                let start = started.get_mut(slot).context("a slot")?;
                times.push(start.elapsed());
                in_flight -= 1;
                if running {
                    *start = Instant::now();
                    requests.send((slot, operations.next()))?;
                    in_flight += 1;
                    asked = true;
                }
            }
            if asked {
                signal(&self.kick)?;
            }
        }
        Ok(begin.elapsed())
    }

    fn serve(
        &self,
        requests: &Receiver<Request>,
        done: &SyncSender<usize>,
    ) -> anyhow::Result<Duration> {
        let mut straight = Straight::open(&self.path, self.work)?;
        let cpu = thread_processor_time();
        straight.wait_for_kicks(&self.kick)?;
        loop {
            loop {
                match requests.try_recv() {
                    Ok((slot, operation)) => straight.start(slot, operation)?,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        return Ok(thread_processor_time().saturating_sub(cpu));
                    }
                }
            }
            let mut any = false;
            for (data, result, more) in straight.wait()? {
                if data == KICK {
                    if !more {
                        straight.wait_for_kicks(&self.kick)?;
                    }
                    continue;
                }
                straight.check(result)?;
                done.send(usize::try_from(data)?)?;
                any = true;
            }
            if any {
                signal(&self.call)?;
            }
        }
    }
}

fn signal(event: &OwnedFd) -> anyhow::Result<()> {
    rustix::io::write(event, &1_u64.to_ne_bytes())?;
    Ok(())
}
