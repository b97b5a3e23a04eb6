//! What may reach a guest, and what it may reach.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::metadata::{Condition, ObjectMeta, validate_name};
use crate::rule::{IcmpType, PortRange, Protocol};

/// The most rules one group may hold per direction.
const RULE_LIMIT: usize = 1024;
/// The most networks, or groups, that one rule may name.
const PEER_LIMIT: usize = 1024;

/// Rules that allow packets to and from a guest. They are stateful: an answer to what a rule allowed
/// needs no rule. What no group of an interface allows toward the guest is dropped and counted; from
/// the guest everything is allowed, unless a group of it has egress rules.
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
    /// What the guest may reach. Where no group of an interface has this, everything; an empty list
    /// allows nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<EgressRule>>,
}

/// One kind of packet that may reach the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IngressRule {
    /// The protocol.
    pub protocol: Protocol,
    /// Destination ports of `tcp` or `udp`; all where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortRange>,
    /// Types of `icmp` or `icmpv6`; all where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub icmp_types: Vec<IcmpType>,
    /// Source networks. Where this and `fromGroups` are empty, anywhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<IpNet>,
    /// `SecurityGroup` objects: the addresses of all interfaces that are in one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from_groups: Vec<String>,
}

/// One kind of packet that the guest may send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressRule {
    /// The protocol.
    pub protocol: Protocol,
    /// Destination ports of `tcp` or `udp`; all where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortRange>,
    /// Types of `icmp` or `icmpv6`; all where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub icmp_types: Vec<IcmpType>,
    /// Destination networks. Where this and `toGroups` are empty, anywhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<IpNet>,
    /// `SecurityGroup` objects: the addresses of all interfaces that are in one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to_groups: Vec<String>,
}

/// A rule of either direction.
#[derive(Clone, Copy, Debug)]
pub struct RuleParts<'a> {
    /// The protocol.
    pub protocol: Protocol,
    /// Destination ports.
    pub ports: &'a [PortRange],
    /// ICMP types.
    pub icmp_types: &'a [IcmpType],
    /// Networks of the other side.
    pub networks: &'a [IpNet],
    /// Groups of the other side.
    pub groups: &'a [String],
}

impl IngressRule {
    /// The rule without its direction.
    pub fn parts(&self) -> RuleParts<'_> {
        RuleParts {
            protocol: self.protocol,
            ports: &self.ports,
            icmp_types: &self.icmp_types,
            networks: &self.from,
            groups: &self.from_groups,
        }
    }
}

impl EgressRule {
    /// The rule without its direction.
    pub fn parts(&self) -> RuleParts<'_> {
        RuleParts {
            protocol: self.protocol,
            ports: &self.ports,
            icmp_types: &self.icmp_types,
            networks: &self.to,
            groups: &self.to_groups,
        }
    }
}

impl SecurityGroupSpec {
    /// The groups that the rules name, with the fields that do.
    pub fn references(&self) -> impl Iterator<Item = (String, &str)> {
        let ingress = self.ingress.iter().enumerate().map(|(index, rule)| {
            let field = format!("spec.ingress[{index}].fromGroups");
            (field, &rule.from_groups)
        });
        let egress = self.egress.iter().flatten().enumerate();
        let egress = egress.map(|(index, rule)| {
            let field = format!("spec.egress[{index}].toGroups");
            (field, &rule.to_groups)
        });
        ingress.chain(egress).flat_map(|(field, groups)| {
            groups
                .iter()
                .enumerate()
                .map(move |(position, group)| (format!("{field}[{position}]"), group.as_str()))
        })
    }

    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        let ingress: Vec<_> = self.ingress.iter().map(IngressRule::parts).collect();
        let egress: Vec<_> = self
            .egress
            .iter()
            .flatten()
            .map(EgressRule::parts)
            .collect();
        validate_rules("ingress", "from", &ingress, errors);
        validate_rules("egress", "to", &egress, errors);
        for (field, group) in self.references() {
            if let Err(message) = validate_name(group) {
                errors.push(FieldError::new(field, message));
            }
        }
    }
}

fn validate_rules(
    direction: &str,
    peers: &str,
    rules: &[RuleParts<'_>],
    errors: &mut Vec<FieldError>,
) {
    if rules.len() > RULE_LIMIT {
        errors.push(FieldError::new(
            format!("spec.{direction}"),
            format!(
                "has {} rules; at most {RULE_LIMIT} fit in one group",
                rules.len()
            ),
        ));
    }
    for (index, rule) in rules.iter().enumerate() {
        let field = |name: &str| format!("spec.{direction}[{index}].{name}");
        if !rule.ports.is_empty() && !matches!(rule.protocol, Protocol::Tcp | Protocol::Udp) {
            errors.push(FieldError::new(
                field("ports"),
                "only tcp and udp have ports; leave it out or change the protocol",
            ));
        }
        let is_icmp = matches!(rule.protocol, Protocol::Icmp | Protocol::Icmpv6);
        if !rule.icmp_types.is_empty() && !is_icmp {
            errors.push(FieldError::new(
                field("icmpTypes"),
                "only icmp and icmpv6 have types; leave it out or change the protocol",
            ));
        }
        if rule.networks.len() > PEER_LIMIT || rule.groups.len() > PEER_LIMIT {
            errors.push(FieldError::new(
                field(peers),
                format!("names more than {PEER_LIMIT}; split the rule"),
            ));
        }
        for (position, network) in rule.networks.iter().enumerate() {
            let field = || format!("spec.{direction}[{index}].{peers}[{position}]");
            if *network != network.trunc() {
                let message = format!("{network} has host bits set; write {}", network.trunc());
                errors.push(FieldError::new(field(), message));
            }
            let family_fits = match rule.protocol {
                Protocol::Icmp => matches!(network, IpNet::V4(_)),
                Protocol::Icmpv6 => matches!(network, IpNet::V6(_)),
                _ => true,
            };
            if !family_fits {
                let message = format!("{network} is of the other version of IP than the protocol");
                errors.push(FieldError::new(field(), message));
            }
            if let IpNet::V6(ipv6) = network
                && ipv6.addr().to_ipv4_mapped().is_some()
            {
                let message = format!("{network} stands for IPv4 addresses; write those");
                errors.push(FieldError::new(field(), message));
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
