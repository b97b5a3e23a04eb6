//! A network that guests share.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::metadata::{Condition, ObjectMeta};

/// The smallest MTU an IPv4 host must accept (RFC 791), and the largest that Ethernet devices take.
const MTU_RANGE: std::ops::RangeInclusive<u16> = 576..=9000;

/// An IPv4 subnet on this host: a bridge that holds the gateway's address, with guests as ports.
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

/// A network's addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkSpec {
    /// The subnet, such as `10.77.0.0/24`.
    pub subnet: Ipv4Net,
    /// The host's address in it; the subnet's first where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Ipv4Addr>,
    /// The largest packet, in bytes.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
}

fn default_mtu() -> u16 {
    1500
}

impl NetworkSpec {
    /// The host's address in the network.
    pub fn gateway(&self) -> Ipv4Addr {
        self.gateway
            .or_else(|| self.subnet.hosts().next())
            .unwrap_or(self.subnet.addr())
    }

    /// Why `address` can be no guest's in this network, if so.
    pub fn refuse_address(&self, address: Ipv4Addr) -> Option<String> {
        let subnet = self.subnet.trunc();
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
        (address == self.gateway())
            .then(|| format!("{address} is the network's gateway, which the host holds"))
    }

    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        let subnet = self.subnet;
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
        } else if let Some(gateway) = self.gateway {
            let without_gateway = Self {
                gateway: None,
                ..self.clone()
            };
            if !subnet.contains(&gateway)
                || gateway == subnet.trunc().network()
                || gateway == subnet.broadcast()
            {
                errors.push(FieldError::new(
                    "spec.gateway",
                    format!(
                        "{gateway} is no host address of {subnet}; write e.g. {}",
                        without_gateway.gateway()
                    ),
                ));
            }
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
    /// `Ready`: the bridge is up with the gateway's address.
    pub conditions: Vec<Condition>,
}
