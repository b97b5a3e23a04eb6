//! The guest's configuration: what `keelson-vmm --config` reads.
//!
//! A configuration is a JSON object; unknown fields are refused. [`GuestConfig::load`] parses and
//! validates a file, and every error names the field by its path (`disks[1].queue_size`) and says
//! what it may be.

mod cpu;
mod devices;
mod mac_address;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use cpu::{CpuConfig, CpuTemplate, Topology};
pub use devices::{
    BalloonConfig, ConsoleDevice, EndAction, PanicConfig, VhostUse, VsockConfig, WatchdogConfig,
};
pub use mac_address::MacAddress;

/// The most vCPUs a guest can have.
pub const MAX_VCPUS: u8 = 64;
/// The least memory a guest can have, in MiB: a Debian kernel with its initrd needs about this.
pub const MIN_MEMORY_MIB: u64 = 16;
/// The most memory a guest can have, in MiB (4 TiB).
pub const MAX_MEMORY_MIB: u64 = 4 << 20;
/// The longest kernel command line, in bytes without the terminating NUL (`COMMAND_LINE_SIZE` of
/// Linux on x86 is 2048 with it).
pub const MAX_COMMAND_LINE: usize = 2047;
/// The highest number of a host's NUMA node (`CONFIG_NODES_SHIFT` of Linux is at most 10).
pub const MAX_NUMA_NODE: u16 = 1023;
/// The most disks, interfaces and other devices of the configuration together: each takes one PCI
/// slot of the one bus, whose slot 0 is the host bridge and whose slot 1 is the entropy device.
pub const MAX_DEVICES: usize = 30;
/// The most pairs of queues of one interface.
pub const MAX_INTERFACE_QUEUES: u16 = 16;
/// The most request queues of one disk.
pub const MAX_DISK_QUEUES: u16 = 16;
/// The largest queue of a disk, in descriptors.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// The largest configuration file, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// `IFNAMSIZ` less the terminating NUL.
const MAX_TAP_NAME: usize = 15;
/// `sizeof(sockaddr_un.sun_path)` less the terminating NUL.
const MAX_SOCKET_PATH: usize = 107;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file is no JSON, or has a field that doesn't exist or has the wrong type.
    #[error("the configuration {path} is not valid: {field}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The field's path, such as `disks[0].queue_size`; `.` is the whole.
        field: String,
        /// What serde said, with line and column.
        source: serde_json::Error,
    },
    /// A field's value is out of its range.
    #[error("{field}: {message}")]
    Field {
        /// The field's path, such as `disks[0].queue_size`.
        field: String,
        /// What is wrong and what the field may be.
        message: String,
    },
}

/// One guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestConfig {
    /// The guest's name: 1 to 63 of `a-z A-Z 0-9 . _ -`.
    pub name: String,
    /// Virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// How the vCPUs look, and where they run.
    #[serde(default)]
    pub cpu: CpuConfig,
    /// The guest's memory.
    pub memory: MemoryConfig,
    /// What the guest boots.
    pub kernel: KernelConfig,
    /// The console.
    pub console: ConsoleConfig,
    /// The disks, in the order in which the guest finds them.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// The network interfaces, in the order in which the guest finds them, after the disks.
    #[serde(default)]
    pub interfaces: Vec<InterfaceConfig>,
    /// The memory balloon.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// The socket device.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// The device by which the guest's kernel tells that it panicked.
    #[serde(default)]
    pub panic: Option<PanicConfig>,
    /// The watchdog.
    #[serde(default)]
    pub watchdog: Option<WatchdogConfig>,
    /// What a reboot that the guest asks for does.
    #[serde(default)]
    pub on_reboot: OnReboot,
}

/// The guest's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// The size in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`]; with hugepages a multiple of
    /// their size.
    pub size_mib: u64,
    /// Back the memory by pages of the host's hugetlb pool.
    #[serde(default)]
    pub hugepages: Option<HugepageSize>,
    /// Take all of the memory from the host before the guest starts, not page by page when it is
    /// touched.
    #[serde(default)]
    pub prefault: bool,
    /// The host's NUMA node that all of the memory is taken from, 0 to 1023.
    #[serde(default)]
    pub numa_node: Option<u16>,
    /// Whether other processes can map the memory, as disks' backends must; by default if the guest
    /// starts with disks. Memory of the guest's own process alone is had in huge pages where the host
    /// lets processes ask for these.
    #[serde(default)]
    pub shared: Option<bool>,
}

/// A page size of the host's hugetlb pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugepageSize {
    /// 2 MiB pages.
    #[serde(rename = "2MiB")]
    Size2MiB,
    /// 1 GiB pages.
    #[serde(rename = "1GiB")]
    Size1GiB,
}

impl HugepageSize {
    /// The size in MiB.
    pub const fn mib(self) -> u64 {
        match self {
            Self::Size2MiB => 2,
            Self::Size1GiB => 1024,
        }
    }
}

impl fmt::Display for HugepageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size2MiB => "2MiB",
            Self::Size1GiB => "1GiB",
        })
    }
}

