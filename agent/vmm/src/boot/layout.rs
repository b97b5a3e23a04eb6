//! The guest's physical address map.
//!
//! ```text
//! 0x0000_0000  RAM: GDT, zero page, page tables, command line below 0x9_fc00
//! 0x000e_0000  ACPI tables (RSDP first), where firmware would have them
//! 0x000f_fff0  the reset vector
//! 0x0010_0000  RAM: kernel, initrd at the top
//! 0xc000_0000  PCI 32-bit memory window
//! 0xe000_0000  PCI ECAM
//! 0xfec0_0000  I/O APIC, and above it the local APIC and KVM's own pages
//! 0x1_0000_0000  RAM beyond 3 GiB
//! ```

/// End of the RAM below the legacy hole (the BIOS data area's start on a PC).
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The global descriptor table.
pub const GDT: u64 = 0x500;
/// `struct boot_params`, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// The first stack; the kernel sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The page map level 4; its tables follow.
pub const PML4: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The ACPI tables, starting with the RSDP.
pub const ACPI: u64 = 0xe_0000;
/// End of the ACPI tables' space.
pub const ACPI_END: u64 = 0xf_0000;
/// The VM generation ID, 16 bytes, in memory that the guest leaves alone.
pub const GENERATION_ID: u64 = ACPI_END;
/// The real-mode reset vector f000:fff0.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where extended memory starts.
pub const HIGH_RAM: u64 = 0x10_0000;

/// The hole below 4 GiB.
pub const HOLE: u64 = 0xc000_0000;
/// The end of the hole below 4 GiB.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// The window in which PCI devices have their memory BARs.
pub const PCI_WINDOW: u64 = HOLE;
/// Bytes of [`PCI_WINDOW`].
pub const PCI_WINDOW_SIZE: u64 = 0x2000_0000;
/// The memory-mapped configuration space of PCI segment 0, bus 0.
pub const ECAM: u64 = 0xe000_0000;
/// Bytes of [`ECAM`]: 1 MiB a bus, one bus.
pub const ECAM_SIZE: u64 = 1 << 20;

/// The I/O APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that KVM on Intel uses for real-mode page tables.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM on Intel uses for the real-mode task state.
pub const TSS: usize = 0xfffb_d000;

/// The guest's RAM as ranges of (address, bytes): split by the hole if it is larger than 3 GiB.
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= HOLE {
        vec![(0, size)]
    } else {
        vec![(0, HOLE), (HOLE_END, size - HOLE)]
    }
}

/// The ACPI sleep control register (FADT, hardware-reduced), one I/O port.
pub const PORT_SLEEP_CONTROL: u16 = 0x600;
/// The ACPI sleep status register, one I/O port.
pub const PORT_SLEEP_STATUS: u16 = 0x601;
/// The generic event device's pending events, one I/O port; reading clears them.
pub const PORT_EVENTS: u16 = 0x602;
/// Which PCI slots have something new in them, a bit for each: one I/O port of 32 bits; reading clears
/// it.
pub const PORT_PCI_INSERTED: u16 = 0x610;
/// What of the PCI slots the guest is asked to let go of, in the same way.
pub const PORT_PCI_REMOVAL: u16 = 0x614;
/// Written with the bits of the PCI slots that the guest has let go of.
pub const PORT_PCI_EJECT: u16 = 0x618;
/// The first serial port's eight I/O ports.
pub const PORT_COM1: u16 = 0x3f8;
/// The reset control register of PC chipsets, which FADT names as its reset register.
pub const PORT_RESET: u16 = 0xcf9;
/// What [`PORT_RESET`] must be written for a full reset.
pub const RESET_VALUE: u8 = 0x06;

/// The global system interrupt of COM1.
pub const GSI_COM1: u32 = 4;
/// The global system interrupt of the generic event device.
pub const GSI_EVENTS: u32 = 5;
/// Inputs of the I/O APIC; message-signalled interrupts have the numbers from here.
pub const IO_APIC_PINS: u32 = 24;

/// SLP_TYP of the soft-off state S5, in `\_S5` and in the sleep control register.
pub const SLEEP_TYPE_S5: u8 = 5;
/// The power button's bit of [`PORT_EVENTS`].
pub const EVENT_POWER_BUTTON: u8 = 1;
/// The bit of [`PORT_EVENTS`] that says that [`GENERATION_ID`] has changed.
pub const EVENT_GENERATION: u8 = 2;
/// The bit of [`PORT_EVENTS`] that says that [`PORT_PCI_INSERTED`] or [`PORT_PCI_REMOVAL`] has news.
pub const EVENT_PCI: u8 = 4;
