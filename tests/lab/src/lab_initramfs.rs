use std::path::Path;

use crate::error::file;
use crate::initramfs::Initramfs;
use crate::modules::ModuleIndex;
use crate::tool::libraries_of;
use crate::{KernelFiles, LabError, LabOptions};

/// What the lab's init loads before its root disk is there, and after.
const EARLY_MODULES: &[&str] = &["virtio_mmio", "virtio_blk"];
const LATE_MODULES: &[&str] = &[
    "virtio_net",
    "virtio_rng",
    "kvm_amd",
    "tun",
    "bridge",
    "veth",
    "vhost_net",
    "sch_ingress",
    "cls_bpf",
    "loop",
    "dm_mod",
];

/// The archive that the lab's kernel starts from: only what mounts the root disk.
pub(crate) fn lab_initramfs(
    options: &LabOptions,
    kernel: &KernelFiles,
    init: &Path,
    token: &str,
) -> Result<Vec<u8>, LabError> {
    let index = ModuleIndex::read(kernel)?;
    let late: Vec<&str> = LATE_MODULES
        .iter()
        .copied()
        .chain(options.modules.iter().map(String::as_str))
        .collect();
    let mut initramfs = Initramfs::default();
    initramfs.copy(init, "init", 0o755)?;
    for library in libraries_of(init)? {
        initramfs.copy(&library, &library.to_string_lossy(), 0o755)?;
    }
    let put = |initramfs: &mut Initramfs, path: &str, mode, content: &[u8]| {
        initramfs
            .file(path, mode, content)
            .map_err(file("pack", Path::new("initramfs")))
    };
    let mut names = String::new();
    for (number, path) in index.load_order(EARLY_MODULES)?.iter().enumerate() {
        let name = format!("modules/{number:02}.ko");
        initramfs.copy(path, &name, 0o644)?;
        names.push_str(&name);
        names.push('\n');
    }
    put(&mut initramfs, "early", 0o644, names.as_bytes())?;
    let mut late_paths = String::new();
    for path in index.load_order(&late)? {
        let path = path
            .strip_prefix(&kernel.modules)
            .unwrap_or(&path)
            .to_string_lossy();
        late_paths.extend([
            &path, "
",
        ]);
    }
    put(&mut initramfs, "late", 0o644, late_paths.as_bytes())?;
    put(&mut initramfs, "token", 0o400, token.as_bytes())?;
    for folder in ["dev", "proc", "root", "sys"] {
        initramfs
            .folder(folder)
            .map_err(file("pack", Path::new(folder)))?;
    }
    initramfs
        .finish()
        .map_err(file("pack", Path::new("initramfs")))
}
