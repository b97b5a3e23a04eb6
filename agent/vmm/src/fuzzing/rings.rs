//! Virtqueues in a small guest memory, laid out from few bytes, so that what matters is reached soon.

use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::input::Input;
use crate::memory::GuestMemory;
use crate::virtio::{Activation, ActiveQueue, DeviceHealth, QueueLayout};

/// Bytes of memory, in two regions.
pub const MEMORY: u64 = 0x2_0000;
/// Bytes between two queues' rings.
const STRIDE: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Where an indirect table, and buffers' contents are.
const INDIRECT: u64 = 0x8000;
const BUFFERS: u64 = 0x9000;
const ENTRIES: u16 = 8;

/// Zeroed memory.
pub fn memory() -> GuestMemory {
    let half = usize::try_from(MEMORY / 2).unwrap_or(0);
    let ranges = [(GuestAddress(0), half), (GuestAddress(MEMORY / 2), half)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges);
    Arc::new(memory.expect("a small mapping"))
}

/// Where queue `index` is.
pub fn layout(index: u16) -> QueueLayout {
    let base = u64::from(index) * STRIDE;
    QueueLayout {
        size: ENTRIES,
        descriptors: base,
        available: base + AVAILABLE,
        used: base + USED,
    }
}

/// An event, which nobody waits for.
pub fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

/// Fills a queue: eight descriptors, up to eight available heads.
pub fn fill_queue(memory: &GuestMemory, index: u16, input: &mut Input<'_>) {
    let layout = layout(index);
    for entry in 0..u64::from(ENTRIES) {
        descriptor(memory, layout.descriptors + entry * 16, input);
    }
    let mut available = vec![0; 2];
    // Mostly as many as there are heads; sometimes more than the queue has.
    available.extend_from_slice(&u16::from(input.byte() % 16).to_le_bytes());
    for _ in 0..ENTRIES {
        available.extend_from_slice(&u16::from(input.byte() % 12).to_le_bytes());
    }
    let _ = memory.write(&available, GuestAddress(layout.available));
}

/// Fills the indirect table, and with the rest the buffers.
pub fn fill_buffers(memory: &GuestMemory, input: &mut Input<'_>) {
    for entry in 0..8 {
        descriptor(memory, INDIRECT + entry * 16, input);
    }
    let _ = memory.write(input.0, GuestAddress(BUFFERS));
}

fn descriptor(memory: &GuestMemory, at: u64, input: &mut Input<'_>) {
    let [low, high, length, scale, flags, next, wild] = input.array();
    let place = u64::from(u16::from_le_bytes([low, high]));
    let address = match wild {
        // Outside, across the end of memory, across the end of addresses.
        248..251 => place << 40,
        251..254 => MEMORY - place % 64,
        254.. => u64::MAX - place,
        // Within the contents, or a table.
        0..64 => BUFFERS + place % 0x400,
        64..96 => INDIRECT + place % 8 * 16,
        _ => place % MEMORY,
    };
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend_from_slice(&(u32::from(length) << (scale % 26)).to_le_bytes());
    bytes.extend_from_slice(&u16::from(flags & 7).to_le_bytes());
    bytes.extend_from_slice(&u16::from(next % 10).to_le_bytes());
    let _ = memory.write(&bytes, GuestAddress(at));
}

/// What a device gets from a driver that took `features` and enabled the first `queues` queues.
pub fn activation(memory: &GuestMemory, queues: u16, features: u64, resumed: bool) -> Activation {
    let queues = (0..queues).map(|index| ActiveQueue {
        index,
        layout: layout(index),
        kick: event(),
        call: event(),
    });
    Activation {
        memory: Arc::clone(memory),
        features,
        queues: queues.collect(),
        health: DeviceHealth::of(event()),
        resumed,
    }
}
