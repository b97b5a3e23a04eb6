//! The vhost-user messages of one frontend, and the queues that it sets up with them.
//!
//! Message framing, sizes and descriptors are checked by the crate `vhost`; here is what they
//! mean for this device. An error ends the connection: a frontend that didn't ask for replies
//! has no other way to learn of it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde::{Deserialize, Serialize};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
};

use crate::config_space::{CONFIG_SPACE_SIZE, WRITEBACK_OFFSET};
use crate::device::{VirtioBlock, reject};
use crate::dirty_log::DirtyLog;
use crate::guest_memory::{MAX_REGIONS, MemoryTable, RegionDescription};
use crate::inflight_region::InflightMemory;
use crate::vring::RingAddresses;

/// Answers one frontend's messages.
#[derive(Debug)]
pub struct BlockBackend {
    device: VirtioBlock,
    owned: bool,
    protocol: VhostUserProtocolFeatures,
    status: u8,
    /// Where the state of a guest that migrates to here will come from.
    incoming: Option<File>,
}

impl BlockBackend {
    /// For a device that no frontend has talked to.
    pub fn new(device: VirtioBlock) -> Self {
        Self {
            device,
            owned: false,
            protocol: VhostUserProtocolFeatures::empty(),
            status: 0,
            incoming: None,
        }
    }

    /// Does something while no request is in flight.
    pub(crate) fn while_paused(&mut self, act: impl FnOnce()) -> Result<()> {
        self.device.while_paused(act)
    }

    /// Completes what is in flight and stops all queues.
    pub fn stop(&mut self) {
        self.device.stop();
    }

    /// Whether the frontend has acknowledged a protocol feature.
    pub(crate) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    /// The device status as the frontend has set it (virtio 1.2, 2.1).
    pub(crate) fn status(&self) -> u8 {
        self.status
    }

    /// Takes the driver's device status. 0 resets the device.
    pub(crate) fn set_status(&mut self, status: u8) {
        self.status = status;
        if status == 0 {
            self.device.reset();
        }
    }
}

/// The most bytes of another backend's state that are read.
const MAX_STATE_BYTES: u64 = 4096;

// Beside its memory and rings, a guest's disk has one bit of state.
#[derive(Debug, Serialize, Deserialize)]
struct DeviceState {
    writeback: bool,
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
        self.device.stop();
        self.owned = false;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.status = 0;
        self.device.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.offered_features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.device.acknowledge_features(features)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.device.change_memory(|table| {
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
            .filter(|size| size.is_power_of_two() && *size <= self.device.max_queue_size());
        let Some(size) = size else {
            return Err(reject(io::Error::other(format!(
                "queue {index} can't have {num} descriptors: a power of two up to {} can",
                self.device.max_queue_size()
            ))));
        };
        self.device
            .reconfigure(index, |vring| vring.size = Some(size))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        self.device.reconfigure(index, |vring| {
            vring.addresses = Some(RingAddresses {
                descriptor_table: descriptor,
                available_ring: available,
                used_ring: used,
                used_log: logged.then_some(log),
            });
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.device.reconfigure(index, |vring| vring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.device.vring(index)?.stop();
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let Some(kick) = fd else {
            return Err(Error::InvalidOperation("a queue without a kick eventfd"));
        };
        self.device
            .reconfigure(u32::from(index), |vring| vring.kick = Some(Arc::new(kick)))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.device.vring(u32::from(index))?;
        vring.call.replace(fd).map_err(Error::ReqHandlerError)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.device
            .reconfigure(u32::from(index), |vring| vring.error = fd.map(Arc::new))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::STATUS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::DEVICE_STATE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.get_protocol_features()?.bits();
        if unknown != 0 {
            return Err(reject(io::Error::other(format!(
                "protocol features {unknown:#x} were acknowledged but never offered"
            ))));
        }
        self.protocol = VhostUserProtocolFeatures::from_bits_truncate(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.queues() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.device
            .reconfigure(index, |vring| vring.enabled = enable)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let space = self.device.config_space();
        let start = (offset as usize).min(CONFIG_SPACE_SIZE);
        let end = start.saturating_add(size as usize);
        let part = space.get(start..end).ok_or(Error::InvalidParam)?;
        Ok(part.to_vec())
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let switchable = self.device.cache_is_switchable();
        match buf {
            [writeback @ (0 | 1)] if offset == WRITEBACK_OFFSET && switchable => {
                self.device.set_writeback(*writeback == 1)
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
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        if usize::from(queues) > self.device.queues() || size > self.device.max_queue_size() {
            return Err(reject(io::Error::other(format!(
                "no inflight memory for {queues} queues of {size}: there are {} of {}",
                self.device.queues(),
                self.device.max_queue_size()
            ))));
        }
        let (file, bytes) = InflightMemory::create(queues, size).map_err(reject)?;
        Ok((VhostUserInflight::new(bytes, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let (offset, bytes) = (inflight.mmap_offset, inflight.mmap_size);
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let memory = InflightMemory::map(file, offset, bytes, queues, size).map_err(reject)?;
        self.device.set_inflight(memory)
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
        self.device
            .change_memory(|table| table.add(description, fd))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let description = describe(region);
        self.device.change_memory(|table| table.remove(description))
    }

    // The state is small enough for any pipe's buffer, so nothing here waits for the other side.
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        fd: File,
    ) -> Result<Option<File>> {
        let flags = fcntl_getfl(&fd).map_err(reject)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(reject)?;
        if direction == VhostTransferStateDirection::LOAD {
            self.incoming = Some(fd);
            return Ok(None);
        }
        let state = DeviceState {
            writeback: self.device.writeback(),
        };
        let text = serde_json::to_vec(&state).map_err(reject)?;
        (&fd).write_all(&text).map_err(reject)?;
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        let Some(incoming) = self.incoming.take() else {
            return Ok(());
        };
        let mut text = Vec::new();
        let mut limited = incoming.take(MAX_STATE_BYTES);
        limited.read_to_end(&mut text).map_err(reject)?;
        let state: DeviceState = serde_json::from_slice(&text).map_err(reject)?;
        self.device.set_writeback(state.writeback)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("SHMEM isn't offered"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(file, log.mmap_offset, log.mmap_size).map_err(reject)?;
        self.device.set_dirty_log(log)
    }
}
