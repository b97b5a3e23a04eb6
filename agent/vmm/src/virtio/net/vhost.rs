//! The kernel's own device, `/dev/vhost-net`: packets go between a queue pair and the TAP without
//! this process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::pairs::{Driver, PairQueues};
use super::tap::{Tap, TapQueue};
use crate::memory::GuestMemory;
use crate::virtio::{
    ActivationError, ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1,
};

/// What of the driver's features concerns the queues; the others are between driver and TAP.
const FEATURES: u64 =
    FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// `/dev/vhost-net`, opened for one queue pair. It outlives the guest's reboots.
#[derive(Debug)]
pub struct VhostDescriptor {
    file: File,
    /// This process is its owner, so that the kernel has a thread for it.
    owned: AtomicBool,
}

impl VhostDescriptor {
    /// Opens the device and checks what it can do.
    pub fn open() -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/vhost-net")?;
        let this = Self {
            file,
            owned: AtomicBool::new(false),
        };
        let device = Device {
            descriptor: &this,
            memory: GuestMemory::default(),
        };
        let offered = device.get_features().map_err(io::Error::other)?;
        if offered & FEATURES != FEATURES {
            return Err(io::Error::other(format!(
                "it has the features {offered:#x} only"
            )));
        }
        Ok(this)
    }
}

/// The descriptor with the memory of the guest that boots now.
struct Device<'a> {
    descriptor: &'a VhostDescriptor,
    memory: GuestMemory,
}

impl AsRawFd for Device<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.file.as_raw_fd()
    }
}

impl VhostKernBackend for Device<'_> {
    type AS = GuestMemory;

    fn mem(&self) -> &GuestMemory {
        &self.memory
    }

    /// Its places were checked when the driver was ready.
    fn is_valid(&self, _ring: &VringConfigData) -> bool {
        true
    }
}

/// A queue pair that the kernel serves until this is dropped.
pub struct VhostPair {
    tap: Arc<Tap>,
    index: u16,
    driver: Driver,
    queues: PairQueues,
}

impl VhostPair {
    /// Hands pair `index` to the kernel.
    pub fn start(
        tap: Arc<Tap>,
        index: u16,
        driver: Driver,
        queues: PairQueues,
    ) -> Result<Self, ActivationError> {
        // From here on, dropping it takes back what was handed over.
        let pair = Self {
            tap,
            index,
            driver,
            queues,
        };
        let (Some(device), Some(queue)) = (pair.device(), pair.tap.queue(index)) else {
            return Err(ActivationError(format!("there is no queue pair {index}")));
        };
        device.prepare(&pair.driver)?;
        for (ring, active) in pair.rings() {
            device.set_ring(ring, active)?;
        }
        for (ring, _) in pair.rings() {
            device
                .set_backend(ring, Some(queue))
                .map_err(error("hand over a queue"))?;
        }
        for (_, active) in pair.rings() {
            // What the driver gave a thread before is looked for now. Fails only with the event's
            // counter at its maximum.
            let _ = active.kick.write(1);
        }
        Ok(pair)
    }

    /// Takes the queues back. What the kernel took of them it has also finished.
    pub fn stop(&self) -> Result<(), String> {
        let Some(device) = self.device() else {
            return Ok(());
        };
        for (ring, active) in self.rings() {
            device
                .set_backend(ring, None)
                .map_err(|e| format!("can't take a queue back from vhost-net: {e}"))?;
            let taken = device
                .get_vring_base(ring)
                .map_err(|e| format!("vhost-net doesn't say where a queue stands: {e}"))?;
            let finished = active.layout.used_index(&self.driver.memory)?;
            if taken & 0xffff != u32::from(finished) {
                return Err(format!(
                    "vhost-net has taken {taken} buffers of queue {} and finished {finished}",
                    active.index
                ));
            }
        }
        Ok(())
    }

    fn device(&self) -> Option<Device<'_>> {
        let descriptor = self.tap.vhost(self.index)?;
        Some(Device {
            descriptor,
            memory: Arc::clone(&self.driver.memory),
        })
    }

    /// By vhost-net's number: receive, then transmit.
    fn rings(&self) -> [(usize, &ActiveQueue); 2] {
        [(0, &self.queues.receive), (1, &self.queues.transmit)]
    }
}

impl Drop for VhostPair {
    fn drop(&mut self) {
        let Some(device) = self.device() else { return };
        for (ring, _) in self.rings() {
            if let Err(e) = device.set_backend(ring, None) {
                tracing::error!("can't take a queue back from vhost-net: {e}");
            }
        }
    }
}

impl Device<'_> {
    fn prepare(&self, driver: &Driver) -> Result<(), ActivationError> {
        if !self.descriptor.owned.load(Ordering::Acquire) {
            self.set_owner()
                .map_err(error("become vhost-net's owner"))?;
            self.descriptor.owned.store(true, Ordering::Release);
        }
        self.set_features(driver.features & FEATURES)
            .map_err(error("set vhost-net's features"))?;
        let regions: Vec<_> = driver
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                ..VhostUserMemoryRegionInfo::default()
            })
            .collect();
        self.set_mem_table(&regions)
            .map_err(error("give vhost-net the guest's memory"))?;
        Ok(())
    }

    /// Tells where a ring is and where it stands, and the events at both of its ends.
    fn set_ring(&self, ring: usize, active: &ActiveQueue) -> Result<(), ActivationError> {
        let layout = &active.layout;
        layout.check(&self.memory).map_err(ActivationError)?;
        let next = layout.used_index(&self.memory).map_err(ActivationError)?;
        let places = VringConfigData {
            queue_max_size: layout.size,
            queue_size: layout.size,
            flags: 0,
            desc_table_addr: layout.descriptors,
            used_ring_addr: layout.used,
            avail_ring_addr: layout.available,
            log_addr: None,
        };
        self.set_vring_num(ring, layout.size)
            .and_then(|()| self.set_vring_base(ring, next))
            .and_then(|()| self.set_vring_addr(ring, &places))
            .and_then(|()| self.set_vring_call(ring, &active.call))
            .and_then(|()| self.set_vring_kick(ring, &active.kick))
            .map_err(error("set up a queue of vhost-net"))
    }

    fn set_backend(&self, ring: usize, queue: Option<&TapQueue>) -> io::Result<()> {
        let file = vhost_vring_file {
            index: u32::try_from(ring).unwrap_or(u32::MAX),
            fd: queue.map_or(-1, TapQueue::as_raw_fd),
        };
        // SAFETY: VHOST_NET_SET_BACKEND takes a pointer to this structure.
        match unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn error<E: std::fmt::Display>(step: &'static str) -> impl FnOnce(E) -> ActivationError {
    ActivationError::of(step)
}
