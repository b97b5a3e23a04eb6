//! The host's side of guests' networks: bridges, TAP devices, and eBPF policy on them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use keelson_api::{BitRate, InterfaceLimits, MacAddress, NetworkSpec, RateLimit};
use keelson_ebpf::{
    Answers, Datapath, DatapathConfig, DatapathError, EgressPolicy, Flow, FlowUse, HookChoice,
    InterfaceCounters, InterfacePolicy, PacketEvent,
};
use sha2::{Digest, Sha256};
use tokio::sync::broadcast;

use super::captures::{Capture, Captures};
use super::guest_configuration::{GuestConfigurations, of_port};
use super::link::Links;
use super::packet_events::PacketEvents;
use super::rules::{Rules, expand};
use super::{bridge, tap};
use crate::config::{Config, NetworkHook};
use crate::failpoint::failpoint;
use crate::{AgentError, error::Result};

pub(super) const BRIDGE_PREFIX: &str = "kbr-";
const TAP_PREFIX: &str = "ktap-";

/// The host's side of guests' networks.
#[derive(Clone)]
pub struct HostNetwork {
    pub(super) links: Links,
    pub(super) datapath: SharedDatapath,
    packets: PacketEvents,
    captures: Captures,
    configurations: GuestConfigurations,
    pub(super) config: Arc<Config>,
}

/// The datapath, whose calls block.
#[derive(Clone)]
pub struct SharedDatapath(Arc<Mutex<Datapath>>);

impl SharedDatapath {
    /// Does `work` on a blocking thread, after the work before it.
    pub async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Datapath) -> std::result::Result<T, DatapathError> + Send + 'static,
    ) -> Result<T> {
        let Self(datapath) = self.clone();
        blocking(move || work(&mut datapath.lock().unwrap_or_else(PoisonError::into_inner))).await
    }
}

/// One interface of one guest, as the host sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestPort {
    /// The guest's name.
    pub guest: String,
    /// The interface's name in the guest's manifest.
    pub interface: String,
    /// The network's name.
    pub network: String,
    /// The network's addresses.
    pub network_spec: NetworkSpec,
    /// The interface's Ethernet address.
    pub mac: MacAddress,
    /// The interface's IPv4 address.
    pub address: Option<Ipv4Addr>,
    /// The interface's IPv6 address.
    pub address_v6: Option<Ipv6Addr>,
    /// How much may pass.
    pub limits: InterfaceLimits,
    /// What may reach it, and what it may reach.
    pub rules: Rules,
    /// Its guest has several vCPUs, each of which may have a queue of the device.
    pub several_queues: bool,
}

impl GuestPort {
    /// The name of its TAP device, the same at every start.
    pub fn device(&self) -> String {
        device_name(TAP_PREFIX, &format!("{}/{}", self.guest, self.interface))
    }

    fn policy(&self) -> Result<InterfacePolicy> {
        let ingress = expand(&self.rules.ingress)?;
        let egress = match &self.rules.egress {
            Some(rules) => EgressPolicy::Only(expand(rules)?),
            None => EgressPolicy::AllowAll,
        };
        Ok(InterfacePolicy {
            name: self.device(),
            mac: keelson_ebpf::MacAddress(self.mac.0),
            ipv4: self.address,
            ipv6: self.address_v6,
            network: network_number(&self.network),
            isolated: self.network_spec.isolated,
            spans_hosts: self.network_spec.overlay.is_some(),
            mtu: self.network_spec.mtu,
            answers: Answers {
                dhcp: self.network_spec.dhcp,
                solicitations: self.network_spec.router_advertisements,
            },
            limits: keelson_ebpf::InterfaceLimits {
                from_guest: rate_limit(&self.limits.from_guest),
                to_guest: rate_limit(&self.limits.to_guest),
            },
            ingress,
            egress,
        })
    }
}

