//! What the host has, and whether it can run guests.

use std::fs;
use std::io;

use std::path::Path;

use keelson_api::{HostResources, HostStatus, MemorySize};

use super::tunnel;
use crate::config::Config;
use crate::{AgentError, error::Result};

/// What the host has.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// Its name in the fleet: an RFC 1123 label.
    pub hostname: String,
    /// The kernel's release, such as `6.12.0`.
    pub kernel: String,
    /// Processors that are online.
    pub cpus: u32,
    /// All of its memory, in bytes.
    pub memory_bytes: u64,
    /// Huge pages of 2 MiB, whoever uses them.
    pub hugepages_2mi: u64,
    /// Huge pages of 1 GiB.
    pub hugepages_1gi: u64,
}

/// Where images are by convention.
const IMAGES: &str = "/var/lib/keelson";
/// The longest name of an object.
const NAME_LIMIT: usize = 63;

impl Inventory {
    /// Asks the kernel.
    ///
    /// # Errors
    /// [`AgentError::Io`] where /proc/meminfo cannot be read.
    pub fn read(host_name: Option<&str>) -> Result<Self> {
        let uname = rustix::system::uname();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self {
            hostname: label(host_name.unwrap_or(&uname.nodename().to_string_lossy())),
            kernel: uname.release().to_string_lossy().into_owned(),
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_bytes: memory_total()?,
            hugepages_2mi: hugepages("2048kB"),
            hugepages_1gi: hugepages("1048576kB"),
        })
    }

    /// What there is to say of the host, without conditions.
    pub fn status(&self, config: &Config) -> HostStatus {
        let disk = mebibytes(disk_bytes());
        let capacity = HostResources {
            cpus: self.cpus,
            memory: self.memory(),
            hugepages_2mi: self.hugepages_2mi,
            hugepages_1gi: self.hugepages_1gi,
            disk,
        };
        let in_hugepages = (self.hugepages_2mi << 21).saturating_add(self.hugepages_1gi << 30);
        let taken = config
            .host_reserved_memory
            .bytes()
            .saturating_add(in_hugepages);
        let allocatable = HostResources {
            cpus: self.cpus.saturating_mul(config.cpu_overcommit),
            memory: mebibytes(self.memory_bytes.saturating_sub(taken)),
            ..capacity
        };
        HostStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            kernel: self.kernel.clone(),
            capacity: Some(capacity),
            allocatable: Some(allocatable),
            migration_address: config
                .migration_address()
                .map(|address| address.to_string()),
            tunnel_address: tunnel::address(config).ok(),
            conditions: Vec::new(),
        }
    }

    /// The memory as it is written in manifests, rounded down.
    pub fn memory(&self) -> MemorySize {
        mebibytes(self.memory_bytes)
    }
}

fn mebibytes(bytes: u64) -> MemorySize {
    MemorySize::from_mib(bytes >> 20).unwrap_or_else(|| unreachable!("shifted"))
}

/// A host name as a name of an object: in lower case, with hyphens for dots.
fn label(host_name: &str) -> String {
    let lower = host_name.to_ascii_lowercase();
    let label: String = lower
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(NAME_LIMIT)
        .collect();
    match label.trim_matches('-') {
        "" => "host".into(),
        label => label.into(),
    }
}

/// How many huge pages of a size there are (Linux, Documentation/admin-guide/mm/hugetlbpage.rst).
fn hugepages(size: &str) -> u64 {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{size}/nr_hugepages");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// The size of the file system that images are on; 0 where the kernel doesn't say it.
fn disk_bytes() -> u64 {
    let mut folders = Path::new(IMAGES).ancestors();
    let statistics = folders.find_map(|folder| rustix::fs::statvfs(folder).ok());
    statistics.map_or(0, |found| found.f_blocks.saturating_mul(found.f_frsize))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_becomes_a_label() {
        assert_eq!(label("Node-7.example.org"), "node-7-example-org");
        assert_eq!(label("h1"), "h1");
        assert_eq!(label("_"), "host");
        assert_eq!(label(&"x".repeat(100)).len(), 63);
    }
}
