//! The thread that serves the socket device's queues and the host's streams.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::muxer::{LISTENER, Muxer, watch};
use super::queues::{BrokenQueue, PacketQueue, Service};
use crate::isolation::seccomp::{Mode, Thread};
use crate::virtio::worker::{ThreadKind, Worker, stop_event};
use crate::virtio::{Activation, ActivationError, DeviceHealth, FEATURE_EVENT_IDX};

const EVENTS: usize = 32;
/// How long the thread sleeps at most, in milliseconds, so that a deadline's arithmetic stays small.
const LONGEST_WAIT_MS: u128 = 60_000;

// Tokens below LISTENER.
const RECEIVE_KICK: u64 = 0;
const TRANSMIT_KICK: u64 = 1;
const STOP: u64 = 2;

/// Starts to serve the queues, with the connections of `muxer`, which the thread ends with; `None` if the
/// driver didn't enable both. With `reset`, the driver is told that its connections are gone.
pub fn start(
    muxer: Muxer,
    activation: Activation,
    reset: bool,
    seccomp: Mode,
) -> Result<Option<Worker<Muxer>>, ActivationError> {
    let Activation {
        memory,
        features,
        queues,
        health,
        resumed: _,
    } = activation;
    let event_idx = features & FEATURE_EVENT_IDX != 0;
    let mut packets = Vec::with_capacity(3);
    let mut kicks = Vec::with_capacity(3);
    for queue in queues {
        let opened = queue.layout.open(queue.index, &memory, event_idx);
        let opened = opened.map_err(|e| ActivationError(e.to_string()))?;
        packets.push((
            queue.index,
            PacketQueue::new(opened, memory.clone(), queue.call),
        ));
        kicks.push((queue.index, queue.kick));
    }
    let mut take = |index| {
        let at = packets.iter().position(|(number, _)| *number == index)?;
        Some(packets.swap_remove(at).1)
    };
    let (Some(receive), Some(transmit)) = (take(0), take(1)) else {
        return Ok(None);
    };
    if reset && let Some(mut events) = take(2) {
        Service::reset_transport(&mut events).map_err(|e| ActivationError(e.to_string()))?;
    }
    let event = |step| ActivationError::of(step);
    let stop = stop_event()?;
    // The events' queue has buffers only: nothing follows from its notifications.
    kicks.retain(|(index, _)| *index < 2);
    for (descriptor, token) in kicks
        .iter()
        .map(|(index, kick)| (kick.as_raw_fd(), u64::from(*index)))
        .chain([(stop.as_raw_fd(), STOP)])
    {
        watch(muxer.epoll(), descriptor, EventSet::IN, token)
            .map_err(event("watch the socket device's events"))?;
    }
    let mut server = Server {
        service: Service::new(muxer, receive, transmit),
        kicks: kicks.into_iter().map(|(_, kick)| kick).collect(),
        stop: stop.try_clone().map_err(event("share an eventfd"))?,
    };
    let kind = ThreadKind {
        name: "vsock".to_owned(),
        calls: Thread::Vsock,
        seccomp,
    };
    let worker = Worker::start(kind, stop, health, move |health| {
        server.run(health);
        server.finish()
    })?;
    Ok(Some(worker))
}

struct Server {
    service: Service,
    kicks: Vec<EventFd>,
    stop: EventFd,
}

impl Server {
    fn run(&mut self, health: &DeviceHealth) {
        if let Err(e) = self.serve() {
            tracing::warn!("the guest's vsock queues are broken: {e}");
            health.needs_reset();
        }
    }

    fn serve(&mut self) -> Result<(), BrokenQueue> {
        let mut events = [EpollEvent::default(); EVENTS];
        // Packets may be there from before.
        let mut more = true;
        loop {
            let wait = if more { 0 } else { self.wait_ms() };
            let ready = match self.service.muxer.epoll().wait(wait, &mut events) {
                Ok(ready) => ready,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    tracing::error!("epoll_wait failed: {e}");
                    return Ok(());
                }
            };
            let now = Instant::now();
            for event in &events[..ready] {
                match event.data() {
                    token @ (RECEIVE_KICK | TRANSMIT_KICK) => {
                        if let Some(kick) = self.kicks.get(usize::try_from(token).unwrap_or(0)) {
                            // Says EAGAIN if a reset took it.
                            let _ = kick.read();
                        }
                    }
                    token if token >= LISTENER => {
                        self.service.muxer.wake(token, event.event_set(), now);
                    }
                    _ => return Ok(()),
                }
            }
            self.service.muxer.expire(now);
            more = self.service.turn(now)?;
        }
    }

    /// Milliseconds until something is to be given up, at least one; -1 if there is nothing.
    fn wait_ms(&self) -> i32 {
        let Some(deadline) = self.service.muxer.deadline() else {
            return -1;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        i32::try_from((left.as_millis() + 1).min(LONGEST_WAIT_MS)).unwrap_or(0)
    }

    fn finish(self) -> Muxer {
        let muxer = self.service.muxer;
        for descriptor in self
            .kicks
            .iter()
            .chain([&self.stop])
            .map(AsRawFd::as_raw_fd)
        {
            let none = EpollEvent::default();
            if let Err(e) = muxer
                .epoll()
                .ctl(ControlOperation::Delete, descriptor, none)
            {
                tracing::debug!("an event can't be left alone: {e}");
            }
        }
        muxer
    }
}
