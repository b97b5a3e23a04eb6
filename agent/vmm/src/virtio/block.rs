//! A disk (virtio 1.2, 5.2) that a vhost-user backend serves.
//!
//! This process only sets the connection up: the backend maps the guest's memory and serves the
//! virtqueues, whose kick and call eventfds it shares with KVM.

mod backend;
mod dirty_log;
mod link;
mod watcher;

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Activation, ActivationError, VirtioDevice};
use crate::config::DiskConfig;
use crate::migration::DiskIdentity;
use crate::snapshot::SnapshotError;

use backend::{CONFIG_BYTES, CONFIG_WRITEBACK};

pub use backend::BackendError;
pub use dirty_log::DirtyLog;
pub use link::DiskLink;
pub use watcher::{DiskEvent, DiskWatcher};

/// A disk as the guest's driver sees it.
pub struct Block {
    link: Arc<DiskLink>,
    queue_sizes: Vec<u16>,
}

impl Block {
    /// Connects to the backend.
    pub fn connect(config: &DiskConfig) -> Result<Self, BackendError> {
        let queue_sizes = vec![config.queue_size; usize::from(config.queues)];
        Ok(Self {
            link: Arc::new(DiskLink::connect(config)?),
            queue_sizes,
        })
    }

    /// A disk that the driver knows from the host that it came from. Its backend is connected when the
    /// guest goes on.
    pub fn apart(config: &DiskConfig, identity: &DiskIdentity) -> Result<Self, SnapshotError> {
        let config_space = <[u8; CONFIG_BYTES]>::try_from(identity.config_space.as_slice());
        let config_space = config_space.map_err(|_| SnapshotError::Device {
            device: config.id.clone(),
            reason: "its configuration space has another size".to_owned(),
        })?;
        Ok(Self {
            link: Arc::new(DiskLink::apart(config, identity.features, config_space)),
            queue_sizes: vec![config.queue_size; usize::from(config.queues)],
        })
    }

    /// The connection, for the [`DiskWatcher`].
    pub fn link(&self) -> Arc<DiskLink> {
        Arc::clone(&self.link)
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.link.features()
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data
            .iter_mut()
            .zip(self.link.config_space().iter().skip(start))
        {
            *byte = *value;
        }
    }

    fn config_generation(&self) -> u8 {
        self.link.config_generation()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The write cache's switch is the one field that a driver may write (virtio 1.2, 5.2.5).
        if let (Ok(CONFIG_WRITEBACK), [writeback @ (0 | 1)]) = (usize::try_from(offset), data) {
            self.link.set_writeback(*writeback);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        self.link.activate(activation)
    }

    fn reset(&mut self) {
        self.link.deactivate();
    }

    fn pause(&mut self) -> Result<(), String> {
        self.link.pause()
    }

    fn save(&self) -> Vec<u8> {
        self.link.config_space().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), String> {
        let known = self.link.config_space();
        let same = state.len() == known.len()
            && (0..known.len()).all(|at| at == CONFIG_WRITEBACK || state[at] == known[at]);
        if same {
            self.link.set_writeback(state[CONFIG_WRITEBACK]);
            return Ok(());
        }
        Err("its backend serves a disk of another size or kind than the snapshot's".to_owned())
    }
}