impl HostNetwork {
    /// Loads the eBPF programs, or takes over those that an earlier agent pinned.
    ///
    /// # Errors
    /// [`AgentError::Datapath`] where the kernel refuses, with what to do.
    pub async fn open(config: &Config) -> Result<Self> {
        let datapath_config = DatapathConfig {
            pin_root: config.bpf_directory.clone(),
            hook: match config.network_hook {
                NetworkHook::Auto => HookChoice::Auto,
                NetworkHook::Tcx => HookChoice::Tcx,
                NetworkHook::Clsact => HookChoice::Clsact,
            },
            ..DatapathConfig::default()
        };
        let mut datapath = blocking(move || Datapath::open(&datapath_config)).await?;
        let reader = datapath.take_event_reader();
        let capture_reader = datapath.take_capture_reader();
        let question_reader = datapath.take_question_reader();
        let datapath = SharedDatapath(Arc::new(Mutex::new(datapath)));
        let (Some(reader), Some(capture_reader), Some(question_reader)) =
            (reader, capture_reader, question_reader)
        else {
            return Err(AgentError::Process {
                reason: "NoEvents",
                message: "the eBPF network's events are read by another".into(),
            });
        };
        Ok(Self {
            links: Links::connect()?,
            packets: PacketEvents::start(reader, datapath.clone()),
            captures: Captures::start(capture_reader, datapath.clone()),
            configurations: GuestConfigurations::start(question_reader)?,
            config: Arc::new(config.clone()),
            datapath,
        })
    }

    /// Brings up a network's bridge; returns its device name.
    pub async fn ensure_network(&self, name: &str, spec: &NetworkSpec) -> Result<String> {
        let device = device_name(BRIDGE_PREFIX, name);
        bridge::ensure(&self.links, &device, router_mac(name), spec).await?;
        Ok(device)
    }

    /// Removes the bridges of networks other than `names`.
    pub async fn remove_networks_except(&self, names: &[&str]) -> Result<()> {
        let wanted: Vec<_> = names
            .iter()
            .map(|name| device_name(BRIDGE_PREFIX, name))
            .collect();
        for device in self.links.names(BRIDGE_PREFIX).await? {
            if !wanted.contains(&device) {
                self.links.delete(&device).await?;
            }
        }
        Ok(())
    }

    /// Makes a guest's TAP device ready: the policy is in force before the device is up.
    pub async fn ensure_port(&self, port: &GuestPort) -> Result<()> {
        let bridge = self.prepare_port(port).await?;
        let device = port.device();
        self.links
            .bring_up(&device, port.network_spec.mtu, Some(bridge))
            .await?;
        let ifindex = self.links.require(&device).await?;
        let router_mac = router_mac(&port.network);
        self.configurations.set(ifindex, of_port(port, router_mac));
        failpoint(&port.guest, "port-up");
        Ok(())
    }

    /// Makes a guest's TAP device with its policy, and leaves it down: nothing reaches it, and it answers
    /// nobody. The index of its bridge.
    pub async fn prepare_port(&self, port: &GuestPort) -> Result<u32> {
        let device = port.device();
        let bridge = device_name(BRIDGE_PREFIX, &port.network);
        let router_mac = router_mac(&port.network);
        let bridge = bridge::ensure(&self.links, &bridge, router_mac, &port.network_spec).await?;
        if self.links.index(&device).await?.is_none() {
            tap::create(&device, port.several_queues)?;
            self.links.remove_queueing(&device).await?;
        }
        failpoint(&port.guest, "port-device-made");
        let policy = port.policy()?;
        self.datapath
            .with(move |datapath| datapath.attach(&policy))
            .await?;
        self.captures.resume(&device).await?;
        failpoint(&port.guest, "port-policy-attached");
        Ok(bridge)
    }

    /// Lets no packet pass the TAP device of a guest's interface any more.
    pub async fn silence_port(&self, guest: &str, interface: &str) -> Result<()> {
        let device = Self::device_of(guest, interface);
        self.links.take_down(&device).await
    }

    /// Removes the TAP device of a guest's interface, and then its policy.
    pub async fn remove_port(&self, guest: &str, interface: &str) -> Result<()> {
        self.remove_device(Self::device_of(guest, interface)).await
    }

    async fn remove_device(&self, device: String) -> Result<()> {
        if let Some(ifindex) = self.links.index(&device).await? {
            self.configurations.remove(ifindex);
        }
        self.links.delete(&device).await?;
        self.datapath
            .with(move |datapath| datapath.detach(&device).map(drop))
            .await
    }

