//! What ring 3 asks of the ring-0 stub.

use core::arch::global_asm;

global_asm!(include_str!("ring0.s"));

unsafe extern "C" {
    /// Raises the `ud2` that the stub answers; the numbers are the order of `services` in `ring0.s`.
    fn supervisor_call(service: u64, first: u64, second: u64) -> u64;
}

const CONSOLE_WRITE: u64 = 0;
const WAIT: u64 = 1;
const OUT8: u64 = 2;
const OUT16: u64 = 3;
const OUT32: u64 = 4;
const IN8: u64 = 5;
const IN16: u64 = 6;
const IN32: u64 = 7;
const TRIPLE_FAULT: u64 = 8;
const STOP: u64 = 9;
const READ_MSR: u64 = 10;
const WRITE_MSR: u64 = 11;

/// The width of a port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Word,
    /// 32 bits.
    Long,
}

/// Writes bytes to COM1 without looking at its line status: KVM's UARTs are always ready.
pub fn console_write(bytes: &[u8]) {
    // SAFETY: the stub only reads the slice.
    unsafe { supervisor_call(CONSOLE_WRITE, bytes.as_ptr() as u64, bytes.len() as u64) };
}

/// Halts the processor until the interrupt counter at `counter` is no longer `seen`. An interrupt that
/// comes between the caller's look at the counter and this call is not lost: the stub looks again with
/// interrupts off.
pub fn wait_while(counter: *const u64, seen: u64) {
    // SAFETY: the stub only reads the counter, which its own interrupt handler changes.
    unsafe { supervisor_call(WAIT, counter as u64, seen) };
}

/// Writes the low bits of `value` to a port.
pub fn port_out(port: u16, value: u32, width: Width) {
    let service = match width {
        Width::Byte => OUT8,
        Width::Word => OUT16,
        Width::Long => OUT32,
    };
    // SAFETY: port output can't touch this program's memory: no device here does DMA on a port write.
    unsafe { supervisor_call(service, u64::from(port), u64::from(value)) };
}

/// Reads a port.
pub fn port_in(port: u16, width: Width) -> u32 {
    let service = match width {
        Width::Byte => IN8,
        Width::Word => IN16,
        Width::Long => IN32,
    };
    // SAFETY: reading a port touches no memory.
    let value = unsafe { supervisor_call(service, u64::from(port), 0) };
    (value & 0xffff_ffff) as u32
}

/// Reads a model-specific register; `None` if the processor has none of this number.
pub fn read_msr(register: u32) -> Option<u64> {
    let mut value = 0_u64;
    let place = (&raw mut value) as u64;
    // SAFETY: the stub writes the value's eight bytes.
    let refused = unsafe { supervisor_call(READ_MSR, u64::from(register), place) };
    (refused == 0).then_some(value)
}

/// Writes a model-specific register; returns whether the processor took it.
///
/// # Safety
/// Some registers make the processor access memory, or move it.
pub unsafe fn write_msr(register: u32, value: u64) -> bool {
    // SAFETY: the caller's.
    let refused = unsafe { supervisor_call(WRITE_MSR, u64::from(register), value) };
    refused == 0
}

/// Resets the processor by a fault that can't be delivered.
pub fn triple_fault() -> ! {
    // SAFETY: the service doesn't return.
    unsafe { supervisor_call(TRIPLE_FAULT, 0, 0) };
    stop()
}

/// Halts with interrupts off, for ever.
pub fn stop() -> ! {
    loop {
        // SAFETY: the service touches nothing.
        unsafe { supervisor_call(STOP, 0, 0) };
    }
}
