//! The vhost-user messages of one frontend, and the queues that it sets up with them.
//!
//! Message framing, sizes and descriptors are checked by the crate `vhost`; here is what they
//! mean for this device. An error ends the connection: a frontend that didn't ask for replies
//! has no other way to learn of it.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use virtio_bindings::bindings::{virtio_blk, virtio_config, virtio_ring};
use vm_memory::GuestMemoryMmap;

use crate::config_space::{self, CONFIG_SPACE_SIZE, WRITEBACK_OFFSET};
use crate::disk::Disk;
use crate::guest_memory::{self, MAX_REGIONS, MemoryTable, RegionDescription};
use crate::metrics::QueueMetrics;
use crate::vring::{Negotiated, RingAddresses, Vring};

const VIRTIO_F_VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
const VIRTIO_F_INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
const VIRTIO_F_EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
const VIRTIO_BLK_F_FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
const VIRTIO_BLK_F_CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

/// One frontend's device: its memory, its queues, and what it negotiated.
#[derive(Debug)]
pub struct BlockBackend {
    disk: Arc<Disk>,
    max_queue_size: u16,
    owned: bool,
    acked_features: u64,
    writeback: bool,
    table: MemoryTable,
    memory: Option<Arc<GuestMemoryMmap>>,
    vrings: Vec<Vring>,
}

impl BlockBackend {
    /// A device that no frontend has talked to. There is one queue for each of the counters.
    pub fn new(disk: Arc<Disk>, max_queue_size: u16, metrics: &[Arc<QueueMetrics>]) -> Self {
        disk.write_through.store(true, Ordering::Release);
        let vrings = metrics.iter().enumerate();
        Self {
            disk,
            max_queue_size,
            owned: false,
            acked_features: 0,
            writeback: true,
            table: MemoryTable::default(),
            memory: None,
            vrings: vrings
                .map(|(index, metrics)| Vring::new(index, Arc::clone(metrics)))
                .collect(),
        }
    }

    /// Completes what is in flight and stops all queues.
    pub fn stop(&mut self) {
        for vring in &mut self.vrings {
            vring.stop();
        }
    }

