//! How guests of a network reach what is outside of their host.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::Ipv6Net;
use serde::{Deserialize, Serialize};

use crate::{FieldError, NetworkSpec, PortRange};

/// The longest name of a network device (`IFNAMSIZ`, without its zero byte).
const NAME_LIMIT: usize = 15;
/// External ports that one interface may be allowed at a time; what the eBPF programs take.
const PORTS_PER_INTERFACE: RangeInclusive<u32> = 64..=65_536;
/// Addresses that aren't routed in the Internet (RFC 4193).
const UNIQUE_LOCAL: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7);

/// The device by which guests of a network reach what is outside, and whose ports can be forwarded to them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Uplink {
    /// The host's network device, such as `eth0`: Ethernet, or a VLAN or bond of such.
    pub device: String,
    /// The device's address that packets get, of several; its first one where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// The same of IPv6; its first global one where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_v6: Option<Ipv6Addr>,
    /// How what guests send is translated.
    #[serde(default, skip_serializing_if = "SourceNat::is_default")]
    pub source_nat: SourceNat,
}

/// How guests share the address of an uplink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SourceNat {
    /// Whether IPv4 packets get the uplink's address.
    pub ipv4: bool,
    /// Whether IPv6 packets get the uplink's address. Where not given, those of unique local addresses
    /// (`fc00::/7`) do; global ones are routed as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<bool>,
    /// The ports of the uplink's address that guests get. They must be apart from
    /// `net.ipv4.ip_local_port_range`, and from what the host listens on.
    pub ports: PortRange,
    /// External ports that each interface can have at a time, 64 to 65536; the least recently used make
    /// room.
    pub ports_per_interface: u32,
}

impl Default for SourceNat {
    /// The ports above those which Linux gives to the host's own connections by default.
    fn default() -> Self {
        Self {
            ipv4: true,
            ipv6: None,
            ports: PortRange {
                first: 61_000,
                last: 65_535,
            },
            ports_per_interface: 1024,
        }
    }
}

impl SourceNat {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether IPv6 packets of a network are translated.
    pub fn translates_ipv6(&self, network: &NetworkSpec) -> bool {
        let is_local = |subnet: Ipv6Net| UNIQUE_LOCAL.contains(&subnet);
        self.ipv6
            .unwrap_or_else(|| network.subnet_v6.is_some_and(is_local))
    }
}

impl Uplink {
    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        let field = |name: &str| format!("spec.uplink.{name}");
        let is_word = |c: char| !c.is_whitespace() && c != '/' && c != ':';
        let is_name = self.device.len() <= NAME_LIMIT && self.device.chars().all(is_word);
        if self.device.is_empty() || matches!(self.device.as_str(), "." | "..") || !is_name {
            let message = format!(
                "{:?} is no name of a network device; `ip link` lists them",
                self.device
            );
            errors.push(FieldError::new(field("device"), message));
        }
        if let Some(address) = self.address
            && (address.is_unspecified() || address.is_multicast() || address.is_loopback())
        {
            let message = format!("{address} can't be one host's");
            errors.push(FieldError::new(field("address"), message));
        }
        if let Some(address) = self.address_v6
            && (address.is_unspecified()
                || address.is_multicast()
                || address.is_loopback()
                || address.is_unicast_link_local()
                || address.to_ipv4_mapped().is_some())
        {
            let message = format!("{address} is no address by which others reach this host");
            errors.push(FieldError::new(field("addressV6"), message));
        }
        let limit = self.source_nat.ports_per_interface;
        if !PORTS_PER_INTERFACE.contains(&limit) {
            let message = format!("is {limit}; give 64 to 65536");
            let field = field("sourceNat.portsPerInterface");
            errors.push(FieldError::new(field, message));
        }
    }
}
