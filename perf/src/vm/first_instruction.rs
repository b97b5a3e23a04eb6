//! A kernel of a few instructions, which says on COM1 that it runs, makes exits, and says that they are
//! made: for the boot protocol that keelson-vmm uses for an ELF (64-bit, at the ELF's entry) and for
//! QEMU's (PVH, 32-bit, at the entry of a note). The instructions mean the same in both modes.

/// What it writes to COM1 first.
pub const SIGN: u8 = b'!';
/// What it writes to COM1 after the exits. Firmware doesn't.
pub const END: u8 = b'~';
/// Exits between the two: reads of a port that nothing answers.
pub const EXITS: u32 = 10_000;

const ADDRESS: u64 = 0x20_0000;
const CODE_OFFSET: u64 = 0x1000;

/// The ELF file.
pub fn image() -> Vec<u8> {
    let [e0, e1, e2, e3] = EXITS.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, 0xf8, 0x03,     // mov dx, 0x3f8
        0xb0, SIGN,                 // mov al, SIGN
        0xee,                       // out dx, al
        0xb9, e0, e1, e2, e3,       // mov ecx, EXITS
        0x66, 0xba, 0xed, 0x00,     // mov dx, 0xed
        0xec,                       // in al, dx
        0xe2, 0xfd,                 // loop to the in
        0x66, 0xba, 0xf8, 0x03,     // mov dx, 0x3f8
        0xb0, END,                  // mov al, END
        0xee,                       // out dx, al
        0xfa,                       // cli
        0xf4,                       // hlt
        0xeb, 0xfc,                 // jmp to the cli
    ];
    let note = pvh_note();
    let note_offset = CODE_OFFSET + 0x100;
    let mut file = Vec::new();
    // The ELF header: 64-bit, little-endian, executable, x86-64.
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    file.extend_from_slice(&ADDRESS.to_le_bytes());
    file.extend_from_slice(&64u64.to_le_bytes());
    file.extend_from_slice(&0u64.to_le_bytes());
    file.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    let length = 0x200;
    file.extend_from_slice(&program_header(1, 7, CODE_OFFSET, ADDRESS, length, 0x1000));
    let size = note.len() as u64;
    file.extend_from_slice(&program_header(4, 4, note_offset, ADDRESS + 0x100, size, 4));
    file.resize(usize::try_from(CODE_OFFSET).unwrap_or(0), 0);
    file.extend_from_slice(&code);
    file.resize(usize::try_from(note_offset).unwrap_or(0), 0);
    file.extend_from_slice(&note);
    file.resize(usize::try_from(CODE_OFFSET + length).unwrap_or(0), 0);
    file
}

fn program_header(
    kind: u32,
    flags: u32,
    offset: u64,
    address: u64,
    size: u64,
    align: u64,
) -> Vec<u8> {
    let mut header = Vec::with_capacity(56);
    header.extend_from_slice(&kind.to_le_bytes());
    header.extend_from_slice(&flags.to_le_bytes());
    for word in [offset, address, address, size, size, align] {
        header.extend_from_slice(&word.to_le_bytes());
    }
    header
}

/// `XEN_ELFNOTE_PHYS32_ENTRY` (xen/include/public/elfnote.h).
fn pvh_note() -> Vec<u8> {
    const PHYS32_ENTRY: u32 = 18;
    let mut note = Vec::new();
    for word in [4u32, 4, PHYS32_ENTRY] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    let entry = u32::try_from(ADDRESS).unwrap_or(0);
    note.extend_from_slice(&entry.to_le_bytes());
    note
}
