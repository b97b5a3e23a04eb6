//! A guest's accesses to ports, configuration space and device registers, in any order.

use std::sync::PoisonError;

use vm_memory::{Bytes, GuestAddress};

use super::bench::{Bench, FREE_SLOTS, WATCHDOG_SLOT, bar};
use super::input::Input;
use super::rings;
use crate::boot::layout;
use crate::vcpu::ExitHandler;
use crate::virtio::{FunctionState, VirtioPci};

/// What is there from the start, and stays.
const FIXED_SLOTS: u8 = WATCHDOG_SLOT + 1;
const SLOTS: u8 = *FREE_SLOTS.end() + 1;
/// Bytes of the configuration space from its start that no guest can change: vendor and device.
const IDENTITY: usize = 4;
/// More accesses reach nothing new.
const MAX_ACCESSES: usize = 400;

/// Does what `input` says, access for access; the functions keep their identities, and answer still.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn platform(input: &[u8]) {
    let bench = Bench::new();
    let before = identities(&bench);
    // As firmware leaves it: memory decoded, bus master.
    for slot in 0..FIXED_SLOTS {
        bench.platform.mmio_write(ecam(slot, 4), &[6, 0]);
    }
    accesses(&bench, &mut Input(input));
    assert_eq!(identities(&bench), before);
}

/// Takes a function's state from a snapshot, and goes on from there.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn function_state(input: &[u8]) {
    let bench = Bench::new();
    let mut input = Input(input);
    let device = usize::from(input.byte());
    let function = &bench.virtio[device % bench.virtio.len()];
    let mut locked = function.lock().unwrap_or_else(PoisonError::into_inner);
    // The state that the function has now, with some bytes changed, is more often one than any bytes.
    let mut state = postcard::to_allocvec(&locked.save()).expect("a state");
    for _ in 0..input.byte() % 16 {
        let (at, value) = (usize::from(input.half()), input.byte());
        let at = at % state.len();
        state[at] = value;
    }
    if let Ok(state) = postcard::from_bytes::<FunctionState>(&state)
        && locked.restore(&state).is_ok()
    {
        drop(locked);
        rings::fill_queue(&bench.memory, 0, &mut input);
        rings::fill_buffers(&bench.memory, &mut input);
        let mut locked = function.lock().unwrap_or_else(PoisonError::into_inner);
        locked.resume();
        let _ = locked.pause();
        let saved = locked.save();
        drop(locked);
        assert!(postcard::to_allocvec(&saved).is_ok());
        bench.platform.pci.restore(0);
        accesses(&bench, &mut input);
    }
}

fn accesses(bench: &Bench, input: &mut Input<'_>) {
    for _ in 0..MAX_ACCESSES {
        if input.is_empty() {
            return;
        }
        access(bench, input);
    }
}

fn access(bench: &Bench, input: &mut Input<'_>) {
    let platform = &bench.platform;
    let kind = input.byte();
    let size = 1 << (kind >> 6);
    let slot = input.byte() % SLOTS;
    match kind & 15 {
        0..=3 => {
            let address = u64::from(bar(slot)) + register(input.byte(), input.byte());
            let value = input.array::<8>();
            platform.mmio_write(address, &value[..size]);
        }
        4 => {
            let address = u64::from(bar(slot)) + register(input.byte(), input.byte());
            platform.mmio_read(address, &mut [0; 8][..size]);
        }
        5 | 6 => {
            let value = input.array::<8>();
            let offset = u64::from(input.half());
            platform.mmio_write(ecam(slot, offset & 0xff), &value[..size]);
        }
        7 => {
            let offset = u64::from(input.half());
            platform.mmio_read(ecam(slot, offset & 0xfff), &mut [0; 8][..size]);
        }
        8 => {
            let value = input.array::<4>();
            // Ends of the guest are ends of this input only.
            let _ = platform.io_write(port(input), &value[..size.min(4)]);
        }
        9 => platform.io_read(port(input), &mut [0; 8][..size]),
        10 => platform.mmio_write(input.word().into(), &input.array::<8>()[..size]),
        11 => platform.mmio_read(input.word().into(), &mut [0; 8][..size]),
        12 => {
            let (place, value) = (u64::from(input.half()) % rings::MEMORY, input.long());
            let _ = bench.memory.write_obj(value, GuestAddress(place));
        }
        13 if input.byte() & 1 == 1 => hotplug(bench, input),
        13 => rings::fill_queue(&bench.memory, u16::from(input.byte() % 5), input),
        _ => drive(bench, slot, input),
    }
}

/// The host adds a device or asks for one back; the guest lets go of what it likes.
fn hotplug(bench: &Bench, input: &mut Input<'_>) {
    let choice = input.byte();
    let count = FREE_SLOTS.end() + 1 - FREE_SLOTS.start();
    let slot = FREE_SLOTS.start() + choice % count;
    match choice >> 6 {
        0 => bench.plug(slot),
        1 => bench.platform.hotplug.ask(slot),
        _ => {
            let asked = bench.platform.hotplug.leaving();
            let gone = || bench.gone.lock().unwrap_or_else(PoisonError::into_inner);
            // What other accesses let go of was asked for then.
            gone().clear();
            let _ = bench
                .platform
                .io_write(layout::PORT_PCI_EJECT, &input.array::<4>());
            assert!(gone().iter().all(|slot| asked.contains(slot)));
        }
    }
}

/// Brings a virtio function to life as its driver does, with the queues where the rings are.
fn drive(bench: &Bench, slot: u8, input: &mut Input<'_>) {
    let write = |offset: u64, value: &[u8]| {
        bench
            .platform
            .mmio_write(u64::from(bar(slot)) + offset, value);
    };
    write(0x14, &[0]);
    write(0x14, &[3]);
    let features: [u8; 4] = input.array();
    write(0x08, &0u32.to_le_bytes());
    write(0x0c, &features);
    write(0x08, &1u32.to_le_bytes());
    write(0x0c, &1u32.to_le_bytes());
    write(0x14, &[11]);
    for index in 0..5u16 {
        let layout = rings::layout(index);
        write(0x16, &index.to_le_bytes());
        write(0x18, &layout.size.to_le_bytes());
        write(0x1a, &index.to_le_bytes());
        write(0x20, &layout.descriptors.to_le_bytes());
        write(0x28, &layout.available.to_le_bytes());
        write(0x30, &layout.used.to_le_bytes());
        write(0x1c, &1u16.to_le_bytes());
    }
    write(0x14, &[15]);
}

/// A register of BAR 0: in one of its pages, near the page's start.
fn register(page: u8, offset: u8) -> u64 {
    let within = u64::from(offset & 0x7f);
    (u64::from(page % 8) * 0x1000 + within) % u64::from(VirtioPci::BAR_BYTES)
}

fn port(input: &mut Input<'_>) -> u16 {
    let near = u16::from(input.byte());
    match near >> 5 {
        0 => layout::PORT_COM1 + (near & 7),
        1 | 2 => 0xcf8 + (near & 7),
        3 => 0x70 + (near & 1),
        4 => layout::PORT_SLEEP_CONTROL + (near & 31),
        5 => 0x64,
        _ => input.half(),
    }
}

fn ecam(slot: u8, offset: u64) -> u64 {
    layout::ECAM + (u64::from(slot) << 15) + offset
}

fn identities(bench: &Bench) -> Vec<[u8; IDENTITY]> {
    let read = |slot| {
        let mut bytes = [0; IDENTITY];
        bench.platform.mmio_read(ecam(slot, 0), &mut bytes);
        bytes
    };
    (0..FIXED_SLOTS).map(read).collect()
}