/// What the guest boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelConfig {
    /// A bzImage, or an uncompressed ELF (`vmlinux`).
    pub image: PathBuf,
    /// The initial ramdisk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, at most [`MAX_COMMAND_LINE`] bytes of printable ASCII.
    #[serde(default)]
    pub command_line: String,
}

/// The console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// The device that is typed into. What the guest prints on the serial port is in the console's output
    /// with either.
    #[serde(default, skip_serializing_if = "ConsoleDevice::is_serial")]
    pub device: ConsoleDevice,
    /// The Unix stream socket that the VMM listens on.
    pub socket: PathBuf,
    /// The file that gets all output.
    pub log: PathBuf,
    /// The log's largest size in MiB, 1 to 4096. At half of it the log moves to `<log>.1`, which
    /// is replaced.
    #[serde(default = "default_log_limit_mib")]
    pub log_limit_mib: u64,
}

const fn default_log_limit_mib() -> u64 {
    16
}

/// A virtio-blk disk that a vhost-user backend serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A name that is unique among the guest's devices.
    pub id: String,
    /// The backend's socket; the backend listens before the VMM starts.
    pub socket: PathBuf,
    /// Whether the disk is meant to be read-only. The backend decides (`VIRTIO_BLK_F_RO`): a
    /// backend that disagrees is an error.
    #[serde(default)]
    pub read_only: bool,
    /// Request queues, 1 to [`MAX_DISK_QUEUES`].
    #[serde(default = "default_queues")]
    pub queues: u16,
    /// Descriptors of each queue, a power of two from 2 to [`MAX_QUEUE_SIZE`].
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
}

const fn default_queues() -> u16 {
    1
}

const fn default_queue_size() -> u16 {
    256
}

/// A virtio-net interface on a TAP device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceConfig {
    /// A name that is unique among the guest's devices.
    pub id: String,
    /// The TAP device, which exists already.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: MacAddress,
    /// The MTU that the guest is told, 68 to 65535 (`VIRTIO_NET_F_MTU`).
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Pairs of queues, 1 to [`MAX_INTERFACE_QUEUES`]. By default as many as vCPUs, or one if the TAP
    /// has no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Who moves the packets.
    #[serde(default)]
    pub vhost: VhostUse,
}

const fn default_mtu() -> u16 {
    1500
}

/// What a reboot that the guest asks for does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnReboot {
    /// Boot again in the same process.
    #[default]
    Reboot,
    /// End the process with exit code 0 and the reason `reboot`.
    Exit,
}

impl GuestConfig {
    /// Reads, parses and validates the file at `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.into(),
            source,
        };
        let length = std::fs::metadata(path).map_err(read)?.len();
        if length > MAX_CONFIG_BYTES {
            return Err(read(std::io::Error::other(format!(
                "it has {length} bytes, more than the limit of {MAX_CONFIG_BYTES}"
            ))));
        }
        let text = std::fs::read(path).map_err(read)?;
        Self::parse(&text, path)
    }

    /// Parses and validates what was read of the file at `path`.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, ConfigError> {
        let parser = &mut serde_json::Deserializer::from_slice(text);
        let config: Self =
            serde_path_to_error::deserialize(parser).map_err(|e| ConfigError::Parse {
                path: path.into(),
                field: e.path().to_string(),
                source: e.into_inner(),
            })?;
        config.validate()?;
        Ok(config)
    }

    /// Whether the guest's memory is shared with disks' backends.
    pub fn shares_memory(&self) -> bool {
        self.memory.shared.unwrap_or(!self.disks.is_empty())
    }

    /// The disks, interfaces and other devices that take a slot each.
    fn devices(&self) -> usize {
        let others = [
            self.balloon.is_some(),
            self.vsock.is_some(),
            self.panic.is_some(),
            self.watchdog.is_some(),
            self.console.device == ConsoleDevice::Virtio,
        ];
        let others = others.into_iter().filter(|there| *there).count();
        self.disks.len() + self.interfaces.len() + others
    }

    /// Whether there are more devices than slots.
    pub fn has_too_many_devices(&self) -> bool {
        self.devices() > MAX_DEVICES
    }

    /// Checks every field's range, and that identities are unique.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_name("name", &self.name)?;
        check_range("vcpus", u64::from(self.vcpus), 1, u64::from(MAX_VCPUS))?;
        self.cpu.validate(self.vcpus)?;
        self.memory.validate()?;
        self.kernel.validate()?;
        self.console.validate()?;
        let devices = self.devices();
        if self.has_too_many_devices() {
            return Err(field(
                "disks",
                format!(
                    "{devices} disks, interfaces and other devices, but the PCI bus has \
                     {MAX_DEVICES} slots"
                ),
            ));
        }
        if let Some(balloon) = &self.balloon {
            balloon.validate(self.memory.size_mib)?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        if !self.disks.is_empty() && !self.shares_memory() {
            let message = "disks' backends need shared memory: leave it out, or set it to true";
            return Err(field("memory.shared", message.to_owned()));
        }
        let mut unique = Unique::default();
        for (index, disk) in self.disks.iter().enumerate() {
            disk.validate(&format!("disks[{index}]"), &mut unique)?;
        }
        for (index, interface) in self.interfaces.iter().enumerate() {
            interface.validate(&format!("interfaces[{index}]"), &mut unique)?;
        }
        Ok(())
    }
}

