//! The socket device (virtio 1.2, 5.10): connections between ports of the guest and Unix sockets of
//! the host, as Firecracker and Cloud Hypervisor have them ("hybrid vsock"), so that nothing of it is
//! in the host's kernel and a guest's context identifier need not be unique on the host.
//!
//! - A program on the host connects to the device's socket and writes `CONNECT 1024\n`: it is
//!   connected to port 1024 of the guest when it reads `OK 1073741824\n`, the number being the port
//!   that the guest sees at the host's side; if nobody listens there, the stream ends.
//! - A program in the guest that connects to port 1024 of the host (context 2) gets whoever listens
//!   at the device's socket's path with `_1024` behind it.

mod connection;
mod host;
mod muxer;
mod packet;
mod queues;
mod worker;

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::worker::Worker;
use super::{
    Activation, ActivationError, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1,
    VirtioDevice,
};
use crate::isolation::seccomp::Mode;

pub use host::{Host, UnixHost};
#[cfg(any(test, feature = "fuzzing"))]
pub use muxer::LISTENER;
pub use muxer::Muxer;
#[cfg(any(test, feature = "fuzzing"))]
pub use queues::{PacketQueue, Service};

/// Receive, transmit, events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// A socket device.
pub struct Vsock {
    cid: u64,
    seccomp: Mode,
    host: Arc<dyn Fn() -> Box<dyn Host> + Send + Sync>,
    worker: Option<Worker<Muxer>>,
    /// The connections of a device that is paused.
    paused: Option<Muxer>,
}

impl Vsock {
    /// A device for the guest with the context identifier `cid`.
    pub fn new(cid: u32, host: UnixHost, seccomp: Mode) -> Self {
        Self {
            cid: u64::from(cid),
            seccomp,
            host: Arc::new(move || Box::new(host.clone())),
            worker: None,
            paused: None,
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data
            .iter_mut()
            .zip(self.cid.to_le_bytes().iter().skip(start))
        {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let kept = self.paused.take();
        // A restored guest's connections were another one's.
        let reset = activation.resumed && kept.is_none();
        let muxer = match kept {
            Some(muxer) => muxer,
            None => Muxer::new(self.cid, (self.host)())
                .map_err(ActivationError::of("watch the device's socket"))?,
        };
        self.worker = worker::start(muxer, activation, reset, self.seccomp)?;
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.paused = None;
    }

    fn pause(&mut self) -> Result<(), String> {
        self.paused = self.worker.take().and_then(Worker::stop);
        Ok(())
    }
}