    /// Removes the TAP devices of interfaces other than those named, as `(guest, interface)`.
    pub async fn remove_ports_except(&self, ports: &[(String, String)]) -> Result<()> {
        let wanted: Vec<_> = ports
            .iter()
            .map(|(guest, interface)| device_name(TAP_PREFIX, &format!("{guest}/{interface}")))
            .collect();
        for device in self.links.names(TAP_PREFIX).await? {
            if !wanted.contains(&device) {
                self.remove_device(device).await?;
            }
        }
        self.datapath
            .with(|datapath| datapath.collect_garbage().map(drop))
            .await
    }

    /// What the device of a guest's interface passed and dropped, and the device's name.
    pub async fn counters(
        &self,
        guest: &str,
        interface: &str,
    ) -> Result<(String, InterfaceCounters)> {
        let device = device_name(TAP_PREFIX, &format!("{guest}/{interface}"));
        let name = device.clone();
        let counters = self
            .datapath
            .with(move |datapath| datapath.counters(&name))
            .await?;
        Ok((device, counters))
    }

    /// What all devices of guests' interfaces passed and dropped, and their flows, by the devices' names.
    pub async fn statistics(&self) -> Result<BTreeMap<String, (InterfaceCounters, FlowUse)>> {
        self.datapath.with(|datapath| datapath.statistics()).await
    }

    /// How programs are attached on this kernel: `tcx`, `clsact`, or `none` before the first.
    pub async fn hook(&self) -> Result<String> {
        let attached = self.datapath.with(|datapath| datapath.attached()).await?;
        Ok(attached
            .first()
            .map_or("none".into(), |attached| attached.hook.to_string()))
    }

    /// The flows that the device of a guest's interface has.
    pub async fn flows(&self, guest: &str, interface: &str) -> Result<Vec<Flow>> {
        let device = device_name(TAP_PREFIX, &format!("{guest}/{interface}"));
        self.datapath
            .with(move |datapath| datapath.flows(&device))
            .await
    }

    /// What happens to packets from now on, on devices by their names.
    pub fn packets(&self) -> broadcast::Receiver<Arc<PacketEvent>> {
        self.packets.subscribe()
    }

    /// Captures the packets of a device from now on.
    pub async fn capture(&self, device: String) -> Result<Capture> {
        self.captures.capture(device).await
    }

    /// The name of the device of a guest's interface.
    pub fn device_of(guest: &str, interface: &str) -> String {
        device_name(TAP_PREFIX, &format!("{guest}/{interface}"))
    }
}

impl fmt::Debug for HostNetwork {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("HostNetwork")
            .finish_non_exhaustive()
    }
}

fn rate_limit(limit: &RateLimit) -> keelson_ebpf::RateLimit {
    keelson_ebpf::RateLimit {
        bits_per_second: limit.bits_per_second.map(BitRate::bits_per_second),
        packets_per_second: limit.packets_per_second,
        burst: limit.burst.duration(),
    }
}

impl fmt::Debug for SharedDatapath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("SharedDatapath")
            .finish_non_exhaustive()
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::result::Result<T, DatapathError> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(AgentError::Io {
            what: "finish work on the eBPF network".into(),
            source: std::io::Error::other(error),
        }),
    }
}

/// A device name of at most 15 bytes, the same for the same `identity`.
pub(super) fn device_name(prefix: &str, identity: &str) -> String {
    format!("{prefix}{:08x}", hash_number(identity))
}

/// The Ethernet address of a network's gateway, the same at every start and on every host; locally
/// administered (IEEE 802c).
fn router_mac(network: &str) -> MacAddress {
    let hash = Sha256::digest(format!("gateway of {network}"));
    MacAddress([0x02, hash[0], hash[1], hash[2], hash[3], hash[4]])
}

/// What the eBPF programs know a network by. Zero stands for no network.
pub fn network_number(name: &str) -> u32 {
    hash_number(name).max(1)
}

/// The same number for the same `identity`.
fn hash_number(identity: &str) -> u32 {
    let hash = Sha256::digest(identity);
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_fit_and_differ() {
        let one = device_name(TAP_PREFIX, "web/eth0");
        assert!(one.len() < libc::IFNAMSIZ);
        assert_ne!(one, device_name(TAP_PREFIX, "web/eth1"));
        assert_eq!(one, device_name(TAP_PREFIX, "web/eth0"));
    }
}