/// The identities seen so far, each of which only one device may have.
#[derive(Default)]
struct Unique(HashSet<(&'static str, String)>);

impl Unique {
    fn insert(&mut self, path: &str, name: &'static str, value: &str) -> Result<(), ConfigError> {
        if self.0.insert((name, value.to_owned())) {
            return Ok(());
        }
        Err(field(
            format!("{path}.{name}"),
            format!("`{value}` is used by two devices"),
        ))
    }
}

impl MemoryConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        check_range(
            "memory.size_mib",
            self.size_mib,
            MIN_MEMORY_MIB,
            MAX_MEMORY_MIB,
        )?;
        if let Some(node) = self.numa_node {
            let most = u64::from(MAX_NUMA_NODE);
            check_range("memory.numa_node", u64::from(node), 0, most)?;
        }
        match self.hugepages {
            Some(page) if !self.size_mib.is_multiple_of(page.mib()) => Err(field(
                "memory.size_mib",
                format!(
                    "{} is not a multiple of the {page} hugepages",
                    self.size_mib
                ),
            )),
            _ => Ok(()),
        }
    }
}

impl KernelConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        check_path("kernel.image", &self.image)?;
        if let Some(initrd) = &self.initrd {
            check_path("kernel.initrd", initrd)?;
        }
        if self.command_line.len() > MAX_COMMAND_LINE {
            return Err(field(
                "kernel.command_line",
                format!(
                    "{} bytes, the limit is {MAX_COMMAND_LINE}",
                    self.command_line.len()
                ),
            ));
        }
        if !self.command_line.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            return Err(field(
                "kernel.command_line",
                "must be printable ASCII in one line",
            ));
        }
        Ok(())
    }
}

impl ConsoleConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        check_socket("console.socket", &self.socket)?;
        check_path("console.log", &self.log)?;
        check_range("console.log_limit_mib", self.log_limit_mib, 1, 4096)
    }
}

impl DiskConfig {
    fn validate(&self, path: &str, unique: &mut Unique) -> Result<(), ConfigError> {
        check_name(&format!("{path}.id"), &self.id)?;
        unique.insert(path, "id", &self.id)?;
        check_socket(&format!("{path}.socket"), &self.socket)?;
        unique.insert(path, "socket", &self.socket.to_string_lossy())?;
        let queues = u64::from(self.queues);
        check_range(
            &format!("{path}.queues"),
            queues,
            1,
            u64::from(MAX_DISK_QUEUES),
        )?;
        if !self.queue_size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&self.queue_size) {
            return Err(field(
                format!("{path}.queue_size"),
                format!(
                    "{} is not a power of two from 2 to {MAX_QUEUE_SIZE}",
                    self.queue_size
                ),
            ));
        }
        Ok(())
    }
}

impl InterfaceConfig {
    fn validate(&self, path: &str, unique: &mut Unique) -> Result<(), ConfigError> {
        check_name(&format!("{path}.id"), &self.id)?;
        unique.insert(path, "id", &self.id)?;
        let tap_ok = (1..=MAX_TAP_NAME).contains(&self.tap.len())
            && self
                .tap
                .bytes()
                .all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%')
            && self.tap != "."
            && self.tap != "..";
        if !tap_ok {
            return Err(field(
                format!("{path}.tap"),
                format!(
                    "`{}` is no interface name of 1 to {MAX_TAP_NAME} characters",
                    self.tap
                ),
            ));
        }
        unique.insert(path, "tap", &self.tap)?;
        unique.insert(path, "mac", &self.mac.to_string())?;
        if let Some(queues) = self.queues {
            let most = u64::from(MAX_INTERFACE_QUEUES);
            check_range(&format!("{path}.queues"), u64::from(queues), 1, most)?;
        }
        check_range(&format!("{path}.mtu"), u64::from(self.mtu), 68, 65535)
    }
}

fn field(field: impl Into<String>, message: impl Into<String>) -> ConfigError {
    ConfigError::Field {
        field: field.into(),
        message: message.into(),
    }
}

fn check_range(path: &str, value: u64, least: u64, most: u64) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(field(
        path,
        format!("{value} is out of range, it must be {least} to {most}"),
    ))
}

fn check_name(path: &str, name: &str) -> Result<(), ConfigError> {
    let valid = (1..=63).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if valid {
        return Ok(());
    }
    Err(field(
        path,
        format!("`{name}` must be 1 to 63 letters, digits, `.`, `_` or `-`"),
    ))
}

fn check_path(path: &str, value: &Path) -> Result<(), ConfigError> {
    if value.as_os_str().is_empty() {
        return Err(field(path, "must name a file"));
    }
    Ok(())
}

fn check_socket(path: &str, value: &Path) -> Result<(), ConfigError> {
    check_path(path, value)?;
    let length = value.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        return Err(field(
            path,
            format!("{length} bytes, but a Unix socket's path has at most {MAX_SOCKET_PATH}"),
        ));
    }
    Ok(())
}
