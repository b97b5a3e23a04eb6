//! The rules of an interface's security groups, with the groups that they name resolved, and what
//! counts them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use keelson_api::{EgressRule, IngressRule, Interface, RuleParts, SecurityGroup};
use keelson_ebpf::Direction;
use sha2::{Digest, Sha256};

use crate::host::{ResolvedRule, Rules};
use crate::view::View;

/// Which addresses are in which security groups.
pub type Memberships = BTreeSet<(String, IpAddr)>;

/// Rules of an interface that are counted per direction: the first ones of its groups.
const COUNTED_RULES: usize = keelson_ebpf::MAX_COUNTERS;

/// What counts one rule of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleCounter {
    /// The rule's group.
    pub group: String,
    /// Its place in the group's `ingress` or `egress`.
    pub index: usize,
    /// The counter's number: that of the same rule of the same group, wherever it stands there.
    pub counter: u64,
}

impl RuleCounter {
    /// The rule as messages name it.
    pub fn rule(&self, direction: Direction) -> String {
        let field = match direction {
            Direction::FromGuest => "egress",
            Direction::ToGuest => "ingress",
        };
        format!("SecurityGroup/{} spec.{field}[{}]", self.group, self.index)
    }
}

/// What counts the rules of an interface in `groups`, in their order.
pub fn rule_counters<'a>(
    groups: impl IntoIterator<Item = &'a SecurityGroup>,
    direction: Direction,
) -> Vec<RuleCounter> {
    let mut seen = BTreeMap::new();
    let mut counters = Vec::new();
    for group in groups {
        let name = &group.metadata.name;
        let rules: Vec<String> = match direction {
            Direction::ToGuest => group.spec.ingress.iter().map(identity).collect(),
            Direction::FromGuest => group.spec.egress.iter().flatten().map(identity).collect(),
        };
        for (index, rule) in rules.into_iter().enumerate() {
            // The same rule twice is two rules.
            let before = seen.entry((name, rule.clone())).or_insert(0_u32);
            let hash = Sha256::digest(format!("{name}/{before}/{rule}"));
            *before += 1;
            let number = hash
                .iter()
                .take(8)
                .fold(0, |n, byte| n << 8 | u64::from(*byte));
            counters.push(RuleCounter {
                group: name.clone(),
                index,
                // Zero stands for no counter.
                counter: number.max(1),
            });
        }
    }
    counters
}

/// A rule as text, the same for the same rule.
fn identity(rule: &impl serde::Serialize) -> String {
    serde_json::to_string(rule).unwrap_or_default()
}

/// The rules of an interface in `groups`, for the addresses that are in the groups they name.
pub fn rules_of(groups: &[SecurityGroup], view: &View) -> Rules {
    let named = groups.iter().flat_map(|group| group.spec.references());
    let members = named
        .map(|(_, group)| (group.to_owned(), view.members(group).collect()))
        .collect();
    let mut rules = Rules::default();
    for group in groups {
        let ingress = group.spec.ingress.iter().map(IngressRule::parts);
        rules
            .ingress
            .extend(ingress.map(|rule| resolve(rule, &members)));
        if let Some(egress) = &group.spec.egress {
            let egress = egress.iter().map(EgressRule::parts);
            rules
                .egress
                .get_or_insert_default()
                .extend(egress.map(|rule| resolve(rule, &members)));
        }
    }
    set_counters(&mut rules.ingress, groups, Direction::ToGuest);
    if let Some(egress) = &mut rules.egress {
        set_counters(egress, groups, Direction::FromGuest);
    }
    rules
}

fn set_counters(rules: &mut [ResolvedRule], groups: &[SecurityGroup], direction: Direction) {
    let counters = rule_counters(groups, direction);
    for (rule, counter) in rules.iter_mut().zip(counters).take(COUNTED_RULES) {
        rule.counter = counter.counter;
    }
}

/// The addresses of a guest's interfaces, with the groups that they are in.
pub fn memberships_of(interfaces: &[Interface]) -> Memberships {
    interfaces
        .iter()
        .flat_map(|interface| {
            let ipv4 = interface.address.map(IpAddr::from);
            let ipv6 = interface.address_v6.map(IpAddr::from);
            interface.security_groups.iter().flat_map(move |group| {
                let addresses = ipv4.into_iter().chain(ipv6);
                addresses.map(|address| (group.clone(), address))
            })
        })
        .collect()
}

fn resolve(rule: RuleParts<'_>, members: &BTreeMap<String, BTreeSet<IpAddr>>) -> ResolvedRule {
    let is_everywhere = rule.networks.is_empty() && rule.groups.is_empty();
    let addresses = rule
        .groups
        .iter()
        .flat_map(|group| members.get(group).into_iter().flatten())
        .map(|address| IpNet::from(*address));
    let peers = rule.networks.iter().copied().chain(addresses).collect();
    ResolvedRule {
        counter: 0,
        protocol: rule.protocol,
        ports: rule.ports.to_vec(),
        icmp_types: rule.icmp_types.to_vec(),
        peers: (!is_everywhere).then_some(peers),
    }
}

#[cfg(test)]
mod tests {
    use keelson_api::Protocol;

    use super::*;

    fn group(name: &str, ports: &[u16]) -> SecurityGroup {
        let rules: Vec<_> = ports
            .iter()
            .map(|port| serde_json::json!({"protocol": "tcp", "ports": [port]}))
            .collect();
        serde_json::from_value(serde_json::json!({
            "apiVersion": keelson_api::API_VERSION,
            "kind": "SecurityGroup",
            "metadata": {"name": name},
            "spec": {"ingress": rules},
        }))
        .expect("a group")
    }

    fn numbers(groups: &[SecurityGroup]) -> Vec<u64> {
        let counters = rule_counters(groups, Direction::ToGuest);
        counters.iter().map(|counter| counter.counter).collect()
    }

    #[test]
    fn a_rule_keeps_its_counter_wherever_it_stands() {
        let before = numbers(&[group("web", &[80, 443, 443])]);
        let after = numbers(&[group("other", &[80]), group("web", &[22, 443, 80])]);
        assert_eq!((after[3], after[2]), (before[0], before[1]));
        assert_ne!(before[1], before[2], "the same rule twice");
        assert_ne!(after[0], after[3], "the same rule of another group");
    }

    #[test]
    fn a_rule_that_names_an_empty_group_is_for_nobody() {
        let rule = IngressRule {
            protocol: Protocol::Tcp,
            ports: Vec::new(),
            icmp_types: Vec::new(),
            from: Vec::new(),
            from_groups: vec!["nobody".into()],
        };
        let resolved = resolve(rule.parts(), &BTreeMap::new());
        assert_eq!(resolved.peers, Some(Vec::new()));
    }
}
