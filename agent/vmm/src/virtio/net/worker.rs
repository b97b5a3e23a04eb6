//! The thread that serves a queue pair of an interface.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::pairs::{Driver, HostSide, PairQueues};
use super::queues::{BrokenQueue, PacketQueue, Receiver, Transmitter, Turn};
use super::tap::{Tap, TapQueue};
use crate::isolation::seccomp::Thread;
use crate::virtio::worker::{ThreadKind, Worker, stop_event};
use crate::virtio::{ActivationError, ActiveQueue, DeviceHealth, FEATURE_EVENT_IDX};

const TAP: u64 = 0;
const RECEIVE_KICK: u64 = 1;
const TRANSMIT_KICK: u64 = 2;
const STOP: u64 = 3;

/// Starts to serve pair `index`, whose queue of the TAP is attached.
pub fn start(
    host: &HostSide,
    index: u16,
    driver: Driver,
    queues: PairQueues,
) -> Result<Worker<()>, ActivationError> {
    let Driver {
        memory,
        features,
        health,
    } = driver;
    let PairQueues { receive, transmit } = queues;
    let (tap, mtu) = (Arc::clone(&host.tap), host.mtu);
    let Some(tap_queue) = tap.queue(index) else {
        return Err(ActivationError(format!("the TAP has no queue {index}")));
    };
    let event_idx = features & FEATURE_EVENT_IDX != 0;
    let open = |queue: &ActiveQueue| {
        queue
            .layout
            .open(queue.index, &memory, event_idx)
            .map_err(|e| ActivationError(e.to_string()))
    };
    let (receive_queue, transmit_queue) = (open(&receive)?, open(&transmit)?);
    let event = |step| ActivationError::of(step);
    let stop = stop_event()?;
    let epoll = Epoll::new().map_err(event("create an epoll instance"))?;
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    for (fd, set, token) in [
        (tap_queue.as_raw_fd(), edge, TAP),
        (receive.kick.as_raw_fd(), EventSet::IN, RECEIVE_KICK),
        (transmit.kick.as_raw_fd(), EventSet::IN, TRANSMIT_KICK),
        (stop.as_raw_fd(), EventSet::IN, STOP),
    ] {
        watch(&epoll, fd, set, token).map_err(event("watch the interface's events"))?;
    }
    let kind = ThreadKind {
        name: format!("net{index}-{}", host.id),
        calls: Thread::Net,
        seccomp: host.seccomp,
    };
    Worker::start(kind, stop, health, move |health| {
        let incoming = PacketQueue::new(receive_queue, Arc::clone(&memory));
        let service = Service {
            tap,
            index,
            epoll,
            receiver: Receiver::new(incoming, features, mtu),
            transmitter: Transmitter::new(PacketQueue::new(transmit_queue, memory)),
            receive_kick: receive.kick,
            receive_call: receive.call,
            transmit_kick: transmit.kick,
            transmit_call: transmit.call,
        };
        service.run(health);
    })
}

struct Service {
    tap: Arc<Tap>,
    index: u16,
    epoll: Epoll,
    receiver: Receiver,
    transmitter: Transmitter,
    receive_kick: EventFd,
    receive_call: EventFd,
    transmit_kick: EventFd,
    transmit_call: EventFd,
}

/// What there may be to do.
struct Work {
    /// The TAP may have packets.
    tap_ready: bool,
    /// The driver may have given buffers since the last [`Turn::NoBuffers`].
    buffers: bool,
    transmit: bool,
}

impl Service {
    fn run(mut self, health: &DeviceHealth) {
        if let Err(e) = self.serve() {
            tracing::warn!("an interface's queue is broken: {e}");
            health.needs_reset();
        }
    }

    fn serve(&mut self) -> Result<(), BrokenQueue> {
        let tap = Arc::clone(&self.tap);
        let Some(queue) = tap.queue(self.index) else {
            return Ok(());
        };
        let mut events = [EpollEvent::default(); 4];
        // Buffers and packets may be there from before.
        let mut work = Work {
            tap_ready: true,
            buffers: true,
            transmit: true,
        };
        loop {
            let idle = !(work.transmit || work.tap_ready && work.buffers);
            let ready = match self.epoll.wait(if idle { -1 } else { 0 }, &mut events) {
                Ok(ready) => ready,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    tracing::error!("epoll_wait failed: {e}");
                    return Ok(());
                }
            };
            for event in &events[..ready] {
                match event.data() {
                    TAP => work.tap_ready = true,
                    RECEIVE_KICK => {
                        // Says EAGAIN if a reset took it.
                        let _ = self.receive_kick.read();
                        work.buffers = true;
                    }
                    TRANSMIT_KICK => {
                        let _ = self.transmit_kick.read();
                        work.transmit = true;
                    }
                    _ => return Ok(()),
                }
            }
            self.turn(&mut work, queue)?;
        }
    }

    fn turn(&mut self, work: &mut Work, queue: &TapQueue) -> Result<(), BrokenQueue> {
        if work.transmit {
            let (turn, interrupt) = self.transmitter.run(queue)?;
            work.transmit = turn == Turn::More;
            call(&self.transmit_call, interrupt);
        }
        if work.tap_ready && work.buffers {
            let (turn, interrupt) = self.receiver.run(queue)?;
            work.tap_ready = turn != Turn::Drained;
            work.buffers = turn != Turn::NoBuffers;
            call(&self.receive_call, interrupt);
        }
        Ok(())
    }
}

fn call(event: &EventFd, interrupt: bool) {
    if interrupt {
        // Fails only with the event's counter at its maximum, when an interrupt is due anyway.
        let _ = event.write(1);
    }
}

fn watch(epoll: &Epoll, fd: RawFd, set: EventSet, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token))
}
