//! The state in which the 64-bit entry point is entered: long mode, flat segments, and the first
//! 4 GiB identity-mapped by 2 MiB pages.

use kvm_bindings::{kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, layout};
use crate::memory::Ram;

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
const GIGABYTES: u64 = 4;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
/// Linux doesn't care; a payload guest runs its drivers in ring 3 on the same tables.
const USER: u64 = 1 << 2;
const PAGE_SIZE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// `__BOOT_CS` and `__BOOT_DS` of the boot protocol, and a task state segment, which VMX demands.
const CODE: Descriptor = Descriptor {
    selector: 0x10,
    kind: 0xb,
    long: true,
    base_flags: 0xaf9b,
};
const DATA: Descriptor = Descriptor {
    selector: 0x18,
    kind: 0x3,
    long: false,
    base_flags: 0xcf93,
};
const TASK: Descriptor = Descriptor {
    selector: 0x20,
    kind: 0xb,
    long: false,
    base_flags: 0x008b,
};

/// A flat segment: base 0, limit 4 GiB.
#[derive(Clone, Copy)]
struct Descriptor {
    selector: u16,
    /// The four type bits (Intel SDM volume 3, 3.4.5.1).
    kind: u8,
    long: bool,
    /// Descriptor bits 40 to 55: access byte, limit bits 16 to 19, and flags.
    base_flags: u64,
}

impl Descriptor {
    const fn table_entry(self) -> u64 {
        (self.base_flags << 40) | 0xffff
    }

    fn segment(self) -> kvm_segment {
        let system = self.selector == TASK.selector;
        kvm_segment {
            base: 0,
            limit: if system { 0x67 } else { 0xffff_ffff },
            selector: self.selector,
            type_: self.kind,
            present: 1,
            dpl: 0,
            db: u8::from(!self.long && !system),
            s: u8::from(!system),
            l: u8::from(self.long),
            g: u8::from(!system),
            avl: 0,
            unusable: 0,
            padding: 0,
        }
    }
}

/// Writes the GDT and the page tables.
pub(super) fn write_tables(memory: &Ram) -> Result<(), BootError> {
    let gdt = [
        0,
        0,
        CODE.table_entry(),
        DATA.table_entry(),
        TASK.table_entry(),
        0,
    ];
    for (address, entry) in (layout::GDT..).step_by(8).zip(gdt) {
        memory
            .write_obj(entry, GuestAddress(address))
            .map_err(BootError::layout("GDT"))?;
    }
    write_page_tables(memory).map_err(BootError::layout("page tables"))
}

fn write_page_tables(memory: &Ram) -> Result<(), vm_memory::GuestMemoryError> {
    let table = PRESENT | WRITABLE | USER;
    let pdpt = layout::PML4 + PAGE;
    let directories = pdpt + PAGE;
    memory.write_obj(pdpt | table, GuestAddress(layout::PML4))?;
    for gigabyte in 0..GIGABYTES {
        let directory = directories + gigabyte * PAGE;
        memory.write_obj(directory | table, GuestAddress(pdpt + gigabyte * 8))?;
        let mut entries = Vec::with_capacity(4096);
        for index in 0..ENTRIES {
            let page = (gigabyte * ENTRIES + index) * HUGE_PAGE;
            entries.extend_from_slice(&(page | table | PAGE_SIZE).to_le_bytes());
        }
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}

/// Changes `sregs` to long mode on the tables that [`super::load`] wrote.
pub fn configure_segments_and_paging(sregs: &mut kvm_sregs) {
    sregs.cs = CODE.segment();
    let data = DATA.segment();
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = TASK.segment();
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 6 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
}
