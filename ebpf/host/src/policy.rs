//! What a guest interface may send and receive, as the agent says it.

use std::fmt;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::address::{Ipv4Prefix, MacAddress};
use crate::error::DatapathError;

/// Rules that one interface may have per direction.
pub const MAX_RULES: usize = 1024;

/// The identity and rules of one guest interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfacePolicy {
    /// Name of the TAP device, 1 to 15 bytes.
    pub name: String,
    /// The guest's MAC address (not the TAP device's).
    pub mac: MacAddress,
    /// The guest's IPv4 address.
    pub ipv4: Ipv4Addr,
    /// What may reach the guest besides replies to what it opened itself, and ARP.
    pub ingress: Vec<Rule>,
    /// What the guest may send besides replies to what `ingress` let in, and ARP.
    pub egress: EgressPolicy,
}

/// What a guest may send, in its own name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EgressPolicy {
    /// Anything.
    #[default]
    AllowAll,
    /// Only what one of these rules allows.
    Only(Vec<Rule>),
}

/// Allows a protocol, a range of ports and a network of peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The protocol.
    pub protocol: Protocol,
    /// Destination ports: the guest's for ingress, the peer's for egress. [`Rule::ALL_PORTS`] for
    /// protocols without ports.
    pub ports: RangeInclusive<u16>,
    /// Where the traffic comes from (ingress) or goes to (egress).
    pub peer: Ipv4Prefix,
}

impl Rule {
    /// Every port.
    pub const ALL_PORTS: RangeInclusive<u16> = 0..=u16::MAX;
}

/// Protocols that a rule can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Every IP protocol, also those that have no name here.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP, all types.
    Icmp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Any => "any",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

/// Text that names no [`Protocol`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a protocol; use tcp, udp, icmp or any")]
pub struct UnknownProtocol(String);

impl FromStr for Protocol {
    type Err = UnknownProtocol;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "any" => Ok(Self::Any),
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "icmp" => Ok(Self::Icmp),
            other => Err(UnknownProtocol(other.to_owned())),
        }
    }
}

impl InterfacePolicy {
    /// Checks everything that can be checked without the kernel.
    pub fn validate(&self) -> Result<(), DatapathError> {
        let name = self.name.as_bytes();
        if name.is_empty() || name.len() > 15 || name.contains(&0) || name.contains(&b'/') {
            return Err(self.invalid("name", "an interface name has 1 to 15 bytes, no slash"));
        }
        if !self.mac.is_unicast() {
            return Err(self.invalid("mac", format!("{} can't be one guest's address", self.mac)));
        }
        if self.ipv4.is_unspecified()
            || self.ipv4.is_broadcast()
            || self.ipv4.is_multicast()
            || self.ipv4.is_loopback()
        {
            return Err(self.invalid("ipv4", format!("{} can't be a guest's address", self.ipv4)));
        }
        self.validate_rules("ingress", &self.ingress)?;
        match &self.egress {
            EgressPolicy::AllowAll => Ok(()),
            EgressPolicy::Only(rules) => self.validate_rules("egress", rules),
        }
    }

    fn validate_rules(&self, direction: &str, rules: &[Rule]) -> Result<(), DatapathError> {
        if rules.len() > MAX_RULES {
            let problem = format!(
                "{} rules, but at most {MAX_RULES} are supported",
                rules.len()
            );
            return Err(self.invalid(direction, problem));
        }
        for (index, rule) in rules.iter().enumerate() {
            let field = format!("{direction}[{index}].ports");
            if rule.ports.is_empty() {
                let (first, last) = (rule.ports.start(), rule.ports.end());
                return Err(self.invalid(field, format!("the range {first}-{last} is empty")));
            }
            if matches!(rule.protocol, Protocol::Any | Protocol::Icmp)
                && rule.ports != Rule::ALL_PORTS
            {
                let problem = format!("protocol {} takes no ports", rule.protocol);
                return Err(self.invalid(field, problem));
            }
        }
        Ok(())
    }

    pub(crate) fn invalid(
        &self,
        field: impl Into<String>,
        problem: impl Into<String>,
    ) -> DatapathError {
        DatapathError::InvalidPolicy {
            interface: self.name.clone(),
            field: field.into(),
            problem: problem.into(),
        }
    }
}
