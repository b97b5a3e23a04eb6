//! What the host has, and whether it can run guests.

use std::fs;
use std::io;

use keelson_api::MemorySize;

use crate::{AgentError, error::Result};

/// What the host has.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// Its name.
    pub hostname: String,
    /// The kernel's release, such as `6.12.0`.
    pub kernel: String,
    /// Processors that are online.
    pub cpus: u32,
    /// All of its memory, in bytes.
    pub memory_bytes: u64,
}

impl Inventory {
    /// Asks the kernel.
    ///
    /// # Errors
    /// [`AgentError::Io`] where /proc/meminfo cannot be read.
    pub fn read(host_name: Option<&str>) -> Result<Self> {
        let uname = rustix::system::uname();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self {
            hostname: host_name.map_or_else(
                || uname.nodename().to_string_lossy().into_owned(),
                str::to_owned,
            ),
            kernel: uname.release().to_string_lossy().into_owned(),
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_bytes: memory_total()?,
        })
    }

    /// The memory as it is written in manifests, rounded down.
    pub fn memory(&self) -> MemorySize {
        MemorySize::from_mib(self.memory_bytes >> 20).unwrap_or_else(|| unreachable!("shifted"))
    }
}

fn memory_total() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").map_err(AgentError::io("read /proc/meminfo"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| AgentError::Host("/proc/meminfo has no MemTotal".into()))
}

/// Finds out by trying whether the host has KVM and io_uring; eBPF is tried by loading it.
///
/// # Errors
/// [`AgentError::Host`] with what is missing and what to do.
pub fn check_abilities() -> Result<()> {
    let kvm = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = kvm {
        return Err(AgentError::Host(match error.kind() {
            io::ErrorKind::NotFound => {
                "there is no /dev/kvm; load the kernel module kvm_intel or kvm_amd, and switch \
                 on VT-x or SVM in the firmware (or nested virtualization under a hypervisor)"
                    .into()
            }
            io::ErrorKind::PermissionDenied => {
                "/dev/kvm may not be opened; run the agent as root or in the group kvm".into()
            }
            _ => format!("/dev/kvm: {error}"),
        }));
    }
    if let Err(error) = io_uring::IoUring::new(2) {
        return Err(AgentError::Host(match error.raw_os_error() {
            Some(libc::EPERM) => "io_uring is not permitted; set the sysctl \
                 kernel.io_uring_disabled=0, and allow io_uring_setup where seccomp filters it"
                .into(),
            Some(libc::ENOSYS) => {
                "this kernel has no io_uring; boot Linux 6.1 or later with CONFIG_IO_URING".into()
            }
            _ => format!("io_uring: {error}"),
        }));
    }
    Ok(())
}
