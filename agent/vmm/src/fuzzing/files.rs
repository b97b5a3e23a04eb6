//! Files: kernels, configurations, snapshots.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::boot::acpi::AcpiConfig;
use crate::boot::{self, BootFiles};
use crate::config::GuestConfig;
use crate::snapshot::{SnapshotState, format};

const MEMORY: usize = 32 << 20;

/// A kernel, and an initrd: refused, or loaded with an entry point in memory.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn kernel(input: &[u8]) {
    let Some((split, files)) = input.split_first_chunk::<3>() else {
        return;
    };
    let [kind, low, high] = *split;
    let at = usize::from(u16::from_le_bytes([low, high])).min(files.len());
    let (image, initrd) = files.split_at(at);
    let image = match kind % 3 {
        0 => elf(image),
        1 => bz_image(image),
        _ => image.to_vec(),
    };
    let ranges = [(GuestAddress(0), MEMORY)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).expect("a mapping");
    let files = BootFiles::of(file(&image), (kind & 0x80 != 0).then(|| file(initrd)));
    let config: GuestConfig = serde_json::from_str(
        r#"{"name":"a","vcpus":3,"memory":{"size_mib":32},"kernel":{"image":"k"},
            "console":{"socket":"s","log":"l"}}"#,
    )
    .expect("a configuration");
    let acpi = AcpiConfig {
        vcpus: config.vcpus,
        topology: config.cpu.topology(config.vcpus),
        fixed_slots: 0,
    };
    if let Ok(entry) = boot::load(&memory, &files, "console=ttyS0", acpi) {
        assert!(entry.instruction_pointer < MEMORY as u64);
    }
}

/// An ELF for x86-64 with one program header behind the ELF header, whose fields are `content`.
fn elf(content: &[u8]) -> Vec<u8> {
    const HEADER_BYTES: u8 = 64;
    let mut image = vec![0; usize::from(HEADER_BYTES)];
    image.extend_from_slice(content);
    image.resize(image.len().max(256), 0);
    patch(&mut image, 0, b"\x7fELF\x02\x01\x01");
    // e_type, e_machine and e_version; e_phoff; e_ehsize, e_phentsize and e_phnum.
    patch(&mut image, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    patch(&mut image, 32, &[HEADER_BYTES]);
    patch(&mut image, 52, &[HEADER_BYTES, 0, 56, 0, 1, 0]);
    // The entry point is where what was loaded begins, more or less.
    patch(
        &mut image,
        24,
        &[content.first().copied().unwrap_or(0), 0, 0x10],
    );
    // PT_LOAD, with a place and sizes of three bytes each, which are near enough to what fits.
    patch(&mut image, 64, &[1, 0, 0, 0]);
    for field in [72, 80, 88, 96, 104] {
        patch(&mut image, field + 3, &[0; 5]);
    }
    image
}

/// A bzImage whose setup header is `content`, with the marks that are looked for.
fn bz_image(content: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x1f1];
    image.extend_from_slice(content);
    image.resize(image.len().max(0x1000), 0);
    // Few setup sectors, little code; XLF_KERNEL_64.
    let small = |byte: u8| byte & 3;
    let (sectors, paragraphs) = (small(image[0x1f1]), small(image[0x1f4]));
    patch(&mut image, 0x1f1, &[sectors]);
    patch(&mut image, 0x1f4, &[paragraphs, 0, 0, 0]);
    patch(&mut image, 0x202, b"HdrS\x0c\x02");
    let flags = image[0x236] | 1;
    patch(&mut image, 0x236, &[flags]);
    image
}

fn patch(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

fn file(content: &[u8]) -> File {
    let memfd = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
    let mut file = File::from(memfd);
    file.write_all(content).expect("memory");
    file
}

/// A configuration: refused, or one that the machine's tables can be made of.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn config(input: &[u8]) {
    let Ok(config) = GuestConfig::parse(input, Path::new("guest.json")) else {
        return;
    };
    let topology = config.cpu.topology(config.vcpus);
    for index in 0..config.vcpus {
        let _ = topology.apic_id(index);
    }
    let again = serde_json::to_vec(&config).expect("a configuration is JSON");
    let parsed = GuestConfig::parse(&again, Path::new("guest.json"));
    assert_eq!(parsed.ok().as_ref(), Some(&config));
}

/// A snapshot's state: any bytes, and any body behind a valid header, are refused or are a state that
/// is consistent in itself.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn snapshot(input: &[u8]) {
    let _ = SnapshotState::decode(input);
    let file = format::with_header(input);
    if let Ok(state) = SnapshotState::decode(&file) {
        assert!(state.config().is_ok());
    }
}
