//! What a guest interface may send and receive, as the agent says it.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use keelson_ebpf_common::{SERVICE_MAC, UNCOUNTED};

use crate::address::{IpPrefix, MacAddress};
use crate::error::DatapathError;
use crate::limits::InterfaceLimits;
use crate::questions::Answers;

/// Rules that one interface may have per direction.
pub const MAX_RULES: usize = 1 << 17;
/// Counters that the rules of one interface may name per direction.
pub const MAX_COUNTERS: usize = 1024;

/// The identity and rules of one guest interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfacePolicy {
    /// Name of the TAP device, 1 to 15 bytes.
    pub name: String,
    /// The guest's MAC address (not the TAP device's).
    pub mac: MacAddress,
    /// The guest's IPv4 address, if it has one.
    pub ipv4: Option<Ipv4Addr>,
    /// The guest's IPv6 address, if it has one; it then has a link-local one as well, made of its
    /// MAC address.
    pub ipv6: Option<Ipv6Addr>,
    /// Number of the network that the interface is in: what is for another guest of the same network
    /// goes straight to it. Zero for none.
    pub network: u32,
    /// Whether guests of the network are kept apart from each other.
    pub isolated: bool,
    /// Whether guests of the network may be on other hosts
    /// ([`Datapath::set_remote`](crate::Datapath::set_remote)).
    pub spans_hosts: bool,
    /// The largest IP packet that the guest may send, in bytes.
    pub mtu: u16,
    /// Which questions about the guest's configuration are answered.
    pub answers: Answers,
    /// How much may pass per second.
    pub limits: InterfaceLimits,
    /// What may reach the guest besides replies to what it opened itself, ARP and neighbour discovery.
    pub ingress: Vec<Rule>,
    /// What the guest may send besides replies to what `ingress` let in, ARP and neighbour discovery.
    pub egress: EgressPolicy,
}

impl Default for InterfacePolicy {
    /// Addresses of nobody, an Ethernet's MTU, nothing in, everything out.
    fn default() -> Self {
        Self {
            name: String::new(),
            mac: MacAddress([0; 6]),
            ipv4: None,
            ipv6: None,
            network: 0,
            isolated: false,
            spans_hosts: false,
            mtu: 1500,
            answers: Answers::default(),
            limits: InterfaceLimits::default(),
            ingress: Vec::new(),
            egress: EgressPolicy::AllowAll,
        }
    }
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
    /// Destination ports: the guest's for ingress, the peer's for egress. For ICMP, 256 times the
    /// type plus the code, see [`Rule::icmp_type`]. [`Rule::ALL_PORTS`] for every protocol.
    pub ports: RangeInclusive<u16>,
    /// Where the traffic comes from (ingress) or goes to (egress).
    pub peer: IpPrefix,
    /// Which counter of the interface's counts what the rule lets pass; zero for none. Rules may share
    /// one. It goes on for as long as the interface's rules name it. Of several rules that allow a
    /// packet, the one whose counter is named first counts.
    pub counter: u64,
}

impl Rule {
    /// Every port.
    pub const ALL_PORTS: RangeInclusive<u16> = 0..=u16::MAX;

    /// What [`Rule::ports`] says of an ICMP type, and of one code where given.
    pub fn icmp_type(icmp_type: u8, code: Option<u8>) -> RangeInclusive<u16> {
        let of = |code| u16::from_be_bytes([icmp_type, code]);
        match code {
            Some(code) => of(code)..=of(code),
            None => of(0)..=of(u8::MAX),
        }
    }

    /// Whether the rule allows what `protocol` (an IP protocol number) with `port` to or from `peer`
    /// is; the port as in [`Rule::ports`].
    pub fn allows(&self, peer: IpAddr, protocol: u8, port: u16) -> bool {
        self.peer.contains(peer)
            && match self.protocol {
                Protocol::Any => true,
                own => own.number() == protocol && self.ports.contains(&port),
            }
    }
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
    /// ICMP over IPv4.
    Icmp,
    /// ICMPv6, but for neighbour discovery, which needs no rule.
    Icmpv6,
    /// Another IP protocol by its number, such as 132 for SCTP; it has no ports here.
    Number(u8),
}

impl Protocol {
    /// The IP protocol number; zero for [`Protocol::Any`].
    pub const fn number(self) -> u8 {
        match self {
            Self::Any => 0,
            Self::Icmp => 1,
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Icmpv6 => 58,
            Self::Number(number) => number,
        }
    }

    /// TCP or UDP, where a map has its number.
    pub(crate) fn from_number(number: u8) -> Self {
        [Self::Tcp, Self::Udp]
            .into_iter()
            .find(|protocol| protocol.number() == number)
            .unwrap_or(Self::Number(number))
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => formatter.write_str("any"),
            Self::Tcp => formatter.write_str("tcp"),
            Self::Udp => formatter.write_str("udp"),
            Self::Icmp => formatter.write_str("icmp"),
            Self::Icmpv6 => formatter.write_str("icmpv6"),
            Self::Number(number) => write!(formatter, "{number}"),
        }
    }
}

/// Text that names no [`Protocol`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a protocol; use tcp, udp, icmp, icmpv6, any or a number")]
pub struct UnknownProtocol(String);

impl FromStr for Protocol {
    type Err = UnknownProtocol;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "any" => Ok(Self::Any),
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "icmp" => Ok(Self::Icmp),
            "icmpv6" => Ok(Self::Icmpv6),
            other => match other.parse() {
                Ok(number) => Ok(Self::Number(number)),
                Err(_) => Err(UnknownProtocol(other.to_owned())),
            },
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
        if self.mac.0 == SERVICE_MAC {
            return Err(self.invalid("mac", format!("{} is that of all services", self.mac)));
        }
        if let Some(ipv4) = self.ipv4.filter(|ipv4| {
            ipv4.is_unspecified()
                || ipv4.is_broadcast()
                || ipv4.is_multicast()
                || ipv4.is_loopback()
        }) {
            return Err(self.invalid("ipv4", format!("{ipv4} can't be a guest's address")));
        }
        if let Some(ipv6) = self.ipv6.filter(|ipv6| {
            ipv6.is_unspecified()
                || ipv6.is_multicast()
                || ipv6.is_loopback()
                || ipv6.is_unicast_link_local()
                || ipv6.to_ipv4_mapped().is_some()
        }) {
            return Err(self.invalid("ipv6", format!("{ipv6} can't be a guest's address")));
        }
        if self.mtu < 576 {
            return Err(self.invalid("mtu", format!("{} is less than 576", self.mtu)));
        }
        for (direction, limit) in [
            ("from_guest", &self.limits.from_guest),
            ("to_guest", &self.limits.to_guest),
        ] {
            limit.check().map_err(|(field, problem)| {
                self.invalid(format!("limits.{direction}.{field}"), problem)
            })?;
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
        if counters(rules).len() > MAX_COUNTERS {
            let problem = format!("the rules name more than {MAX_COUNTERS} counters");
            return Err(self.invalid(direction, problem));
        }
        for (index, rule) in rules.iter().enumerate() {
            let field = format!("{direction}[{index}].ports");
            if rule.ports.is_empty() {
                let (first, last) = (rule.ports.start(), rule.ports.end());
                return Err(self.invalid(field, format!("the range {first}-{last} is empty")));
            }
            if matches!(rule.protocol, Protocol::Any | Protocol::Number(_))
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

/// The counters that rules name.
pub fn counters(rules: &[Rule]) -> BTreeSet<u64> {
    let counters = rules.iter().map(|rule| rule.counter);
    counters.filter(|counter| *counter != UNCOUNTED).collect()
}
