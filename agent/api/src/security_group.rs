//! What may reach a guest.

use std::fmt;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::metadata::{Condition, ObjectMeta};

/// The most rules one group may hold.
const RULE_LIMIT: usize = 64;

/// Rules that allow packets toward a guest. What no group of a guest allows, nor answers a
/// connection of the guest's own, is dropped and counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecurityGroup {
    /// Always [`crate::API_VERSION`].
    pub api_version: String,
    /// Always `SecurityGroup`.
    pub kind: String,
    /// The name by which interfaces refer to it.
    pub metadata: ObjectMeta,
    /// Its rules.
    pub spec: SecurityGroupSpec,
    /// What the agent observed.
    #[serde(default)]
    pub status: SecurityGroupStatus,
}

/// A group's rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecurityGroupSpec {
    /// What may reach the guest; nothing where empty.
    #[serde(default)]
    pub ingress: Vec<IngressRule>,
}

/// One kind of packet that may reach the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IngressRule {
    /// The protocol over IPv4.
    pub protocol: Protocol,
    /// Destination ports of `tcp` or `udp`; all where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortRange>,
    /// Source networks; anywhere where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<Ipv4Net>,
}

/// A protocol over IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Every protocol.
    Any,
    /// ICMP, all types.
    Icmp,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Ports from `first` to `last`, both included; written as `80` or `8000-8100`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PortRangeText", into = "PortRangeText")]
pub struct PortRange {
    /// The lowest port.
    pub first: u16,
    /// The highest port.
    pub last: u16,
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is no port; write e.g. 80 or 8000-8100");
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = Self {
            first: first.parse().map_err(|_| error())?,
            last: last.parse().map_err(|_| error())?,
        };
        if range.first == 0 || range.first > range.last {
            Err(error())
        } else {
            Ok(range)
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(formatter, "{}", self.first)
        } else {
            write!(formatter, "{}-{}", self.first, self.last)
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PortRangeText {
    Number(u64),
    Text(String),
}

impl TryFrom<PortRangeText> for PortRange {
    type Error = String;

    fn try_from(text: PortRangeText) -> Result<Self, String> {
        match text {
            PortRangeText::Number(number) => number.to_string().parse(),
            PortRangeText::Text(text) => text.parse(),
        }
    }
}

impl From<PortRange> for PortRangeText {
    fn from(range: PortRange) -> Self {
        if range.first == range.last {
            Self::Number(range.first.into())
        } else {
            Self::Text(range.to_string())
        }
    }
}

impl SecurityGroupSpec {
    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        if self.ingress.len() > RULE_LIMIT {
            errors.push(FieldError::new(
                "spec.ingress",
                format!(
                    "has {} rules; at most {RULE_LIMIT} fit in one group",
                    self.ingress.len()
                ),
            ));
        }
        for (index, rule) in self.ingress.iter().enumerate() {
            let has_ports = matches!(rule.protocol, Protocol::Tcp | Protocol::Udp);
            if !rule.ports.is_empty() && !has_ports {
                errors.push(FieldError::new(
                    format!("spec.ingress[{index}].ports"),
                    "only tcp and udp have ports; leave it out or change the protocol",
                ));
            }
            for (position, network) in rule.from.iter().enumerate() {
                if *network != network.trunc() {
                    errors.push(FieldError::new(
                        format!("spec.ingress[{index}].from[{position}]"),
                        format!("{network} has host bits set; write {}", network.trunc()),
                    ));
                }
            }
        }
    }
}

/// What the agent observed of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SecurityGroupStatus {
    /// `Ready`: the rules are in force on all interfaces that name the group.
    pub conditions: Vec<Condition>,
}
