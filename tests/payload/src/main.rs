//! Keelson's payload guest: a small freestanding program that a VMM starts by the 64-bit Linux boot
//! protocol and that drives the virtio devices itself. It boots in a few milliseconds, has no kernel in
//! the way, can break every rule of the virtio specification on purpose, and runs on a paravirtual KVM
//! that no stock kernel survives.
//!
//! # How it is built and started
//!
//! `cargo build --release` in this folder gives a static ELF for `x86_64-unknown-linux-gnu`, linked at
//! 2 MiB, which a VMM loads as it loads a `vmlinux`. What to do is on the kernel command line, after
//! `--`: the steps, separated by blanks and taken in order, each `name` or `name:key=value,key=value`.
//! ```text
//! console=ttyS0 -- hello blk-write:seed=7,sectors=4096 blk-verify:seed=7,sectors=4096
//! ```
//!
//! # What it says
//!
//! Lines on COM1, each beginning `payload: `. `payload: start …` is the first, then one for each step,
//! `payload: <step> ok key=value …` or `payload: FAIL step=<step> reason=<sentence>`, and
//! `payload: done passed=N failed=N` before it powers the machine off through ACPI S5. After a failed
//! step the rest is left out. `payload: FAULT …` and `payload: PANIC …` are defects of the payload.
//!
//! # Steps
//!
//! [`steps`] lists them with their arguments.
//!
//! # Two rings
//!
//! On a paravirtual KVM (`kvm_pvm`) ring 0 is emulated, slow and incomplete, ring 3 is native. So
//! `ring0.s` does only what needs ring 0 (tables, port I/O, HLT, counting interrupts), and everything
//! else runs in ring 3 and asks for those services by a `ud2` ([`supervisor`]). Device registers are
//! accessed by plain integer `mov`s alone ([`mmio`]), which every instruction emulator knows.

#![no_std]
#![no_main]

mod acpi;
mod address_space;
mod arguments;
mod boot;
mod clock;
mod console;
mod error;
mod interrupts;
mod intrinsics;
mod memory;
mod mmio;
mod net;
mod pci;
mod steps;
mod supervisor;
mod virtio;

use crate::boot::BootParameters;
use crate::console::say;
use core::panic::PanicInfo;

/// Where ring 3 begins, with the address of the zero page as the boot protocol gives it.
#[unsafe(no_mangle)]
extern "C" fn payload_main(zero_page: u64) -> ! {
    // SAFETY: the boot protocol gives the zero page in rsi, and ring0.s hands it on unchanged.
    let boot = unsafe { BootParameters::new(zero_page) };
    interrupts::install();
    clock::start();
    steps::run(&boot);
    supervisor::stop()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("PANIC {}", info);
    supervisor::stop()
}
