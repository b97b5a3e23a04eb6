//! A guest.

use std::collections::{BTreeMap, HashSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::cloud_init::CloudInit;
use crate::device_status::DeviceStatus;
use crate::devices::Devices;
use crate::metadata::{Condition, ObjectMeta, validate_name};
use crate::migration::Migration;
use crate::object::absolute_path;
use crate::rate_limit::InterfaceLimits;
use crate::resource_limits::ResourceLimits;
use crate::units::{MacAddress, MemorySize, TimeLimit};

/// The most vCPUs a guest may have.
const CPU_LIMIT: u8 = 64;
/// The name of the disk that cloud-init reads.
const CLOUD_INIT_DISK: &str = "cidata";
/// The least memory that a stock kernel and its initrd boot in.
const MEMORY_MINIMUM_MIB: u64 = 32;
/// PCI slots for disks and interfaces.
const DEVICE_LIMIT: usize = 16;
/// PCI slots of all devices together: the bus' 32, less the host bridge and the entropy device.
const SLOT_LIMIT: usize = 30;
/// The kernel's own limit on x86 (`COMMAND_LINE_SIZE`), less what the agent appends.
const COMMAND_LINE_LIMIT: usize = 1792;
/// As long as Linux' own interface names; the name stands in paths of sockets, which are short.
const DEVICE_NAME_LIMIT: usize = 15;

/// A guest: its processors, memory, kernel, disks and interfaces, and whether it should run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VirtualMachine {
    /// Always [`crate::API_VERSION`].
    pub api_version: String,
    /// Always `VirtualMachine`.
    pub kind: String,
    /// Its name.
    pub metadata: ObjectMeta,
    /// What it should be.
    pub spec: VirtualMachineSpec,
    /// What the agent observed.
    #[serde(default)]
    pub status: VirtualMachineStatus,
}

/// What a guest should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VirtualMachineSpec {
    /// Virtual processors, 1 to 64.
    pub cpus: u8,
    /// Its memory, such as `256Mi`.
    pub memory: MemorySize,
    /// Back the memory by huge pages of this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<HugepageSize>,
    /// Have memory that disks' backends can map also where it starts without disks, so that it can get
    /// some while it runs. The memory of one that starts with disks always is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared_memory: bool,
    /// What it boots.
    pub kernel: KernelSource,
    /// What cloud-init makes of it. The agent leaves `ip=` out of the kernel's command line then, and adds
    /// a disk `cidata` behind the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Its disks, in the order in which it finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskAttachment>,
    /// Its network interfaces, in the order in which it finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// Its other devices.
    #[serde(default, skip_serializing_if = "Devices::is_empty")]
    pub devices: Devices,
    /// What of the host its virtual machine may use.
    #[serde(default, skip_serializing_if = "ResourceLimits::is_unlimited")]
    pub limits: ResourceLimits,
    /// Whether it should run.
    #[serde(default)]
    pub power_state: PowerState,
    /// What happens when it ends by itself.
    #[serde(default)]
    pub restart_policy: RestartPolicy,
    /// How long it may take to shut down after the power button, before it is killed.
    #[serde(default = "default_stop_timeout")]
    pub stop_timeout: TimeLimit,
    /// The host that it has to run on; the scheduler chooses one where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Labels that its host has to have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub host_selector: BTreeMap<String, String>,
    /// It isn't placed beside another guest that has all of these labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub anti_affinity: BTreeMap<String, String>,
    /// What happens to it when its host is lost to the fleet.
    #[serde(default, skip_serializing_if = "Failover::is_never")]
    pub failover: Failover,
}

fn default_stop_timeout() -> TimeLimit {
    TimeLimit::from_secs(60)
}

/// A size of huge pages that x86-64 has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugepageSize {
    /// 2 MiB.
    #[serde(rename = "2Mi")]
    Size2Mi,
    /// 1 GiB.
    #[serde(rename = "1Gi")]
    Size1Gi,
}

/// What a guest boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KernelSource {
    /// A bzImage or an uncompressed vmlinux on the host, absolute.
    pub image: PathBuf,
    /// The initial RAM disk, absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line. The agent appends `ip=` for the first interface with the
    /// addresses of its network (Linux, Documentation/admin-guide/nfs/nfsroot.rst).
    #[serde(default = "default_command_line")]
    pub command_line: String,
}

fn default_command_line() -> String {
    "console=ttyS0".into()
}

/// A disk in a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DiskAttachment {
    /// The disk's name in this guest, also its serial number there.
    pub name: String,
    /// The `Disk` object.
    pub disk: String,
}

/// A network interface of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Interface {
    /// The interface's name in this guest.
    pub name: String,
    /// The `Network` object.
    pub network: String,
    /// Its address there, where the network has IPv4; the lowest free one is allocated where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// Its IPv6 address, where the network has IPv6; where not given, the lowest free one is allocated, or
    /// in a network with SLAAC the one that the guest makes of its MAC address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_v6: Option<Ipv6Addr>,
    /// Its Ethernet address; derived from the guest's identity where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// `SecurityGroup` objects, whose rules add up. Without any, nothing that the guest did not
    /// ask for reaches it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub security_groups: Vec<String>,
    /// How much may pass per second.
    #[serde(default, skip_serializing_if = "InterfaceLimits::is_unlimited")]
    pub limits: InterfaceLimits,
}

