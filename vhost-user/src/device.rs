//! One frontend's block device: what it negotiated, its memory and its queues.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::{Error, Result, VhostUserVirtioFeatures};
use virtio_bindings::bindings::{virtio_blk, virtio_config, virtio_ring};
use vm_memory::GuestMemoryMmap;

use crate::config_space::{self, CONFIG_SPACE_SIZE};
use crate::dirty_log::DirtyLog;
use crate::disk::Disk;
use crate::guest_memory::{self, MemoryError, MemoryTable};
use crate::inflight_region::InflightMemory;
use crate::metrics::QueueMetrics;
use crate::vring::{Negotiated, Vring};
use crate::worker::WorkerPool;

const VIRTIO_F_VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
const VIRTIO_F_INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
const VIRTIO_F_EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
const VHOST_F_LOG_ALL: u64 = 1 << 26;
const VIRTIO_BLK_F_FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
const VIRTIO_BLK_F_CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

/// One frontend's device: its memory, its queues, and what it negotiated.
#[derive(Debug)]
pub struct VirtioBlock {
    disk: Arc<Disk>,
    workers: Arc<WorkerPool>,
    max_queue_size: u16,
    inflight: Option<Arc<InflightMemory>>,
    dirty_log: Option<Arc<DirtyLog>>,
    acked_features: u64,
    writeback: bool,
    table: MemoryTable,
    memory: Option<Arc<GuestMemoryMmap>>,
    vrings: Vec<Vring>,
}

impl VirtioBlock {
    /// A device that no frontend has talked to. There is one queue for each of the counters.
    pub fn new(
        disk: Arc<Disk>,
        workers: Arc<WorkerPool>,
        max_queue_size: u16,
        metrics: &[Arc<QueueMetrics>],
    ) -> Self {
        disk.write_through.store(true, Ordering::Release);
        let vrings = metrics.iter().enumerate();
        Self {
            disk,
            workers,
            max_queue_size,
            inflight: None,
            dirty_log: None,
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

    pub(crate) fn offered_features(&self) -> u64 {
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
        let properties = self.disk.properties();
        if properties.read_only {
            bits.push(virtio_blk::VIRTIO_BLK_F_RO);
        }
        if properties.discard {
            bits.push(virtio_blk::VIRTIO_BLK_F_DISCARD);
            bits.push(virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES);
        }
        let device = bits.iter().fold(0, |bits, bit| bits | 1_u64 << bit);
        device
            | VIRTIO_F_VERSION_1
            | VIRTIO_F_INDIRECT_DESC
            | VIRTIO_F_EVENT_IDX
            | VHOST_F_LOG_ALL
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn negotiated(&self) -> Negotiated {
        Negotiated {
            disk: Arc::clone(&self.disk),
            event_idx: self.acked_features & VIRTIO_F_EVENT_IDX != 0,
            indirect: self.acked_features & VIRTIO_F_INDIRECT_DESC != 0,
            inflight: self.inflight.clone(),
            dirty_log: self
                .dirty_log
                .clone()
                .filter(|_| self.acked_features & VHOST_F_LOG_ALL != 0),
            workers: Arc::clone(&self.workers),
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

    /// Takes what the driver acknowledged. Running queues go on with it.
    pub(crate) fn acknowledge_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered_features();
        if unknown != 0 {
            return Err(reject(io::Error::other(format!(
                "features {unknown:#x} were acknowledged but never offered"
            ))));
        }
        self.pause();
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

    /// The number of queues.
    pub(crate) fn queues(&self) -> usize {
        self.vrings.len()
    }

    /// The most descriptors in a queue.
    pub(crate) fn max_queue_size(&self) -> u16 {
        self.max_queue_size
    }

    /// The configuration space now.
    pub(crate) fn config_space(&self) -> [u8; CONFIG_SPACE_SIZE] {
        let queues = u16::try_from(self.vrings.len()).unwrap_or(u16::MAX);
        // Virtio 1.2, 5.2.5.2: with CONFIG_WCE and without FLUSH the cache is off.
        let flush = self.acked_features & VIRTIO_BLK_F_FLUSH != 0;
        let writeback = self.writeback && (flush || !self.cache_is_switchable());
        config_space::config_space(&self.disk, queues, self.max_queue_size, writeback)
    }

    /// Whether the driver may switch the write cache.
    pub(crate) fn cache_is_switchable(&self) -> bool {
        self.acked_features & VIRTIO_BLK_F_CONFIG_WCE != 0
    }

    /// Switches the write cache. What was written under write-back becomes durable with
    /// switching it off.
    pub(crate) fn set_writeback(&mut self, writeback: bool) -> Result<()> {
        self.writeback = writeback;
        self.apply_cache_mode();
        if writeback {
            return Ok(());
        }
        self.disk.device().sync().map_err(Error::ReqHandlerError)
    }

    /// Forgets the driver, as after a reset of the device: its queues stop, and what it
    /// negotiated is void. Memory and the connection stay.
    pub(crate) fn reset(&mut self) {
        for vring in &mut self.vrings {
            vring.stop();
            vring.enabled = false;
            vring.base = 0;
        }
        self.acked_features = 0;
        self.writeback = true;
        self.inflight = None;
        self.apply_cache_mode();
    }

    /// Notes what is in flight in this memory from now on, and goes on with what is noted there.
    pub(crate) fn set_inflight(&mut self, memory: Arc<InflightMemory>) -> Result<()> {
        self.pause();
        self.inflight = Some(memory);
        self.start_ready_queues()
    }

    /// Logs written pages there, once the frontend asks for it with `VHOST_F_LOG_ALL`.
    pub(crate) fn set_dirty_log(&mut self, log: DirtyLog) -> Result<()> {
        self.pause();
        self.dirty_log = Some(Arc::new(log));
        self.start_ready_queues()
    }

    /// What migrates with the guest beside its memory and the rings: the cache mode.
    pub(crate) fn writeback(&self) -> bool {
        self.writeback
    }

    /// Does something while no request is in flight; then the queues go on.
    pub(crate) fn while_paused(&mut self, act: impl FnOnce()) -> Result<()> {
        self.pause();
        act();
        self.start_ready_queues()
    }

    fn pause(&mut self) {
        for vring in &mut self.vrings {
            vring.pause();
        }
    }

    pub(crate) fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.vrings.get_mut(index).ok_or(Error::InvalidParam)
    }

    // Changes a queue that may be running: in-flight requests complete first.
    pub(crate) fn reconfigure(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Vring),
    ) -> Result<()> {
        let vring = self.vring(index)?;
        vring.pause();
        change(vring);
        self.start_ready_queues()
    }

    // Replaces the guest's memory: every request in flight on the old one completes first.
    pub(crate) fn change_memory(
        &mut self,
        change: impl FnOnce(&mut MemoryTable) -> std::result::Result<(), MemoryError>,
    ) -> Result<()> {
        let mut table = self.table.clone();
        change(&mut table).map_err(reject)?;
        self.pause();
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

impl Drop for VirtioBlock {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(crate) fn reject(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}
