//! A network that guests share.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::guest_configuration::{self, Dns, Route};
use crate::metadata::{Condition, ObjectMeta};
use crate::units::TimeLimit;
use crate::{FieldError, MacAddress, Uplink};

/// The smallest MTU an IPv4 host must accept (RFC 791), and the largest that Ethernet devices take.
const MTU_RANGE: std::ops::RangeInclusive<u16> = 576..=9000;
/// The smallest MTU of IPv6 (RFC 8200, 5).
const IPV6_MTU: u16 = 1280;
/// Prefix lengths of IPv6 subnets: room for hosts, and the first 96 bits can't make them all.
const IPV6_PREFIXES: std::ops::RangeInclusive<u8> = 48..=120;

/// Subnets of guests, of IPv4, IPv6 or both: on each host a bridge that holds the gateway's address, with guests as ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Network {
    /// Always [`crate::API_VERSION`].
    pub api_version: String,
    /// Always `Network`.
    pub kind: String,
    /// The name by which interfaces refer to it.
    pub metadata: ObjectMeta,
    /// Its addresses.
    pub spec: NetworkSpec,
    /// What the agent observed.
    #[serde(default)]
    pub status: NetworkStatus,
}

/// A network's addresses, and what guests are told of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "switches, as manifests have them"
)]
pub struct NetworkSpec {
    /// The subnet, such as `10.77.0.0/24`. Without one, guests have no IPv4 in this network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Ipv4Net>,
    /// The host's address in it; the subnet's first where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Ipv4Addr>,
    /// The IPv6 subnet, such as `fd77::/64`. Without one, guests have no IPv6 in this network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet_v6: Option<Ipv6Net>,
    /// The host's address in it; the subnet's first where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v6: Option<Ipv6Addr>,
    /// The largest packet, in bytes.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Whether guests are kept apart from each other: they then reach only the host and what is
    /// beyond it, whatever their security groups say.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub isolated: bool,
    /// How guests of several hosts reach each other; without it, those of each host are on their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
    /// How guests resolve names.
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
    /// Networks that guests reach by other ways than the default one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Whether guests are told that the gateway is the way to everywhere.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub default_route: bool,
    /// Whether the host answers guests' DHCP and DHCPv6.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub dhcp: bool,
    /// How long guests may use their addresses without asking again.
    #[serde(
        default = "default_lease_time",
        skip_serializing_if = "is_default_lease_time"
    )]
    pub lease_time: TimeLimit,
    /// Whether the host sends router advertisements, where the network has IPv6.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub router_advertisements: bool,
    /// Whether guests make their IPv6 addresses of the subnet and their MAC addresses (SLAAC, RFC 4862), so
    /// that a kernel needs no DHCPv6 client. Otherwise the lowest free ones are allocated.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub slaac: bool,
    /// How guests reach what is outside; without it the host routes what they send, as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<Uplink>,
}

/// How a network spans hosts: by VXLAN (RFC 7348) between the hosts' tunnel addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Overlay {
    /// The VXLAN network identifier, 1 to 16777215, which no other network has; the lowest free one where not
    /// given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
}

/// VXLAN network identifiers: 24 bits, and zero is left out.
const VNIS: std::ops::RangeInclusive<u32> = 1..=0x00ff_ffff;

fn default_mtu() -> u16 {
    1500
}

fn yes() -> bool {
    true
}

// Serde passes references.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_yes(value: &bool) -> bool {
    *value
}

fn default_lease_time() -> TimeLimit {
    TimeLimit::from_secs(24 * 3600)
}

fn is_default_lease_time(time: &TimeLimit) -> bool {
    *time == default_lease_time()
}

impl Default for NetworkSpec {
    /// No subnet yet, everything else as where a manifest does not say it.
    fn default() -> Self {
        Self {
            subnet: None,
            gateway: None,
            subnet_v6: None,
            gateway_v6: None,
            mtu: default_mtu(),
            isolated: false,
            overlay: None,
            dns: Dns::default(),
            routes: Vec::new(),
            default_route: true,
            dhcp: true,
            lease_time: default_lease_time(),
            router_advertisements: true,
            slaac: false,
            uplink: None,
        }
    }
}

impl NetworkSpec {
    /// The host's address in the network, if that has IPv4.
    pub fn gateway(&self) -> Option<Ipv4Addr> {
        let subnet = self.subnet?;
        let gateway = self.gateway.or_else(|| subnet.hosts().next());
        Some(gateway.unwrap_or(subnet.addr()))
    }

    /// Why `address` can be no guest's in this network, if so.
    pub fn refuse_address(&self, address: Ipv4Addr) -> Option<String> {
        let Some(subnet) = self.subnet else {
            return Some("the network has no IPv4 subnet; give it spec.subnet".into());
        };
        let subnet = subnet.trunc();
        if !subnet.contains(&address) {
            return Some(format!(
                "{address} is outside the network's subnet {subnet}"
            ));
        }
        if address == subnet.network() || address == subnet.broadcast() {
            return Some(format!(
                "{address} is the network or broadcast address of {subnet}"
            ));
        }
        (Some(address) == self.gateway())
            .then(|| format!("{address} is the network's gateway, which the host holds"))
    }

