//! The real-mode reset vector, the one piece of firmware that a guest uses.
//!
//! Linux on hardware-reduced ACPI takes EFI's reset before ACPI's reset register
//! (`efi_reboot_required` in drivers/firmware/efi/reboot.c), and without EFI falls back to a jump
//! to the PC's reset vector in real mode.

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, layout};
use crate::memory::Ram;

/// Writes code that asks for a reset.
pub(super) fn write(memory: &Ram) -> Result<(), BootError> {
    let [port_low, port_high] = layout::PORT_RESET.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xb0, layout::RESET_VALUE,    // mov al, RESET_VALUE
        0xba, port_low, port_high,    // mov dx, PORT_RESET
        0xee,                         // out dx, al
        0xf4,                         // hlt
        0xeb, 0xfd,                   // jmp to the hlt
    ];
    memory
        .write_slice(&code, GuestAddress(layout::RESET_VECTOR))
        .map_err(BootError::layout("reset vector"))
}
