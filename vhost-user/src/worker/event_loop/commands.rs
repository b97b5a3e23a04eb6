//! What other threads ask of a worker: to start queues, to stop them, and to end.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use io_uring::opcode;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{EventLoop, IGNORED, KICK};
use crate::layer::{ChannelContext, RingOperations, Waker};
use crate::pinned_memory::PinnedMemory;
use crate::request_executor::{ExecutorSetup, RequestExecutor};
use crate::virtqueue::Virtqueue;
use crate::worker::queue::Queue;
use crate::worker::{Command, QueueSetup};

impl EventLoop {
    // Does what other threads have asked for.
    pub(super) fn obey(&mut self) -> io::Result<()> {
        for command in self.mailbox.take() {
            match command {
                Command::Start(setup, reply) => {
                    let _ = reply.send(self.start(*setup));
                }
                Command::Stop(number, reply) => self.stop(number, reply)?,
                Command::Quit => self.quitting = true,
            }
        }
        if std::mem::take(&mut self.told) {
            for number in 0..u16::try_from(self.queues.len()).unwrap_or(u16::MAX) {
                if self.queue(number).is_some_and(|queue| queue.waker.take()) {
                    self.wake(number, Instant::now())?;
                }
            }
        }
        Ok(())
    }

    fn start(&mut self, setup: QueueSetup) -> io::Result<u16> {
        let place = self.queues.iter().position(Option::is_none);
        let place = place.unwrap_or(self.queues.len());
        let number = u16::try_from(place).map_err(io::Error::other)?;
        let waker = Waker::new(Arc::clone(&self.mailbox.event));
        let virtqueue = Virtqueue::new(setup.virtqueue, Arc::clone(&setup.memory));
        let virtqueue = virtqueue.map_err(io::Error::other)?;
        let submitter = self.ring.submitter();
        let mut context = ChannelContext::new(&mut self.files, Some(&submitter), &waker);
        let channel = setup.disk.device().open_channel(&mut context);
        let files = context.into_slots();
        let channel = match channel {
            Ok(channel) => channel,
            Err(error) => {
                self.files.remove(Some(&submitter), &files);
                return Err(error);
            }
        };
        let pinned = self
            .pinned
            .as_mut()
            .map_or_else(PinnedMemory::default, |table| {
                table.add(&submitter, &setup.memory)
            });
        let kick = setup.kick.as_raw_fd();
        let executor = RequestExecutor::new(
            virtqueue,
            ExecutorSetup {
                index: setup.index,
                disk: setup.disk,
                channel,
                metrics: setup.metrics,
                guards: setup.guards,
                inflight: setup.inflight,
                dirty_log: setup.dirty_log,
                pinned,
            },
        );
        let queue = Box::new(Queue {
            executor,
            operations: RingOperations::new(number),
            index: setup.index,
            kick: setup.kick,
            call: setup.call,
            error: setup.error,
            waker,
            files,
            memory: setup.memory,
            kick_armed: true,
            hot: false,
            more: false,
            broken: false,
            stopping: None,
        });
        match self.queues.get_mut(place) {
            Some(entry) => *entry = Some(queue),
            None => self.queues.push(Some(queue)),
        }
        self.arm_poll(kick, KICK | u64::from(number) << 48)?;
        self.heat(number);
        tracing::debug!(queue = setup.index, "queue started");
        Ok(number)
    }

    fn stop(&mut self, number: u16, reply: mpsc::Sender<u16>) -> io::Result<()> {
        let Some(queue) = self.queue(number) else {
            return Ok(());
        };
        queue.stopping = Some(reply);
        if queue.kick_armed {
            let poll = KICK | u64::from(number) << 48;
            // Not POLL_REMOVE, which gives up (EALREADY) if a kick comes at the same moment.
            let entry = opcode::AsyncCancel::new(poll).build().user_data(IGNORED);
            self.push(&entry)?;
        }
        self.heat(number);
        Ok(())
    }

    // Lets go of a queue that has come to its end.
    pub(super) fn release_if_ended(&mut self, number: u16) {
        let ended = |queue: &mut Queue| {
            queue.stopping.is_some() && !queue.kick_armed && queue.executor.is_idle()
        };
        if !self.queue(number).is_some_and(ended) {
            return;
        }
        let entry = self.queues.get_mut(usize::from(number));
        if let Some(queue) = entry.and_then(Option::take) {
            self.hot.retain(|hot| *hot != number);
            let submitter = self.ring.submitter();
            self.files.remove(Some(&submitter), &queue.files);
            if let Some(pinned) = &mut self.pinned {
                pinned.remove(&submitter, &queue.memory);
            }
            end(*queue);
        }
    }

    // After the ring has failed: no queue goes on, but whoever waits for one is answered.
    pub(super) fn fail(&mut self) {
        for queue in self.queues.iter_mut().flatten() {
            queue.announce_broken();
        }
        while !self.quitting {
            let mut events = [PollFd::new(&*self.mailbox.event, PollFlags::IN)];
            let waited = poll(&mut events, None);
            let _ = rustix::io::read(&*self.mailbox.event, &mut [0; 8]);
            if waited.is_err_and(|error| error != Errno::INTR) {
                return;
            }
            for command in self.mailbox.take() {
                match command {
                    Command::Start(_, reply) => {
                        let _ = reply.send(Err(io::Error::other("the worker's io_uring failed")));
                    }
                    Command::Stop(number, reply) => {
                        let entry = self.queues.get_mut(usize::from(number));
                        if let Some(mut queue) = entry.and_then(Option::take) {
                            queue.stopping = Some(reply);
                            end(*queue);
                        }
                    }
                    Command::Quit => self.quitting = true,
                }
            }
        }
    }
}

// Tells who waits for a queue's end where a successor has to go on.
fn end(queue: Queue) {
    tracing::debug!(queue = queue.index, "queue stopped");
    let base = queue.executor.next_available();
    let stopping = queue.stopping;
    // The guest's memory and the disk go before anyone may believe that they are unused.
    drop(queue.executor);
    drop(queue.memory);
    if let Some(stopping) = stopping {
        let _ = stopping.send(base);
    }
}
