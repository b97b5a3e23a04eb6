//! MSI-X (PCI Local Bus 3.0, 6.8.2): the table, the pending bits, and their eventfds.
//!
//! A device signals a *source* (a queue, or the configuration) by writing its eventfd. While the
//! vector that the guest chose for the source is unmasked, KVM turns that write into the vector's
//! message without this process (irqfd). While it is masked, the write stays in the eventfd, which
//! is what the pending bit shows, and unmasking delivers it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::error::VmmError;
use crate::interrupts::{InterruptRouter, Message};

/// The vector of a source that signals nothing (virtio 1.2, 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
/// The capability's id.
pub const CAPABILITY_ID: u8 = 0x11;
/// Bytes of a table entry.
pub const ENTRY_BYTES: usize = 16;
/// The bits of the message control register that the guest may write.
pub const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// Offset of the vector control word in an entry, whose bit 0 masks it.
const VECTOR_CONTROL: usize = 12;

/// One function's vectors and sources.
#[derive(Debug)]
pub struct Msix {
    router: Arc<InterruptRouter>,
    first_gsi: u32,
    entries: Vec<[u8; ENTRY_BYTES]>,
    sources: Vec<Source>,
    /// Enabled, and the function not masked.
    delivering: bool,
}

/// A function's vectors as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<[u8; ENTRY_BYTES]>,
    vectors: Vec<u16>,
}

#[derive(Debug)]
struct Source {
    event: EventFd,
    vector: u16,
    connected: Option<u32>,
}

impl Msix {
    /// As many vectors, all masked, as there are sources.
    pub fn new(router: Arc<InterruptRouter>, events: Vec<EventFd>) -> Result<Self, VmmError> {
        let count = u16::try_from(events.len()).unwrap_or(u16::MAX);
        let first_gsi = router.allocate(count)?;
        let mut masked = [0; ENTRY_BYTES];
        masked[VECTOR_CONTROL] = 1;
        let source = |event| Source {
            event,
            vector: NO_VECTOR,
            connected: None,
        };
        Ok(Self {
            router,
            first_gsi,
            entries: vec![masked; events.len()],
            sources: events.into_iter().map(source).collect(),
            delivering: false,
        })
    }

