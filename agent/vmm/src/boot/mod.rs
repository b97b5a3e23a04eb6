//! Loading a Linux kernel by the 64-bit boot protocol (Documentation/arch/x86/boot.rst of Linux).
//!
//! Everything here writes guest memory once, before the vCPUs run.

pub mod acpi;
mod initrd;
mod kernel;
pub mod layout;
mod long_mode;
mod reset_vector;
mod zero_page;

use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};

use crate::config::KernelConfig;
use crate::memory::Ram;

pub use long_mode::configure_segments_and_paging;

/// Why the guest can't boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file can't be read.
    #[error("can't read the {what} {path}: {source}")]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("the {what} {path} can't be loaded: {reason}")]
    Invalid {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The tables for the guest don't fit.
    #[error("can't write the guest's boot data ({what}) to its memory: {message}")]
    Layout {
        /// Which table.
        what: &'static str,
        /// What is wrong.
        message: String,
    },
}

impl BootError {
    fn invalid(what: &'static str, path: &Path, reason: impl Into<String>) -> Self {
        Self::Invalid {
            what,
            path: path.into(),
            reason: reason.into(),
        }
    }

    fn layout(what: &'static str) -> impl FnOnce(vm_memory::GuestMemoryError) -> Self {
        move |e| Self::Layout {
            what,
            message: e.to_string(),
        }
    }
}

/// Where the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The guest-physical address of the kernel's 64-bit entry point.
    pub instruction_pointer: u64,
    /// The guest-physical address of `struct boot_params`, which goes into RSI.
    pub zero_page: u64,
}

/// The kernel and the initrd, open: whoever reads them later may not have the rights to open them.
#[derive(Debug)]
pub struct BootFiles {
    kernel: BootFile,
    initrd: Option<BootFile>,
}

/// One of them.
#[derive(Debug)]
struct BootFile {
    what: &'static str,
    path: PathBuf,
    file: File,
    length: u64,
}

impl BootFiles {
    /// Opens both.
    pub fn open(config: &KernelConfig) -> Result<Self, BootError> {
        Ok(Self {
            kernel: BootFile::open("kernel", &config.image)?,
            initrd: match &config.initrd {
                Some(path) => Some(BootFile::open("initrd", path)?),
                None => None,
            },
        })
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl BootFiles {
    /// Files without names.
    pub(crate) fn of(kernel: File, initrd: Option<File>) -> Self {
        let boot_file = |what: &'static str, file: File| BootFile {
            what,
            path: what.into(),
            length: file.metadata().map_or(0, |metadata| metadata.len()),
            file,
        };
        Self {
            kernel: boot_file("kernel", kernel),
            initrd: initrd.map(|initrd| boot_file("initrd", initrd)),
        }
    }
}

impl BootFile {
    /// Opens a regular file.
    fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let read = |source| BootError::Read {
            what,
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(BootError::invalid(what, path, "it is not a regular file"));
        }
        Ok(Self {
            what,
            path: path.into(),
            file,
            length: metadata.len(),
        })
    }

    /// The file from its start, and its size.
    fn rewound(&self) -> Result<(File, u64), BootError> {
        let rewound = self.file.try_clone().and_then(|mut file| {
            file.rewind()?;
            Ok(file)
        });
        let file = rewound.map_err(|source| BootError::Read {
            what: self.what,
            path: self.path.clone(),
            source,
        })?;
        Ok((file, self.length))
    }
}

/// Loads kernel, initrd, command line, ACPI tables, page tables and zero page.
pub fn load(
    memory: &Ram,
    files: &BootFiles,
    command_line: &str,
    acpi: acpi::AcpiConfig,
) -> Result<Entry, BootError> {
    let kernel = kernel::load(memory, &files.kernel)?;
    let initrd = match &files.initrd {
        Some(initrd) => Some(initrd::load(memory, initrd, &kernel)?),
        None => None,
    };
    long_mode::write_tables(memory)?;
    reset_vector::write(memory)?;
    let rsdp = acpi::write_tables(memory, acpi)?;
    zero_page::write(memory, &kernel, initrd, command_line, rsdp)?;
    Ok(Entry {
        instruction_pointer: kernel.entry,
        zero_page: layout::ZERO_PAGE,
    })
}