/// Whether a guest should run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerState {
    /// It should run.
    #[default]
    Running,
    /// It should be shut down.
    Stopped,
}

/// What happens to a guest that ended by itself and should run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartPolicy {
    /// It is started again, after a delay that grows while it keeps ending early.
    Always,
    /// It is started again if it ended by an error, and left off if it shut itself down.
    #[default]
    OnFailure,
    /// It is left as it ended.
    Never,
}

/// What happens to a guest when its host's lease ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failover {
    /// It goes on running on its host, if that lives, and is started nowhere else.
    #[default]
    Never,
    /// Its host kills it before the lease ends, and it is started on another host. Only if all of its
    /// disks are shared.
    Restart,
}

impl Failover {
    // Serde hands `skip_serializing_if` a reference.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    fn is_never(&self) -> bool {
        *self == Self::Never
    }
}

impl VirtualMachineSpec {
    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        if !(1..=CPU_LIMIT).contains(&self.cpus) {
            errors.push(FieldError::new(
                "spec.cpus",
                format!("is {}; give 1 to {CPU_LIMIT}", self.cpus),
            ));
        }
        self.validate_memory(errors);
        absolute_path("spec.kernel.image", &self.kernel.image, errors);
        if let Some(initrd) = &self.kernel.initrd {
            absolute_path("spec.kernel.initrd", initrd, errors);
        }
        self.validate_command_line(errors);
        self.validate_cloud_init(errors);
        let disks = self
            .disks
            .iter()
            .map(|disk| (&disk.name, "disk", &disk.disk));
        validate_devices("spec.disks", disks, errors);
        let interfaces = self.interfaces.iter();
        let interfaces =
            interfaces.map(|interface| (&interface.name, "network", &interface.network));
        validate_devices("spec.interfaces", interfaces, errors);
        self.validate_interfaces(errors);
        if let Some(Err(message)) = self.host.as_deref().map(validate_name) {
            errors.push(FieldError::new("spec.host", message));
        }
        self.validate_slots(errors);
        self.devices.validate(self.memory, errors);
        self.limits.validate(self.memory, errors);
    }

    /// Each kind of device has its own limit; together they need as many slots as there are.
    fn validate_slots(&self, errors: &mut Vec<FieldError>) {
        let devices = self.disks.len() + self.interfaces.len() + self.devices.count();
        if devices > SLOT_LIMIT {
            errors.push(FieldError::new(
                "spec",
                format!(
                    "has {devices} disks, interfaces and other devices; at most {SLOT_LIMIT} fit"
                ),
            ));
        }
    }

    fn validate_memory(&self, errors: &mut Vec<FieldError>) {
        if self.memory.mib() < MEMORY_MINIMUM_MIB {
            errors.push(FieldError::new(
                "spec.memory",
                format!("is {}; give at least {MEMORY_MINIMUM_MIB}Mi", self.memory),
            ));
        }
        let page_mib = match self.hugepages {
            None => 1,
            Some(HugepageSize::Size2Mi) => 2,
            Some(HugepageSize::Size1Gi) => 1024,
        };
        if !self.memory.mib().is_multiple_of(page_mib) {
            errors.push(FieldError::new(
                "spec.memory",
                format!(
                    "is {}; give a multiple of the huge page size, {page_mib}Mi",
                    self.memory
                ),
            ));
        }
    }

    fn validate_command_line(&self, errors: &mut Vec<FieldError>) {
        let line = &self.kernel.command_line;
        if line.len() > COMMAND_LINE_LIMIT {
            errors.push(FieldError::new(
                "spec.kernel.commandLine",
                format!(
                    "is {} bytes long; at most {COMMAND_LINE_LIMIT} fit",
                    line.len()
                ),
            ));
        }
        if !line.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
            errors.push(FieldError::new(
                "spec.kernel.commandLine",
                "holds something else than printable ASCII; write it so, on one line",
            ));
        }
    }

    fn validate_cloud_init(&self, errors: &mut Vec<FieldError>) {
        let Some(cloud_init) = &self.cloud_init else {
            return;
        };
        cloud_init.validate(errors);
        if self.disks.len() >= DEVICE_LIMIT {
            let message = format!(
                "goes with at most {} disks, as it is one more",
                DEVICE_LIMIT - 1
            );
            errors.push(FieldError::new("spec.cloudInit", message));
        }
        for (index, disk) in self.disks.iter().enumerate() {
            if disk.name == CLOUD_INIT_DISK {
                let message = "is the name of the disk that cloudInit adds; choose another one";
                errors.push(FieldError::new(
                    format!("spec.disks[{index}].name"),
                    message,
                ));
            }
        }
    }

    fn validate_interfaces(&self, errors: &mut Vec<FieldError>) {
        let mut macs = HashSet::new();
        for (index, interface) in self.interfaces.iter().enumerate() {
            if let Some(mac) = interface.mac {
                let field = format!("spec.interfaces[{index}].mac");
                if mac.is_multicast() || mac == MacAddress([0; 6]) {
                    errors.push(FieldError::new(
                        field,
                        format!("{mac} is no station's address; its first octet must be even"),
                    ));
                } else if !macs.insert(mac) {
                    errors.push(FieldError::new(field, format!("{mac} is given twice")));
                }
            }
            let field = format!("spec.interfaces[{index}].limits");
            interface.limits.validate(&field, errors);
            for (position, group) in interface.security_groups.iter().enumerate() {
                if let Err(message) = validate_name(group) {
                    errors.push(FieldError::new(
                        format!("spec.interfaces[{index}].securityGroups[{position}]"),
                        message,
                    ));
                }
            }
        }
    }
}