    /// The number of vectors.
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.entries.len()).unwrap_or(u16::MAX)
    }

    /// The guest wrote the message control register.
    pub fn set_control(&mut self, control: u16) {
        let delivering = control & CONTROL_ENABLE != 0 && control & CONTROL_FUNCTION_MASK == 0;
        if delivering != self.delivering {
            self.delivering = delivering;
            self.update(|_| true);
        }
    }

    /// The vector of source `index`.
    pub fn vector(&self, index: usize) -> u16 {
        self.sources
            .get(index)
            .map_or(NO_VECTOR, |source| source.vector)
    }

    /// Chooses the vector of source `index`; one that doesn't exist becomes [`NO_VECTOR`].
    pub fn set_vector(&mut self, index: usize, vector: u16) {
        let exists = usize::from(vector) < self.entries.len();
        if let Some(source) = self.sources.get_mut(index) {
            source.vector = if exists { vector } else { NO_VECTOR };
        }
        self.update(|i| i == index);
    }

    /// Forgets all vectors and pending signals, as a reset of the device does.
    pub fn reset_sources(&mut self) {
        for source in &mut self.sources {
            source.vector = NO_VECTOR;
        }
        self.update(|_| true);
        for source in &self.sources {
            // Says EAGAIN if nothing is pending.
            let _ = source.event.read();
        }
    }

    /// The table, and each source's vector.
    pub fn save(&self) -> MsixState {
        MsixState {
            entries: self.entries.clone(),
            vectors: self.sources.iter().map(|source| source.vector).collect(),
        }
    }

    /// Takes what [`Self::save`] gave and the message control register, and connects the sources.
    pub fn restore(&mut self, state: &MsixState, control: u16) -> Result<(), String> {
        if state.entries.len() != self.entries.len() || state.vectors.len() != self.sources.len() {
            return Err("it has another number of interrupt vectors".to_owned());
        }
        for (entry, saved) in (0u64..).zip(&state.entries) {
            self.table_write(entry * ENTRY_BYTES as u64, saved);
        }
        for (index, vector) in state.vectors.iter().enumerate() {
            self.set_vector(index, *vector);
        }
        self.set_control(control);
        Ok(())
    }

    /// Reads the table, which has [`Self::vectors`] entries.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, position) in data.iter_mut().zip(offset..) {
            let (entry, within) = split(position, ENTRY_BYTES);
            *byte = self.entries.get(entry).map_or(0, |entry| entry[within]);
        }
    }

    /// Writes the table.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        for (value, position) in data.iter().zip(offset..) {
            let (entry, within) = split(position, ENTRY_BYTES);
            if let Some(entry) = self.entries.get_mut(entry) {
                // Of the vector control word only the mask bit exists.
                entry[within] = match within {
                    VECTOR_CONTROL => value & 1,
                    13..=15 => 0,
                    _ => *value,
                };
            }
        }
        let (first, _) = split(offset, ENTRY_BYTES);
        let (last, _) = split(offset + data.len().saturating_sub(1) as u64, ENTRY_BYTES);
        let changed: Vec<bool> = self
            .sources
            .iter()
            .map(|s| (first..=last).contains(&usize::from(s.vector)))
            .collect();
        self.update(|index| changed.get(index).copied().unwrap_or(false));
    }

    /// Reads the pending bits.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, position) in data.iter_mut().zip(offset..) {
            *byte = (0..8u64)
                .filter(|bit| self.is_pending(position.saturating_mul(8).saturating_add(*bit)))
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    fn is_pending(&self, vector: u64) -> bool {
        self.sources.iter().any(|source| {
            u64::from(source.vector) == vector
                && source.connected.is_none()
                && is_readable(&source.event)
        })
    }

    /// Connects or disconnects the sources that `which` selects, as their vectors say now.
    fn update(&mut self, which: impl Fn(usize) -> bool) {
        for index in 0..self.sources.len() {
            if which(index)
                && let Err(e) = self.update_source(index)
            {
                tracing::warn!("an interrupt of a PCI device can't be routed: {e}");
            }
        }
    }

    fn update_source(&mut self, index: usize) -> Result<(), kvm_ioctls::Error> {
        let Some(source) = self.sources.get_mut(index) else {
            return Ok(());
        };
        let entry = self.entries.get(usize::from(source.vector));
        let unmasked = entry.filter(|entry| self.delivering && entry[VECTOR_CONTROL] & 1 == 0);
        let wanted = unmasked.map(|_| self.first_gsi + u32::from(source.vector));
        if let (Some(entry), Some(gsi)) = (unmasked, wanted) {
            self.router.set_message(gsi, message_of(entry))?;
        }
        if source.connected == wanted {
            return Ok(());
        }
        if let Some(gsi) = source.connected.take() {
            self.router.disconnect(&source.event, gsi)?;
        }
        if let Some(gsi) = wanted {
            self.router.connect(&source.event, gsi)?;
            source.connected = Some(gsi);
        }
        Ok(())
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        for source in &mut self.sources {
            if let Some(gsi) = source.connected.take()
                && let Err(e) = self.router.disconnect(&source.event, gsi)
            {
                tracing::debug!("an interrupt of a PCI device can't be disconnected: {e}");
            }
        }
        self.router.release(self.first_gsi);
    }
}

fn message_of(entry: &[u8; ENTRY_BYTES]) -> Message {
    let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = *entry;
    Message {
        address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        data: u32::from_le_bytes([d0, d1, d2, d3]),
    }
}

fn split(position: u64, size: usize) -> (usize, usize) {
    let position = usize::try_from(position).unwrap_or(usize::MAX);
    (position / size, position % size)
}

fn is_readable(event: &EventFd) -> bool {
    let mut fd = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, which lives through the call.
    let ready = unsafe { libc::poll(&raw mut fd, 1, 0) };
    if ready < 0 {
        tracing::debug!("poll: {}", io::Error::last_os_error());
    }
    ready > 0 && fd.revents & libc::POLLIN != 0
}
