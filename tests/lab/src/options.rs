use std::path::PathBuf;
use std::time::Duration;

/// A file, or a folder with all below it, that is in the lab's root file system when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileCopy {
    /// On this machine.
    pub from: PathBuf,
    /// In the lab, absolute.
    pub to: PathBuf,
}

impl std::str::FromStr for FileCopy {
    type Err = String;

    /// `SRC:DST`, as on the command line.
    fn from_str(text: &str) -> Result<Self, String> {
        let (from, to) = text
            .rsplit_once(':')
            .filter(|(from, to)| !from.is_empty() && to.starts_with('/'))
            .ok_or_else(|| format!("{text:?} is not SRC:DST with an absolute DST"))?;
        Ok(Self {
            from: from.into(),
            to: to.into(),
        })
    }
}

/// What a lab is made of. `LabOptions::default()` is a lab that serves most tests.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Series of the lab's own kernel: `6.12` (has TCX) or `6.1` (clsact only).
    pub kernel: String,
    /// Memory of the lab, in MiB; at least 512.
    pub memory_mib: u32,
    /// Emulated processors, 1 to 16. Each is a thread of QEMU. Two do more, but now and then lose an interrupt
    /// between them while KVM is at work, after which a guest or the lab may stand still: 1, by default.
    pub cpus: u8,
    /// Size of the root disk, in MiB; a sparse file.
    pub disk_mib: u64,
    /// Files put into the root file system beforehand.
    pub files: Vec<FileCopy>,
    /// Programs of this machine, by name or path, to have in the lab with the libraries they need,
    /// besides [`LabOptions::DEFAULT_TOOLS`].
    pub tools: Vec<String>,
    /// Kernel modules to load beside the usual ones.
    pub modules: Vec<String>,
    /// More words for the lab's kernel command line.
    pub kernel_arguments: Vec<String>,
    /// How long the start may take.
    pub boot_timeout: Duration,
    /// The lab powers itself off after this time, so that a forgotten one does not run forever.
    pub lifetime: Duration,
    /// Where its disk, log and state file are kept; a new temporary folder if `None`.
    pub state_folder: Option<PathBuf>,
    /// Leave the lab running when the [`Lab`](crate::Lab) is dropped, in its own session.
    pub detached: bool,
}

impl LabOptions {
    /// What every lab has: the shell, and network and file system tools whose busybox versions are not enough.
    pub const DEFAULT_TOOLS: &[&str] = &[
        "dash",
        "ip",
        "tc",
        "mke2fs",
        "mkfs.ext4",
        "e2fsck",
        "debugfs",
        "dumpe2fs",
        "tune2fs",
        "resize2fs",
    ];
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            kernel: "6.12".to_owned(),
            memory_mib: 2048,
            cpus: 1,
            disk_mib: 8192,
            files: Vec::new(),
            tools: Vec::new(),
            modules: Vec::new(),
            kernel_arguments: Vec::new(),
            boot_timeout: Duration::from_mins(2),
            lifetime: Duration::from_hours(2),
            state_folder: None,
            detached: false,
        }
    }
}
