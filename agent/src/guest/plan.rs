//! Everything that a guest needs, with all references resolved.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use keelson_api::{
    Devices, Disk, DiskSpec, HugepageSize, KernelSource, MemorySize, Network, ResourceLimits,
    SecurityGroup, VirtualMachine,
};
use serde::{Deserialize, Serialize};

use super::GuestPaths;
use super::cloud_init::{self, Seed};
use super::device::Device;
use super::groups::rules_of;
use crate::fleet::Instant;
use crate::host::GuestPort;
use crate::{Agent, AgentError, error::Result};

/// Everything that a guest needs, with all references resolved.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The guest's name.
    pub name: String,
    /// The spec's generation that this plan is of.
    pub generation: i64,
    /// What it is started with.
    pub hardware: Hardware,
    /// Its interfaces, with the rules in force.
    pub ports: Vec<GuestPort>,
    /// What of the host its virtual machine may use.
    pub limits: ResourceLimits,
}

/// What a guest is started with: but for disks and interfaces it stays so while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// Virtual processors.
    pub cpus: u8,
    /// Memory.
    pub memory: MemorySize,
    /// The pages that back it.
    pub hugepages: Option<HugepageSize>,
    /// Whether others can map it also where it starts without disks.
    #[serde(default)]
    pub shared_memory: bool,
    /// What it boots, with the agent's additions to the command line.
    pub kernel: KernelSource,
    /// What cloud-init is told, on the last of the disks.
    #[serde(default)]
    pub seed: Option<Seed>,
    /// Its disks by the names that it knows them by.
    pub disks: Vec<(String, DiskSpec)>,
    /// Its interfaces: name, network, Ethernet address, MTU.
    pub interfaces: Vec<(String, String, String, u16)>,
    /// Its other devices.
    #[serde(default)]
    pub devices: Devices,
}

/// A plan as it is kept on disk while the guest runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunningPlan {
    /// The spec's generation.
    pub generation: i64,
    /// What it was started with, and the disks and interfaces that it has now. There is nothing on this host
    /// of any that are not in here.
    pub hardware: Hardware,
    /// Those of the devices that the guest may not have yet.
    #[serde(default)]
    pub adding: BTreeSet<Device>,
    /// Those that it is to let go of, and may have by now.
    #[serde(default)]
    pub removing: BTreeSet<Device>,
    /// Interfaces have come or gone, so that what the kernel and cloud-init were told of them is not all.
    #[serde(default)]
    pub interfaces_changed: bool,
    /// When, in milliseconds since the Unix epoch, for people: somebody may set that clock.
    pub started_at_unix_ms: i64,
    /// Since when it runs on this host, for what is decided by that.
    #[serde(default)]
    pub started: Option<Instant>,
    /// Starts before this one that ended by themselves.
    pub restarts: u32,
    /// What of the host its virtual machine may use, which can change while it runs.
    #[serde(default)]
    pub limits: ResourceLimits,
}

impl RunningPlan {
    /// What a guest that starts now is started with.
    pub fn begin(plan: &Plan, restarts: u32) -> Self {
        Self {
            generation: plan.generation,
            hardware: plan.hardware.clone(),
            adding: BTreeSet::new(),
            removing: BTreeSet::new(),
            interfaces_changed: false,
            started_at_unix_ms: Timestamp::now().as_millisecond(),
            started: Some(Instant::now()),
            restarts,
            limits: plan.limits,
        }
    }

    /// How long ago that was; `None` if an agent started it that did not write it down.
    pub fn running_for(&self) -> Option<Duration> {
        self.started.map(Instant::elapsed)
    }
}

