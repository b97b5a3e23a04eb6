//! Interrupt vectors: the descriptor table, counters, and faults.

use crate::address_space;
use crate::console::say;
use crate::error::Error;
use crate::mmio::Window;
use crate::supervisor;
use core::sync::atomic::{AtomicU8, Ordering};

/// Vectors that ring 0 can deliver: 32 exceptions, interrupts, and the spurious one as the last.
const VECTORS: usize = 128;
const SPURIOUS: u8 = 127;
/// The local APIC timer's vector, the first one after the exceptions.
pub const TIMER: u8 = 32;

const LOCAL_APIC: u64 = 0xfee0_0000;
const APIC_ID: u64 = 0x20;
const SPURIOUS_VECTOR: u64 = 0xf0;
const APIC_ENABLE: u32 = 1 << 8;
/// 64-bit interrupt gate, present, for ring 0 (Intel SDM volume 3, 7.14.1).
const INTERRUPT_GATE: u64 = 0x8e00;
const RING0_CODE: u64 = 0x08;

unsafe extern "C" {
    static vector_handlers: [u64; VECTORS];
    static mut interrupt_descriptors: [[u64; 2]; VECTORS];
    static mut interrupt_counts: [u64; VECTORS];
    static mut interrupt_total: u64;
}

static NEXT_VECTOR: AtomicU8 = AtomicU8::new(TIMER + 1);

/// A vector of the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector {
    number: u8,
    /// Its interrupts before it was taken, by whoever had it then.
    before: u64,
}

impl Vector {
    /// Takes the next free vector, until [`release_vectors`].
    pub fn allocate() -> Result<Self, Error> {
        let number = NEXT_VECTOR.fetch_add(1, Ordering::Relaxed);
        if number >= SPURIOUS {
            return Err(Error::NoVectors);
        }
        let before = handled(number);
        Ok(Self { number, before })
    }

    /// Its number.
    pub fn number(self) -> u8 {
        self.number
    }

    /// How many of its interrupts were handled since it was taken.
    pub fn count(self) -> u64 {
        handled(self.number) - self.before
    }
}

fn handled(vector: u8) -> u64 {
    // SAFETY: only the stub writes to it; no vector that is taken is VECTORS or above.
    unsafe { (&raw const interrupt_counts[usize::from(vector)]).read_volatile() }
}

/// Fills in the interrupt descriptor table, which ring 0 has already loaded, and enables the local APIC.
pub fn install() {
    for vector in 0..VECTORS {
        // SAFETY: both tables have VECTORS entries, and no interrupt can come before the APIC is enabled.
        unsafe {
            let handler = vector_handlers[vector];
            let low = (handler & 0xffff)
                | RING0_CODE << 16
                | INTERRUPT_GATE << 32
                | (handler & 0xffff_0000) << 32;
            (&raw mut interrupt_descriptors[vector]).write_volatile([low, handler >> 32]);
        }
    }
    // The window is whole, so this can't fail.
    let _ = local_apic().write32(SPURIOUS_VECTOR, APIC_ENABLE | u32::from(SPURIOUS));
}

/// Makes all vectors free again. No device may be using one: a step's devices are reset when it ends.
pub fn release_vectors() {
    NEXT_VECTOR.store(TIMER + 1, Ordering::Relaxed);
}

/// All interrupts handled so far.
pub fn total() -> u64 {
    // SAFETY: only the stub writes to it.
    unsafe { (&raw const interrupt_total).read_volatile() }
}

/// Halts until another interrupt than the `seen` ones counted by [`total`] was handled.
pub fn wait_for_more_than(seen: u64) {
    supervisor::wait_while(&raw const interrupt_total, seen);
}

/// The registers of this processor's interrupt controller.
pub fn local_apic() -> Window {
    // SAFETY: the page is in the low 4 GiB, which ring0.s maps, and is the APIC's at reset.
    unsafe { Window::new(LOCAL_APIC, address_space::PAGE_SIZE) }
}

/// Where a device sends an MSI for this processor (Intel SDM volume 3, 11.11.1).
pub fn message_address() -> Result<u64, Error> {
    let id = local_apic().read32(APIC_ID)? >> 24;
    Ok(LOCAL_APIC | u64::from(id) << 12)
}

/// Ring 0 sends every exception here: all of them are defects of this program.
#[unsafe(no_mangle)]
extern "C" fn payload_fault(vector: u64, error: u64, address: u64, page: u64, selector: u64) -> ! {
    say!("FAULT vector={vector} error={error:#x} rip={address:#x} cr2={page:#x} cs={selector:#x}");
    supervisor::stop()
}
