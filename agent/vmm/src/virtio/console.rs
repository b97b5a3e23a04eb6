//! The console device (virtio 1.2, 5.3): one port, whose size the driver is told, and emergency writes.
//!
//! What the guest prints is taken on the vCPU that notifies, since drivers wait for it (Linux's holds a
//! lock meanwhile). What is typed is given to the guest by the thread that reads it. Neither needs a
//! thread of its own, and neither waits: output that nobody takes fast enough is dropped and counted.

mod port;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{
    Activation, ActivationError, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1,
    VirtioDevice,
};

pub use port::{ConsolePort, ConsoleSize};

/// `VIRTIO_CONSOLE_F_SIZE` and `VIRTIO_CONSOLE_F_EMERG_WRITE` (5.3.3).
const FEATURE_SIZE: u64 = 1 << 0;
const FEATURE_EMERGENCY_WRITE: u64 = 1 << 2;

/// To the guest, from the guest (5.3.2).
const QUEUE_SIZES: [u16; 2] = [64, 64];
const RECEIVE: u16 = 0;
/// `struct virtio_console_config` (5.3.4): columns, rows, ports, emergency write.
const CONFIG_BYTES: usize = 12;
const EMERGENCY_WRITE: u64 = 8;

/// The console as the guest's driver sees it.
pub struct Console {
    port: Arc<ConsolePort>,
}

/// What a snapshot keeps of a console.
#[derive(Debug, Serialize, Deserialize)]
struct ConsoleState {
    columns: u16,
    rows: u16,
}

impl Console {
    /// The guest's side of `port`.
    pub const fn new(port: Arc<ConsolePort>) -> Self {
        Self { port }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1
            | FEATURE_EVENT_IDX
            | FEATURE_INDIRECT
            | FEATURE_SIZE
            | FEATURE_EMERGENCY_WRITE
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let size = self.port.size();
        let mut config = [0; CONFIG_BYTES];
        config[..2].copy_from_slice(&size.columns.to_le_bytes());
        config[2..4].copy_from_slice(&size.rows.to_le_bytes());
        config[4] = 1;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn config_generation(&self) -> u8 {
        self.port.generation()
    }

    /// A character that is printed without any queue, by a driver or before there is one (5.3.4).
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (EMERGENCY_WRITE, Some(character)) = (offset, data.first()) {
            self.port.print(std::slice::from_ref(character));
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        self.port.connect(activation)
    }

    fn reset(&mut self) {
        self.port.disconnect();
    }

    fn save(&self) -> Vec<u8> {
        let ConsoleSize { columns, rows } = self.port.size();
        // Two numbers can't fail to be encoded.
        postcard::to_allocvec(&ConsoleState { columns, rows }).unwrap_or_default()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), String> {
        let state: ConsoleState = postcard::from_bytes(state).map_err(|e| e.to_string())?;
        self.port.resize(ConsoleSize {
            columns: state.columns,
            rows: state.rows,
        });
        Ok(())
    }

    fn handles_notifications(&self, _index: u16) -> bool {
        true
    }

    fn notify(&mut self, index: u16) {
        match index {
            RECEIVE => self.port.buffers_given(),
            _ => self.port.take_output(),
        }
    }
}