/// Checks names, references and the number of `(name, referring field, reference)` devices.
fn validate_devices<'a>(
    field: &str,
    devices: impl ExactSizeIterator<Item = (&'a String, &'static str, &'a String)>,
    errors: &mut Vec<FieldError>,
) {
    if devices.len() > DEVICE_LIMIT {
        errors.push(FieldError::new(
            field,
            format!("has {} entries; at most {DEVICE_LIMIT} fit", devices.len()),
        ));
    }
    let mut names = HashSet::new();
    for (index, (name, referring, reference)) in devices.enumerate() {
        let name_field = format!("{field}[{index}].name");
        if let Err(message) = validate_name(name) {
            errors.push(FieldError::new(name_field, message));
        } else if name.len() > DEVICE_NAME_LIMIT {
            errors.push(FieldError::new(
                name_field,
                format!(
                    "is {} characters long; at most {DEVICE_NAME_LIMIT} fit",
                    name.len()
                ),
            ));
        } else if !names.insert(name) {
            errors.push(FieldError::new(
                name_field,
                format!("{name:?} is given twice"),
            ));
        }
        if let Err(message) = validate_name(reference) {
            errors.push(FieldError::new(
                format!("{field}[{index}].{referring}"),
                message,
            ));
        }
    }
}

/// Where a guest is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Accepted; nothing runs yet.
    #[default]
    Pending,
    /// Its devices and processes are being set up.
    Starting,
    /// Its virtual machine runs.
    Running,
    /// Its virtual machine stands still, until it is resumed.
    Paused,
    /// It was asked to shut down.
    Stopping,
    /// It does not run, as it should be, or as its restart policy has it.
    Stopped,
    /// It should run and cannot; the conditions say why.
    Failed,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Padding works only on `pad`.
        formatter.pad(match self {
            Self::Pending => "Pending",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Stopping => "Stopping",
            Self::Stopped => "Stopped",
            Self::Failed => "Failed",
        })
    }
}

/// What the agent observed of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VirtualMachineStatus {
    /// Where it is in its life.
    pub phase: Phase,
    /// The generation of the spec that this status answers.
    pub observed_generation: i64,
    /// The generation of the spec that the running guest was started from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running_generation: Option<i64>,
    /// The host that runs it, or ran it last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Where it is placed; nothing where the state store belongs to one host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// The process id of its keelson-vmm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_id: Option<u32>,
    /// When its virtual machine started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// How often it was started after it ended by itself.
    pub restarts: u32,
    /// Its interfaces as they are on the host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<InterfaceStatus>,
    /// Its latest move to another host while it ran, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<Migration>,
    /// The disks and interfaces that it has while it runs, and those that come or go.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceStatus>,
    /// `Ready`; `DevicesPending` while disks or interfaces are to come or go; and `RestartRequired` where
    /// the spec changed in what a running guest keeps.
    pub conditions: Vec<Condition>,
}

/// Where a guest is placed. Only the host that is named here, and only while its lease lasts, may
/// start the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// The host.
    pub host: String,
    /// How often the guest was placed until now.
    pub epoch: u64,
    /// What the host has made of it.
    pub state: PlacementState,
}

/// What a host has made of a guest that was placed on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlacementState {
    /// Nothing of the guest runs there. It can be placed elsewhere once the host's lease has ended.
    Assigned,
    /// It may run there, also when the host's lease has ended: it is placed nowhere else.
    Held,
    /// It may run there until shortly before the host's lease ends, and can then be placed elsewhere.
    Leased,
    /// The host gave it up, with nothing of it left there: it is to be placed anew.
    Released,
}

/// An interface as it is on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceStatus {
    /// The interface's name in the guest's manifest.
    pub name: String,
    /// The host's TAP device.
    pub device: String,
    /// Its IPv4 address, if the network has IPv4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// Its IPv6 address, if the network has IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_v6: Option<Ipv6Addr>,
    /// Its Ethernet address.
    pub mac: MacAddress,
}