    /// The host's IPv6 address in the network, if that has IPv6.
    pub fn gateway_v6(&self) -> Option<Ipv6Addr> {
        let subnet = self.subnet_v6?;
        let first = Ipv6Addr::from_bits(subnet.network().to_bits() + 1);
        Some(self.gateway_v6.unwrap_or(first))
    }

    /// Why the IPv6 `address` can be no guest's in this network, if so.
    pub fn refuse_address_v6(&self, address: Ipv6Addr) -> Option<String> {
        let Some(subnet) = self.subnet_v6 else {
            return Some("the network has no IPv6 subnet; give it spec.subnetV6".into());
        };
        if !subnet.contains(&address) {
            return Some(format!(
                "{address} is outside the network's subnet {}",
                subnet.trunc()
            ));
        }
        if address == subnet.network() {
            return Some(format!(
                "{address} is the routers' anycast address of {}",
                subnet.trunc()
            ));
        }
        (Some(address) == self.gateway_v6())
            .then(|| format!("{address} is the network's gateway, which the host holds"))
    }

    /// The IPv6 address that a guest with this MAC address makes by itself, in a network with SLAAC
    /// (RFC 4291, appendix A).
    pub fn slaac_address(&self, mac: MacAddress) -> Option<Ipv6Addr> {
        let subnet = self.subnet_v6.filter(|_| self.slaac)?;
        let prefix = subnet.network().to_bits();
        let identifier = u128::from(mac.interface_identifier());
        Some(Ipv6Addr::from_bits(prefix | identifier))
    }

    fn validate_v6(&self, errors: &mut Vec<FieldError>) {
        let Some(subnet) = self.subnet_v6 else {
            if self.gateway_v6.is_some() {
                errors.push(FieldError::new(
                    "spec.gatewayV6",
                    "is given without spec.subnetV6",
                ));
            }
            return;
        };
        if subnet != subnet.trunc() {
            errors.push(FieldError::new(
                "spec.subnetV6",
                format!("{subnet} has host bits set; write {}", subnet.trunc()),
            ));
        }
        if !IPV6_PREFIXES.contains(&subnet.prefix_len()) {
            errors.push(FieldError::new(
                "spec.subnetV6",
                format!(
                    "has a /{} prefix; give one from /48 to /120",
                    subnet.prefix_len()
                ),
            ));
        }
        let first = subnet.addr();
        if first.is_multicast()
            || first.is_unicast_link_local()
            || first.to_ipv4_mapped().is_some()
            || first.to_bits() >> 64 == 0
        {
            errors.push(FieldError::new(
                "spec.subnetV6",
                format!("{subnet} holds no hosts' addresses; write e.g. fd77::/64"),
            ));
        }
        if let Some(gateway) = self.gateway_v6
            && (!subnet.contains(&gateway) || gateway == subnet.network())
        {
            errors.push(FieldError::new(
                "spec.gatewayV6",
                format!("{gateway} is no host address of {subnet}"),
            ));
        }
        if self.mtu < IPV6_MTU {
            errors.push(FieldError::new(
                "spec.mtu",
                format!("is {}; IPv6 needs at least {IPV6_MTU}", self.mtu),
            ));
        }
    }

    fn validate_v4(&self, errors: &mut Vec<FieldError>) {
        let Some(subnet) = self.subnet else {
            if self.gateway.is_some() {
                errors.push(FieldError::new(
                    "spec.gateway",
                    "is given without spec.subnet",
                ));
            }
            return;
        };
        if subnet != subnet.trunc() {
            errors.push(FieldError::new(
                "spec.subnet",
                format!("{subnet} has host bits set; write {}", subnet.trunc()),
            ));
        }
        if !(8..=30).contains(&subnet.prefix_len()) {
            errors.push(FieldError::new(
                "spec.subnet",
                format!(
                    "has a /{} prefix; give one from /8 to /30",
                    subnet.prefix_len()
                ),
            ));
        } else if let Some(gateway) = self.gateway
            && (!subnet.contains(&gateway)
                || gateway == subnet.trunc().network()
                || gateway == subnet.broadcast())
        {
            let first = subnet.hosts().next().unwrap_or(gateway);
            errors.push(FieldError::new(
                "spec.gateway",
                format!("{gateway} is no host address of {subnet}; write e.g. {first}"),
            ));
        }
    }

    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        if self.subnet.is_none() && self.subnet_v6.is_none() {
            errors.push(FieldError::new(
                "spec.subnet",
                "is missing; give it, spec.subnetV6 or both",
            ));
        }
        self.validate_v4(errors);
        self.validate_v6(errors);
        guest_configuration::validate(self, errors);
        if let Some(uplink) = &self.uplink {
            uplink.validate(errors);
        }
        if let Some(vni) = self.overlay.and_then(|overlay| overlay.vni)
            && !VNIS.contains(&vni)
        {
            let message = format!("is {vni}; give 1 to {}", VNIS.end());
            errors.push(FieldError::new("spec.overlay.vni", message));
        }
        if !MTU_RANGE.contains(&self.mtu) {
            errors.push(FieldError::new(
                "spec.mtu",
                format!("is {}; give 576 to 9000", self.mtu),
            ));
        }
    }
}

/// What the agent observed of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkStatus {
    /// The host's bridge device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// `Ready`: the bridge is up with the gateway's address; where there is an uplink, `UplinkReady`: guests
    /// reach what is outside by it.
    pub conditions: Vec<Condition>,
}
