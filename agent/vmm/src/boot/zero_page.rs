//! The zero page (`struct boot_params`) and the command line.

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::initrd::LoadedInitrd;
use super::kernel::LoadedKernel;
use super::{BootError, layout};
use crate::memory::Ram;

/// A boot loader without an assigned id.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Writes the zero page and the command line.
pub(super) fn write(
    memory: &Ram,
    kernel: &LoadedKernel,
    initrd: Option<LoadedInitrd>,
    command_line: &str,
    rsdp: u64,
) -> Result<(), BootError> {
    write_command_line(memory, command_line)?;
    let mut params = boot_params {
        hdr: kernel.header,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = to_u32(layout::COMMAND_LINE);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.address;
        params.hdr.ramdisk_size = initrd.size;
    }
    for (index, (address, size, kind)) in e820(memory).into_iter().enumerate() {
        params.e820_table[index] = boot_e820_entry {
            addr: address,
            size,
            r#type: kind,
        };
        params.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::ZERO_PAGE)),
        memory,
    )
    .map_err(|e| BootError::Layout {
        what: "zero page",
        message: e.to_string(),
    })
}

/// The memory map: RAM with holes for the legacy area, and what of the address space is ours.
fn e820(memory: &Ram) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::ACPI, layout::HIGH_RAM - layout::ACPI, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_RAM);
        map.push((
            start,
            region.start_addr().0 + region.len() - start,
            E820_RAM,
        ));
    }
    // Linux takes the ECAM of the MCFG table early only if the memory map reserves it.
    map.push((layout::ECAM, layout::ECAM_SIZE, E820_RESERVED));
    map
}

fn write_command_line(memory: &Ram, command_line: &str) -> Result<(), BootError> {
    let mut bytes = command_line.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
        .map_err(BootError::layout("command line"))
}

fn to_u32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}
