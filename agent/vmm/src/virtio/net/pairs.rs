//! The queue pairs of a ready driver, and who moves the packets of each: a thread of this process, or
//! the kernel.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::tap::Tap;
use super::vhost::VhostPair;
use super::worker;
use crate::isolation::seccomp::Mode;
use crate::memory::GuestMemory;
use crate::virtio::worker::Worker;
use crate::virtio::{ActivationError, ActiveQueue, DeviceHealth};

/// What the queue pairs of one driver have in common.
#[derive(Clone)]
pub struct Driver {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The feature bits that the driver accepted.
    pub features: u64,
    /// How to say that the device is broken.
    pub health: DeviceHealth,
}

/// The two queues of a pair.
pub struct PairQueues {
    /// To the guest.
    pub receive: ActiveQueue,
    /// From the guest.
    pub transmit: ActiveQueue,
}

/// The host's side of an interface, as its device knows it.
#[derive(Clone)]
pub struct HostSide {
    /// The interface's id.
    pub id: String,
    /// Its TAP, which outlives the guest's reboots.
    pub tap: Arc<Tap>,
    /// The MTU that the guest is told.
    pub mtu: u16,
    /// What becomes of system calls that a thread has no need for.
    pub seccomp: Mode,
}

/// All queue pairs, some of them served.
pub struct QueuePairs {
    host: HostSide,
    driver: Driver,
    /// The kernel may serve pairs.
    allows_vhost: bool,
    /// By number, from 0 on without a gap: the pairs that the driver enabled.
    pairs: Vec<Pair>,
}

struct Pair {
    queues: PairQueues,
    mover: Option<Mover>,
}

enum Mover {
    Thread(#[allow(dead_code, reason = "it ends when it is dropped")] Worker<()>),
    Kernel(VhostPair),
}

impl QueuePairs {
    /// The pairs among `queues`, of which none is served yet; by the kernel only if it may.
    pub fn new(
        host: HostSide,
        driver: Driver,
        mut queues: BTreeMap<u16, ActiveQueue>,
        allows_vhost: bool,
    ) -> Self {
        let mut pairs = Vec::new();
        for index in 0..host.tap.pairs() {
            let queues = (queues.remove(&(2 * index)), queues.remove(&(2 * index + 1)));
            let (Some(receive), Some(transmit)) = queues else {
                break;
            };
            pairs.push(Pair {
                queues: PairQueues { receive, transmit },
                mover: None,
            });
        }
        Self {
            host,
            driver,
            allows_vhost,
            pairs,
        }
    }

    /// How many the driver enabled.
    pub fn count(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(u16::MAX)
    }

    /// Serves the first `count` pairs, and no others.
    pub fn serve(&mut self, count: u16) -> Result<(), ActivationError> {
        for pair in self.pairs.iter_mut().skip(usize::from(count)) {
            pair.mover = None;
        }
        // A queue of the TAP that isn't attached can't be waited for.
        self.host
            .tap
            .use_pairs(count.min(self.count()))
            .map_err(|e| ActivationError(e.to_string()))?;
        for (index, pair) in (0..count).zip(&mut self.pairs) {
            if pair.mover.is_none() {
                let (host, driver) = (&self.host, &self.driver);
                pair.mover = Some(start(host, index, driver, &pair.queues, self.allows_vhost)?);
            }
        }
        Ok(())
    }

    /// Lets the kernel serve pairs, or no longer: `count` of them go on at once.
    pub fn allow_vhost(&mut self, allowed: bool, count: u16) -> Result<(), String> {
        self.allows_vhost = allowed;
        let stopped = self.pause();
        let started = self.serve(count).map_err(|e| e.to_string());
        stopped.and(started)
    }

    /// Stops between two packets. On an error some pairs may still be served.
    pub fn pause(&mut self) -> Result<(), String> {
        for pair in &mut self.pairs {
            if let Some(Mover::Kernel(vhost)) = &pair.mover {
                vhost.stop()?;
            }
            pair.mover = None;
        }
        Ok(())
    }
}

fn start(
    host: &HostSide,
    index: u16,
    driver: &Driver,
    queues: &PairQueues,
    allows_vhost: bool,
) -> Result<Mover, ActivationError> {
    let share = || {
        queues
            .try_clone()
            .map_err(ActivationError::of("share an eventfd"))
    };
    if allows_vhost && host.tap.vhost(index).is_some() {
        let tap = Arc::clone(&host.tap);
        match VhostPair::start(tap, index, driver.clone(), share()?) {
            Ok(pair) => return Ok(Mover::Kernel(pair)),
            Err(e) if host.tap.vhost_is_demanded() => return Err(e),
            Err(e) => tracing::warn!("{}: a thread does vhost-net's work: {e}", host.id),
        }
    }
    worker::start(host, index, driver.clone(), share()?).map(Mover::Thread)
}

impl PairQueues {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            receive: self.receive.try_clone()?,
            transmit: self.transmit.try_clone()?,
        })
    }
}
