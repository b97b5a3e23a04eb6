//! An overlay on its layers' files: see [`Chain`].
//!
//! What is in one place goes there as it is, on the ring. What needs a stripe brought up, the map
//! changed is rare once a disk is in use, and is done by a few threads of the disk, with ordinary
//! system calls on copies of the data. What is still on a server is fetched by its own threads;
//! requests that need it are put aside meanwhile.

mod channel;
mod job;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use super::crypt::CryptDevice;
use super::file::FileDevice;
use super::{BlockDevice, ChannelContext, IoChannel, Properties};
use crate::Error;
use crate::image::BlockSizes;
use crate::overlay::Chain;
use crate::overlay::chain::SourceCounters;
use crate::overlay::files::OpenOverlay;
use crate::overlay::snapshot;

use channel::OverlayChannel;
use job::Pool;

/// An overlay as a device.
#[derive(Debug)]
pub struct OverlayDevice {
    stack: RwLock<Arc<Stack>>,
    pool: Arc<Pool>,
}

// The layers as they are between two snapshots.
#[derive(Debug)]
struct Stack {
    open: OpenOverlay,
    layers: Vec<Arc<dyn BlockDevice>>,
    raw: Option<Arc<dyn BlockDevice>>,
}

impl Stack {
    fn new(open: OpenOverlay) -> Self {
        let layers = open.images.iter().zip(open.chain.layers());
        let layers = layers.map(|(image, layer)| -> Arc<dyn BlockDevice> {
            let file = Arc::new(FileDevice::new(Arc::clone(image)));
            match layer.cipher() {
                Some(cipher) => {
                    let cipher = Arc::clone(cipher);
                    Arc::new(CryptDevice::new(file, cipher, layer.data_offset()))
                }
                None => file,
            }
        });
        Self {
            layers: layers.collect(),
            raw: open
                .raw
                .clone()
                .map(|image| Arc::new(FileDevice::new(image)) as Arc<dyn BlockDevice>),
            open,
        }
    }
}

impl OverlayDevice {
    /// Of an open overlay.
    pub fn new(open: OpenOverlay) -> Self {
        if let Some(source) = open.chain.source() {
            source.attach(Some(&open.chain));
        }
        Self {
            stack: RwLock::new(Arc::new(Stack::new(open))),
            pool: Arc::default(),
        }
    }

    /// The disk's layers.
    pub fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.stack().open.chain)
    }

    /// Makes what the disk holds now a snapshot, and goes on in a new layer: see
    /// [`snapshot::snapshot`]. Channels have to be closed meanwhile. Returns the snapshot's path.
    pub fn snapshot(&self, name: &str) -> Result<PathBuf, Error> {
        let stack = self.stack();
        let source = stack.open.chain.source();
        // What is being fetched goes to the new layer, or nowhere.
        if let Some(source) = source {
            source.attach(None);
        }
        let made = snapshot::snapshot_open(&stack.open, name);
        if let Some(source) = source {
            let chain = made.as_ref().map(|(_, open)| &open.chain);
            source.attach(Some(chain.unwrap_or(&stack.open.chain)));
        }
        let (snapshot, open) = made?;
        let mut current = self.stack.write().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(Stack::new(open));
        Ok(snapshot)
    }

    /// What was fetched of its base, if that is on a server.
    pub fn source_counters(&self) -> Option<SourceCounters> {
        let chain = self.chain();
        chain.source().map(|source| source.counters())
    }

    fn stack(&self) -> Arc<Stack> {
        Arc::clone(&self.stack.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for OverlayDevice {
    fn drop(&mut self) {
        self.pool.close();
        if let Some(source) = self.chain().source() {
            source.attach(None);
        }
    }
}

impl BlockDevice for OverlayDevice {
    fn properties(&self) -> Properties {
        let stack = self.stack();
        let all = || {
            let devices = stack.layers.iter().chain(&stack.raw);
            devices.map(|device| device.properties())
        };
        let unknown = BlockSizes {
            logical: 512,
            physical: 512,
            optimal: 0,
        };
        let top = stack.layers.first().map(|top| top.properties());
        let mut block_sizes = top.map_or(unknown, |top| top.block_sizes);
        let logical = all().map(|layer| layer.block_sizes.logical).max();
        block_sizes.logical = logical.unwrap_or(512);
        block_sizes.physical = block_sizes.physical.max(block_sizes.logical);
        let read_only = stack.open.scratch || top.is_some_and(|top| top.read_only);
        Properties {
            bytes: stack.open.chain.bytes(),
            block_sizes,
            read_only,
            alignment: all().map(|layer| layer.alignment).max().unwrap_or(512),
            discard: !read_only,
        }
    }

    fn open_channel(&self, context: &mut ChannelContext<'_>) -> io::Result<Box<dyn IoChannel>> {
        let stack = self.stack();
        let mut layers = Vec::new();
        for layer in &stack.layers {
            layers.push(layer.open_channel(context)?);
        }
        let raw = match &stack.raw {
            Some(raw) => Some(raw.open_channel(context)?),
            None => None,
        };
        Ok(Box::new(OverlayChannel::new(
            Arc::clone(&stack.open.chain),
            layers,
            raw,
            Arc::clone(&self.pool),
            context.waker(),
        )))
    }

    fn sync(&self) -> io::Result<()> {
        self.stack().open.chain.flush()
    }

    fn remeasure(&self) -> io::Result<u64> {
        let stack = self.stack();
        if let Some(top) = stack.layers.first() {
            top.remeasure()?;
        }
        Ok(stack.open.chain.bytes())
    }
}
