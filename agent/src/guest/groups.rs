//! The rules of an interface's security groups, with the groups that they name resolved.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use keelson_api::{
    EgressRule, IngressRule, Kind, Object, RuleParts, SecurityGroupSpec, VirtualMachine,
};

use crate::error::Result;
use crate::host::{ResolvedRule, Rules};
use crate::objects::{ObjectStore, World};

/// Which addresses are in which security groups.
pub type Memberships = BTreeSet<(String, IpAddr)>;

/// The rules of an interface in `groups`.
///
/// # Errors
/// As the store has them.
pub async fn rules_of(groups: Vec<SecurityGroupSpec>, objects: &ObjectStore) -> Result<Rules> {
    let names_groups = groups
        .iter()
        .any(|group| group.references().next().is_some());
    let members = if names_groups {
        members(&objects.world().await?)
    } else {
        BTreeMap::new()
    };
    let mut rules = Rules::default();
    for group in groups {
        let ingress = group.ingress.iter().map(IngressRule::parts);
        rules
            .ingress
            .extend(ingress.map(|rule| resolve(rule, &members)));
        if let Some(egress) = group.egress {
            let egress = egress.iter().map(EgressRule::parts);
            rules
                .egress
                .get_or_insert_default()
                .extend(egress.map(|rule| resolve(rule, &members)));
        }
    }
    Ok(rules)
}

/// The addresses of a guest's interfaces, with the groups that they are in.
pub fn memberships(guest: &VirtualMachine) -> Memberships {
    let interfaces = guest.spec.interfaces.iter();
    interfaces
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

/// The addresses of the interfaces in each security group, of all guests.
fn members(world: &World) -> BTreeMap<String, BTreeSet<IpAddr>> {
    let mut members: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
    for stored in world.of_kind(Kind::VirtualMachine) {
        let Object::VirtualMachine(guest) = &stored.object else {
            continue;
        };
        for (group, address) in memberships(guest) {
            members.entry(group).or_default().insert(address);
        }
    }
    members
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
