//! Captures of interfaces: the eBPF programs copy packets of the devices that someone captures.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use keelson_ebpf::{CaptureReader, CapturedPacket, DatapathError};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Mutex, Notify, broadcast};

use super::network::SharedDatapath;
use crate::AgentError;
use crate::error::Result;

/// How often the ring buffer is read while someone captures.
const INTERVAL: Duration = Duration::from_millis(20);
/// Packets read at once.
const BATCH: usize = 4096;
/// Packets that a slow listener may be behind before it misses some: up to 16 MiB for all.
const BACKLOG: usize = 4096;

/// Who captures what.
#[derive(Clone, Debug)]
pub struct Captures {
    sender: broadcast::Sender<Arc<CapturedPacket>>,
    /// By device, how many captures there are.
    devices: Arc<Mutex<BTreeMap<String, usize>>>,
    datapath: SharedDatapath,
    wake: Arc<Notify>,
}

/// A capture of one device; ends when it is dropped.
#[derive(Debug)]
pub struct Capture {
    device: String,
    /// On the monotonic clock: what is older was captured for someone else.
    since_ns: u64,
    lost: u64,
    receiver: broadcast::Receiver<Arc<CapturedPacket>>,
    captures: Captures,
}

impl Captures {
    /// Starts the task that reads, which at first waits for a capture.
    pub fn start(reader: CaptureReader, datapath: SharedDatapath) -> Self {
        let captures = Self {
            sender: broadcast::Sender::new(BACKLOG),
            devices: Arc::default(),
            datapath,
            wake: Arc::default(),
        };
        tokio::spawn(captures.clone().run(reader));
        captures
    }

    /// Captures a device's packets from now on; of one that isn't there, from then on.
    ///
    /// # Errors
    /// [`AgentError::Datapath`] where the kernel refuses.
    pub async fn capture(&self, device: String) -> Result<Capture> {
        let mut devices = self.devices.lock().await;
        let capture = Capture {
            since_ns: monotonic_ns(),
            lost: 0,
            receiver: self.sender.subscribe(),
            captures: self.clone(),
            device: device.clone(),
        };
        *devices.entry(device.clone()).or_default() += 1;
        drop(devices);
        // Dropping the capture takes back what was done, if this fails.
        self.set(device, true).await?;
        self.wake.notify_one();
        Ok(capture)
    }

    /// Goes on with a device that was attached anew, if it is captured; before it is up.
    ///
    /// # Errors
    /// [`AgentError::Datapath`] where the kernel refuses.
    pub async fn resume(&self, device: &str) -> Result<()> {
        let devices = self.devices.lock().await;
        if devices.contains_key(device) {
            self.set(device.to_owned(), true).await?;
        }
        Ok(())
    }

    async fn end(self, device: String) {
        let mut devices = self.devices.lock().await;
        if let Some(count) = devices.get_mut(&device) {
            *count -= 1;
            if *count > 0 {
                return;
            }
            devices.remove(&device);
        }
        if let Err(error) = self.set(device, false).await {
            tracing::warn!(%error, "a capture can't be ended");
        }
    }

    async fn set(&self, device: String, wanted: bool) -> Result<()> {
        let set = self
            .datapath
            .with(move |datapath| datapath.capture(&device, wanted));
        match set.await {
            Err(AgentError::Datapath(DatapathError::NotAttached { .. })) => Ok(()),
            other => other,
        }
    }

    async fn run(self, mut reader: CaptureReader) {
        loop {
            self.wake.notified().await;
            while self.sender.receiver_count() > 0 {
                for packet in reader.read(BATCH) {
                    // Without a listener it is lost, as it should be.
                    let _ = self.sender.send(Arc::new(packet));
                }
                tokio::time::sleep(INTERVAL).await;
            }
        }
    }
}

impl Capture {
    /// The next packet, and how many of captured devices were lost since the last one. `None` when the
    /// agent ends.
    pub async fn next(&mut self) -> Option<(Arc<CapturedPacket>, u64)> {
        loop {
            match self.receiver.recv().await {
                Ok(packet) if packet.time_ns >= self.since_ns => {
                    self.lost += u64::from(packet.lost);
                    if packet.interface == self.device {
                        return Some((packet, std::mem::take(&mut self.lost)));
                    }
                }
                Ok(_) => {}
                Err(RecvError::Lagged(missed)) => self.lost += missed,
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Outside of the runtime the agent ends, and the next one ends all captures.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let end = self.captures.clone().end(std::mem::take(&mut self.device));
            runtime.spawn(end);
        }
    }
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