    fn offered_features(&self) -> u64 {
        let mut bits = vec![
            virtio_blk::VIRTIO_BLK_F_SIZE_MAX,
            virtio_blk::VIRTIO_BLK_F_SEG_MAX,
            virtio_blk::VIRTIO_BLK_F_BLK_SIZE,
            virtio_blk::VIRTIO_BLK_F_TOPOLOGY,
            virtio_blk::VIRTIO_BLK_F_FLUSH,
            virtio_blk::VIRTIO_BLK_F_CONFIG_WCE,
        ];
        if self.vrings.len() > 1 {
            bits.push(virtio_blk::VIRTIO_BLK_F_MQ);
        }
        if self.disk.image.read_only() {
            bits.push(virtio_blk::VIRTIO_BLK_F_RO);
        }
        let device = bits.iter().fold(0, |bits, bit| bits | 1_u64 << bit);
        device
            | VIRTIO_F_VERSION_1
            | VIRTIO_F_INDIRECT_DESC
            | VIRTIO_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn negotiated(&self) -> Negotiated {
        Negotiated {
            disk: Arc::clone(&self.disk),
            event_idx: self.acked_features & VIRTIO_F_EVENT_IDX != 0,
            indirect: self.acked_features & VIRTIO_F_INDIRECT_DESC != 0,
        }
    }

    // Virtio 1.2, 5.2.6.2: without FLUSH the driver has no way to make writes durable, so each
    // one is; CONFIG_WCE lets it choose the same with FLUSH.
    fn apply_cache_mode(&self) {
        let flush = self.acked_features & VIRTIO_BLK_F_FLUSH != 0;
        let switchable = self.acked_features & VIRTIO_BLK_F_CONFIG_WCE != 0;
        let write_back = flush && (self.writeback || !switchable);
        self.disk
            .write_through
            .store(!write_back, Ordering::Release);
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.vrings.get_mut(index).ok_or(Error::InvalidParam)
    }

    // Changes a queue that may be running: in-flight requests complete first.
    fn reconfigure(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        let vring = self.vring(index)?;
        vring.pause();
        change(vring);
        self.start_ready_queues()
    }

    // Replaces the guest's memory: every request in flight on the old one completes first.
    fn change_memory(
        &mut self,
        change: impl FnOnce(&mut MemoryTable) -> std::result::Result<(), guest_memory::MemoryError>,
    ) -> Result<()> {
        let mut table = self.table.clone();
        change(&mut table).map_err(reject)?;
        for vring in &mut self.vrings {
            vring.pause();
        }
        self.memory = table.guest_memory();
        self.table = table;
        tracing::debug!(
            bytes = self.memory.as_deref().map_or(0, guest_memory::total_bytes),
            "guest memory changed"
        );
        self.start_ready_queues()
    }

    fn start_ready_queues(&mut self) -> Result<()> {
        let negotiated = self.negotiated();
        for vring in &mut self.vrings {
            vring
                .start_if_ready(&self.table, self.memory.as_ref(), &negotiated)
                .map_err(reject)?;
        }
        Ok(())
    }
}

impl Drop for BlockBackend {
    fn drop(&mut self) {
        self.stop();
    }
}

fn reject(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn describe(region: &VhostUserMemoryRegion) -> RegionDescription {
    RegionDescription {
        guest_address: region.guest_phys_addr,
        size: region.memory_size,
        frontend_address: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for BlockBackend {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(Error::InvalidOperation("the session is owned already"));
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop();
        self.owned = false;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("RESET_DEVICE isn't offered"))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered_features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered_features();
        if unknown != 0 {
            return Err(reject(io::Error::other(format!(
                "features {unknown:#x} were acknowledged but never offered"
            ))));
        }
        for vring in &mut self.vrings {
            vring.pause();
        }
        self.acked_features = features;
        self.apply_cache_mode();
        // Without protocol features there is no SET_VRING_ENABLE, and queues start enabled.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for vring in &mut self.vrings {
                vring.enabled = true;
            }
        }
        self.start_ready_queues()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.change_memory(|table| {
            *table = MemoryTable::default();
            regions
                .iter()
                .zip(files)
                .try_for_each(|(region, file)| table.add(describe(region), file))
        })?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= self.max_queue_size);
        let Some(size) = size else {
            return Err(reject(io::Error::other(format!(
                "queue {index} can't have {num} descriptors: a power of two up to {} can",
                self.max_queue_size
            ))));
        };
        self.reconfigure(index, |vring| vring.size = Some(size))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        if flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG) {
            return Err(Error::InvalidOperation("dirty logging isn't offered"));
        }
        self.reconfigure(index, |vring| {
            vring.addresses = Some(RingAddresses {
                descriptor_table: descriptor,
                available_ring: available,
                used_ring: used,
            });
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.reconfigure(index, |vring| vring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.vring(index)?.stop();
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let Some(kick) = fd else {
            return Err(Error::InvalidOperation("a queue without a kick eventfd"));
        };
        self.reconfigure(u32::from(index), |vring| vring.kick = Some(Arc::new(kick)))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(u32::from(index))?;
        vring.call.replace(fd).map_err(Error::ReqHandlerError)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.reconfigure(u32::from(index), |vring| vring.error = fd.map(Arc::new))
    }

    // INFLIGHT_SHMFD, RESET_DEVICE, STATUS and LOG_SHMFD join here with crash-safe restart.
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.get_protocol_features()?.bits();
        if unknown != 0 {
            return Err(reject(io::Error::other(format!(
                "protocol features {unknown:#x} were acknowledged but never offered"
            ))));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.reconfigure(index, |vring| vring.enabled = enable)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let queues = u16::try_from(self.vrings.len()).unwrap_or(u16::MAX);
        let image = &self.disk.image;
        let space = config_space::config_space(image, queues, self.max_queue_size, self.writeback);
        let start = (offset as usize).min(CONFIG_SPACE_SIZE);
        let end = start.saturating_add(size as usize);
        let part = space.get(start..end).ok_or(Error::InvalidParam)?;
        Ok(part.to_vec())
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let switchable = self.acked_features & VIRTIO_BLK_F_CONFIG_WCE != 0;
        match buf {
            [writeback @ (0 | 1)] if offset == WRITEBACK_OFFSET && switchable => {
                self.writeback = *writeback == 1;
                self.apply_cache_mode();
                if self.writeback {
                    return Ok(());
                }
                // What was written under write-back has to become durable with the switch.
                self.disk.image.sync().map_err(Error::ReqHandlerError)
            }
            _ => {
                // A driver's mistake, not the frontend's: no reason to take its disk away.
                tracing::warn!(
                    offset,
                    len = buf.len(),
                    "ignoring a write to a read-only field"
                );
                Ok(())
            }
        }
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("this is no GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("SHARED_OBJECT isn't offered"))
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("INFLIGHT_SHMFD isn't offered"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("INFLIGHT_SHMFD isn't offered"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let description = describe(region);
        self.change_memory(|table| table.add(description, fd))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let description = describe(region);
        self.change_memory(|table| table.remove(description))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("DEVICE_STATE isn't offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("DEVICE_STATE isn't offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("SHMEM isn't offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("LOG_SHMFD isn't offered"))
    }
}