impl Plan {
    /// Resolves a guest's references.
    ///
    /// # Errors
    /// [`AgentError::NotFound`] where an object that it refers to is gone.
    pub async fn resolve(agent: &Agent, guest: &VirtualMachine) -> Result<Self> {
        let objects = &agent.objects;
        let spec = &guest.spec;
        let mut disks = Vec::new();
        for attachment in &spec.disks {
            let disk = objects.get_typed::<Disk>(&attachment.disk).await?.object;
            disks.push((attachment.name.clone(), disk.spec));
        }
        let mut ports = Vec::new();
        for interface in &spec.interfaces {
            let network = objects
                .get_typed::<Network>(&interface.network)
                .await?
                .object;
            let mut groups = Vec::new();
            for group in &interface.security_groups {
                groups.push(objects.get_typed::<SecurityGroup>(group).await?.object);
            }
            let rules = rules_of(&groups, &agent.view.read());
            let unassigned = || AgentError::Corrupt {
                key: format!("VirtualMachine/{}", guest.metadata.name),
                message: format!("interface {} has no MAC address", interface.name),
            };
            ports.push(GuestPort {
                guest: guest.metadata.name.clone(),
                interface: interface.name.clone(),
                network: interface.network.clone(),
                network_spec: network.spec,
                mac: interface.mac.ok_or_else(unassigned)?,
                address: interface.address,
                address_v6: interface.address_v6,
                limits: interface.limits,
                rules,
                several_queues: spec.cpus > 1,
            });
        }
        let mut kernel = spec.kernel.clone();
        // cloud-init would take what the kernel is told for all that there is to know.
        let first = ports.first().filter(|_| spec.cloud_init.is_none());
        if let Some(option) = first.and_then(ip_option) {
            kernel.command_line = with_option(&kernel.command_line, &option);
        }
        let interfaces = ports.iter().map(|port| {
            let mtu = port.network_spec.mtu;
            (
                port.interface.clone(),
                port.network.clone(),
                port.mac.to_string(),
                mtu,
            )
        });
        let cloud_init = spec.cloud_init.as_ref();
        let seed = cloud_init.map(|cloud_init| Seed::of(guest, cloud_init, &ports));
        if seed.is_some() {
            let path = GuestPaths::new(&agent.config, &guest.metadata.name).cloud_init_image();
            disks.push((cloud_init::DISK.to_owned(), cloud_init::disk(path)));
        }
        let hardware = Hardware {
            seed,
            cpus: spec.cpus,
            memory: spec.memory,
            hugepages: spec.hugepages,
            shared_memory: spec.shared_memory,
            kernel,
            disks,
            interfaces: interfaces.collect(),
            devices: spec.devices,
        };
        Ok(Self {
            name: guest.metadata.name.clone(),
            generation: guest.metadata.generation,
            hardware,
            ports,
            limits: spec.limits,
        })
    }
}

/// `ip=<client>:<server>:<gateway>:<netmask>:<hostname>:<device>:<autoconf>`
/// (Linux, Documentation/admin-guide/nfs/nfsroot.rst), which initramfs-tools obeys as well; `None` without
/// IPv4.
fn ip_option(port: &GuestPort) -> Option<String> {
    let network = &port.network_spec;
    Some(format!(
        "ip={}::{}:{}:{}:eth0:off",
        port.address?,
        network.gateway()?,
        network.subnet?.netmask(),
        port.guest
    ))
}

/// The command line without the option of [`ip_option`].
pub(super) fn without_ip_option(command_line: &str) -> String {
    let is_ours = |word: &str| word.starts_with("ip=") && word.ends_with(":eth0:off");
    let words = command_line.split(' ').filter(|word| !is_ours(word));
    words.collect::<Vec<_>>().join(" ")
}

/// Adds an option for the kernel, before ` -- `, after which all is for the guest's init.
fn with_option(command_line: &str, option: &str) -> String {
    match command_line.split_once(" -- ") {
        Some((kernel, init)) => format!("{kernel} {option} -- {init}"),
        None => format!("{command_line} {option}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn how_long_a_guest_runs_is_not_asked_of_the_wall_clock() {
        let uptime = Instant::now().time_since_boot();
        let running = json!({
            "generation": 1, "restarts": 0,
            // In the year 2100, as a clock said that was set right since.
            "started_at_unix_ms": 4_102_444_800_000_i64,
            "started": Instant::since_boot(Duration::ZERO),
            "hardware": {
                "cpus": 1, "memory": "64Mi", "hugepages": null, "disks": [], "interfaces": [],
                "kernel": { "image": "/kernel", "commandLine": "" },
            },
        });
        let running: RunningPlan = serde_json::from_value(running).expect("a plan");
        assert!(running.running_for().is_some_and(|ran| ran >= uptime));
    }

    #[test]
    fn options_go_to_the_kernel_and_not_to_init() {
        assert_eq!(with_option("quiet", "ip=x"), "quiet ip=x");
        assert_eq!(
            with_option("quiet -- single", "ip=x"),
            "quiet ip=x -- single"
        );
        let ours = "ip=10.0.0.2::10.0.0.1:255.255.255.0:web:eth0:off";
        let line = with_option("quiet ip=dhcp -- single", ours);
        assert_eq!(without_ip_option(&line), "quiet ip=dhcp -- single");
    }
}
