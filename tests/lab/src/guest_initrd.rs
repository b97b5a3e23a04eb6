//! The initramfs of stock guests: busybox, the drivers that the kernel package has as modules, and
//! an init script.
//!
//! On its console the guest prints `keelson-guest: userspace up after <uptime> s` as the first thing
//! its user space does, and `keelson-guest: ready` before the root shell starts there.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::error::file;
use crate::initramfs::Initramfs;
use crate::kernel::cache_subfolder;
use crate::modules::ModuleIndex;
use crate::tool::{Tool, locate};
use crate::{KernelFiles, LabError};

/// First word of each line that the guest prints about itself.
pub const MARKER: &str = "keelson-guest:";

/// What a guest's devices need: disk, network, entropy, and the ACPI power button.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "button",
    "evdev",
    "ext4",
    "af_packet",
];

/// What further devices need, as far as the kernel has it: in the archive, but loaded only by those who
/// want it, with `load-devices`.
const DEVICE_MODULES: &[&str] = &[
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "pvpanic_pci",
    "i6300esb",
];

const LOAD_DEVICES: &str =
    "#!/bin/sh\nwhile read -r module; do insmod \"$module\"; done </lib/modules/devices\n";
const INIT: &str = include_str!("guest_initrd/init");
const POWER_BUTTON: &str = include_str!("guest_initrd/power-button");

/// Writes the initramfs for a kernel to a file. What it is made of is cached with the kernel.
pub fn write(kernel: &KernelFiles, to: &Path) -> Result<(), LabError> {
    let cached = cached(kernel)?;
    std::fs::copy(&cached, to).map_err(file("write", to))?;
    Ok(())
}

/// The initramfs for a kernel, in the cache: made if it is missing or older than what goes into it.
pub fn cached(kernel: &KernelFiles) -> Result<PathBuf, LabError> {
    let folder = cache_subfolder("guest-initrd")?;
    // A new version of this crate's scripts must not meet an old archive.
    let key = fingerprint(&[
        INIT,
        LOAD_DEVICES,
        POWER_BUTTON,
        &MODULES.join(" "),
        &DEVICE_MODULES.join(" "),
    ]);
    let path = folder.join(format!("{}-{key:016x}.cpio", kernel.release));
    if path.is_file() {
        return Ok(path);
    }
    let archive = build(kernel)?;
    let mut scratch =
        tempfile::NamedTempFile::new_in(&folder).map_err(file("write in", &folder))?;
    std::io::Write::write_all(&mut scratch, &archive).map_err(file("write", &path))?;
    scratch
        .as_file()
        .set_permissions(std::fs::Permissions::from_mode(0o644))
        .map_err(file("write", &path))?;
    scratch
        .persist(&path)
        .map_err(|error| file("write", &path)(error.error))?;
    Ok(path)
}

/// Builds the archive.
pub fn build(kernel: &KernelFiles) -> Result<Vec<u8>, LabError> {
    let mut initramfs = Initramfs::default();
    let busybox = static_busybox()?;
    initramfs.copy(&busybox, "bin/busybox", 0o755)?;
    let index = ModuleIndex::read(kernel)?;
    let at_boot = index.load_order(MODULES)?;
    let mut wanted = DEVICE_MODULES.to_vec();
    wanted.retain(|module| index.has(module));
    let mut later = index.load_order(&wanted)?;
    later.retain(|path| !at_boot.contains(path));
    let (mut load, mut devices) = (String::new(), String::new());
    for (number, path) in at_boot.iter().chain(&later).enumerate() {
        let name = format!("lib/modules/{number:02}.ko");
        initramfs.copy(path, &name, 0o644)?;
        let list = if number < at_boot.len() {
            &mut load
        } else {
            &mut devices
        };
        list.extend(["/", &name, "\n"]);
    }
    pack(&mut initramfs, &load, &devices).map_err(file("pack", Path::new("initramfs")))?;
    initramfs
        .finish()
        .map_err(file("pack", Path::new("initramfs")))
}

fn pack(initramfs: &mut Initramfs, load: &str, devices: &str) -> std::io::Result<()> {
    for folder in [
        "dev", "proc", "sys", "run", "tmp", "root", "data", "etc", "usr/bin", "usr/sbin", "sbin",
    ] {
        initramfs.folder(folder)?;
    }
    initramfs.file("lib/modules/load", 0o644, load.as_bytes())?;
    initramfs.file("lib/modules/devices", 0o644, devices.as_bytes())?;
    initramfs.file("usr/bin/load-devices", 0o755, LOAD_DEVICES.as_bytes())?;
    initramfs.file("init", 0o755, INIT.as_bytes())?;
    // busybox's acpid runs this for KEY_POWER of an input device.
    initramfs.file("etc/acpi/PWRF/00000080", 0o755, POWER_BUTTON.as_bytes())?;
    initramfs.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    initramfs.file("etc/group", 0o644, b"root:x:0:\n")?;
    initramfs.symlink("bin/sh", "busybox")
}

fn static_busybox() -> Result<PathBuf, LabError> {
    let missing = |reason: String| LabError::ProgramMissing {
        program: "busybox".to_owned(),
        reason,
        remedy: "setup/debian-packages installs busybox-static",
    };
    let path = locate("busybox").ok_or_else(|| missing("not found".to_owned()))?;
    let tool = Tool::find(&path.to_string_lossy())?;
    if tool.libraries.is_empty() {
        return Ok(path);
    }
    Err(missing(format!(
        "{} is not a static program",
        path.display()
    )))
}

/// FNV-1a, 64 bits: a name for a content, not a protection.
fn fingerprint(parts: &[&str]) -> u64 {
    parts
        .iter()
        .flat_map(|part| part.bytes().chain([0]))
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}
