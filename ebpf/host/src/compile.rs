//! Compiles a list of rules to classes of peers and their ports; see `keelson_ebpf_common`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;

use crate::address::IpPrefix;
use crate::policy::{Protocol, Rule};

/// Port entries that one table may have; each is one element of a map.
pub const MAX_ENTRIES: usize = 1 << 20;

/// Rules in the form that the programs look up.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CompiledRules {
    /// Each peer prefix and its class, an index of `classes`.
    pub peers: Vec<(IpPrefix, usize)>,
    /// What the peers of each class may use.
    pub classes: Vec<BTreeSet<PortPrefix>>,
}

/// Traffic that a class allows: everything, a protocol, or ports that share their first bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PortPrefix {
    /// Every protocol.
    Everything,
    /// All of one IP protocol.
    Protocol(u8),
    /// Ports of one IP protocol that share their first `bits` bits (1 to 16).
    Ports {
        /// IP protocol number.
        protocol: u8,
        /// The first port.
        port: u16,
        /// How many bits they share.
        bits: u8,
    },
}

/// How many entries the rules would need.
#[derive(Debug, PartialEq, Eq)]
pub struct TooManyEntries;

/// What some peers may use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Allowed {
    everything: bool,
    /// By IP protocol; in order, without overlaps.
    ports: BTreeMap<u8, Vec<RangeInclusive<u16>>>,
}

/// Compiles `rules`. A peer that several rules' networks cover may use what any of them allows.
///
/// Takes the prefixes in order of their addresses, wider ones first, so that those which cover a
/// prefix are the ones that are still open when it comes.
pub fn compile(rules: &[Rule]) -> Result<CompiledRules, TooManyEntries> {
    let mut own: BTreeMap<(bool, u128, u32), (IpPrefix, Vec<&Rule>)> = BTreeMap::new();
    for rule in rules {
        let place = own
            .entry(order(rule.peer))
            .or_insert((rule.peer, Vec::new()));
        place.1.push(rule);
    }
    // Among the addresses of maps those of IPv4 are a part of IPv6's, whose rules they don't obey.
    if !rules.is_empty() {
        own.entry(order(IpPrefix::ANY_IPV4))
            .or_insert((IpPrefix::ANY_IPV4, Vec::new()));
    }
    let mut classes = Classes::default();
    let mut peers = Vec::with_capacity(own.len());
    let mut covering: Vec<(IpPrefix, Allowed)> = Vec::new();
    for (prefix, rules) in own.into_values() {
        while covering
            .pop_if(|(wider, _)| !wider.covers(prefix))
            .is_some()
        {}
        let inherited = covering.last().map(|(_, allowed)| allowed.clone());
        let allowed = inherited.unwrap_or_default().and(&rules);
        peers.push((prefix, classes.number(&allowed)?));
        covering.push((prefix, allowed));
    }
    Ok(CompiledRules {
        peers,
        classes: classes.list,
    })
}

fn order(prefix: IpPrefix) -> (bool, u128, u32) {
    let is_ipv6 = prefix.address().is_ipv6();
    (is_ipv6, prefix.bits(), prefix.mapped_length())
}

/// The classes so far, each once.
#[derive(Default)]
struct Classes {
    numbers: HashMap<Allowed, usize>,
    list: Vec<BTreeSet<PortPrefix>>,
    entries: usize,
}

impl Classes {
    fn number(&mut self, allowed: &Allowed) -> Result<usize, TooManyEntries> {
        if let Some(number) = self.numbers.get(allowed) {
            return Ok(*number);
        }
        let prefixes = allowed.prefixes();
        self.entries += prefixes.len();
        if self.entries > MAX_ENTRIES {
            return Err(TooManyEntries);
        }
        let number = self.list.len();
        self.list.push(prefixes);
        self.numbers.insert(allowed.clone(), number);
        Ok(number)
    }
}

impl Allowed {
    fn and(mut self, rules: &[&Rule]) -> Self {
        for rule in rules {
            match rule.protocol {
                Protocol::Any => self.everything = true,
                protocol => {
                    let ports = self.ports.entry(protocol.number()).or_default();
                    ports.push(rule.ports.clone());
                }
            }
        }
        if self.everything {
            self.ports.clear();
        }
        for ranges in self.ports.values_mut() {
            *ranges = merge(std::mem::take(ranges));
        }
        self
    }

    fn prefixes(&self) -> BTreeSet<PortPrefix> {
        let mut prefixes = BTreeSet::new();
        if self.everything {
            prefixes.insert(PortPrefix::Everything);
        }
        for (protocol, ranges) in &self.ports {
            for range in ranges {
                split(*protocol, range, &mut prefixes);
            }
        }
        prefixes
    }
}

/// Joins ranges that overlap or touch.
fn merge(mut ranges: Vec<RangeInclusive<u16>>) -> Vec<RangeInclusive<u16>> {
    ranges.sort_by_key(|range| *range.start());
    let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if u32::from(*range.start()) <= u32::from(*last.end()) + 1 => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// Splits a range into the fewest aligned blocks whose size is a power of two: at most 30.
fn split(protocol: u8, range: &RangeInclusive<u16>, into: &mut BTreeSet<PortPrefix>) {
    let mut next = u32::from(*range.start());
    let end = u32::from(*range.end()) + 1;
    while next < end {
        let aligned = next.trailing_zeros().min(16);
        let fits = (end - next).ilog2();
        let size_bits = aligned.min(fits);
        let (Ok(port), Ok(bits)) = (u16::try_from(next), u8::try_from(16 - size_bits)) else {
            return;
        };
        into.insert(match bits {
            0 => PortPrefix::Protocol(protocol),
            bits => PortPrefix::Ports {
                protocol,
                port,
                bits,
            },
        });
        next += 1 << size_bits;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TCP: u8 = 6;

    fn rule(protocol: Protocol, ports: RangeInclusive<u16>, peer: &str) -> Rule {
        let peer = peer.parse().expect("valid prefix");
        Rule {
            protocol,
            ports,
            peer,
        }
    }

    fn class_of<'a>(compiled: &'a CompiledRules, peer: &str) -> &'a BTreeSet<PortPrefix> {
        let peer = peer.parse().expect("valid prefix");
        let found = compiled.peers.iter().find(|(prefix, _)| *prefix == peer);
        &compiled.classes[found.expect("the prefix is there").1]
    }

    #[test]
    fn a_narrow_peer_inherits_what_its_wider_networks_may() {
        let compiled = compile(&[
            rule(Protocol::Tcp, 80..=80, "0.0.0.0/0"),
            rule(Protocol::Tcp, 22..=22, "10.0.0.0/8"),
            rule(Protocol::Tcp, 25..=25, "10.1.0.0/16"),
            rule(Protocol::Tcp, 53..=53, "11.0.0.0/8"),
        ])
        .expect("few");
        let port = |port| PortPrefix::Ports {
            protocol: TCP,
            port,
            bits: 16,
        };
        for (peer, ports) in [
            ("0.0.0.0/0", vec![80]),
            ("10.0.0.0/8", vec![22, 80]),
            ("10.1.0.0/16", vec![22, 25, 80]),
            ("11.0.0.0/8", vec![53, 80]),
        ] {
            let expected: BTreeSet<_> = ports.into_iter().map(port).collect();
            assert_eq!(*class_of(&compiled, peer), expected, "{peer}");
        }
    }

    #[test]
    fn ipv4_does_not_inherit_from_ipv6() {
        let compiled = compile(&[rule(Protocol::Any, Rule::ALL_PORTS, "::/0")]).expect("few");
        assert_eq!(*class_of(&compiled, "0.0.0.0/0"), BTreeSet::new());
        assert_eq!(
            *class_of(&compiled, "::/0"),
            BTreeSet::from([PortPrefix::Everything])
        );
    }

    #[test]
    fn peers_with_the_same_ports_share_a_class() {
        let rules: Vec<Rule> = (0..=255)
            .map(|index| rule(Protocol::Udp, 53..=53, &format!("10.0.{index}.0/24")))
            .collect();
        let compiled = compile(&rules).expect("few");
        // And the class of everyone else, who may nothing.
        assert_eq!((compiled.peers.len(), compiled.classes.len()), (257, 2));
    }

    #[test]
    fn rules_that_would_need_too_many_entries_are_refused() {
        let wide = (0..1024)
            .map(|index| rule(Protocol::Tcp, index * 64 + 1..=index * 64 + 62, "0.0.0.0/0"));
        let narrow = (0..512).map(|index| {
            rule(
                Protocol::Udp,
                index..=index,
                &format!("10.{}.{}.0/24", index / 256, index % 256),
            )
        });
        let rules: Vec<Rule> = wide.chain(narrow).collect();
        assert_eq!(compile(&rules), Err(TooManyEntries));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Aligned blocks match exactly the ports of the ranges, checked port by port.
        #[test]
        fn port_prefixes_match_exactly_the_ranges(
            ranges in prop::collection::vec((any::<u16>(), any::<u16>()), 1..6),
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(a, b)| a.min(b)..=a.max(b)).collect();
            let mut prefixes = BTreeSet::new();
            for range in merge(ranges.clone()) {
                split(TCP, &range, &mut prefixes);
            }
            let matched = |candidate: u16| prefixes.iter().any(|prefix| match *prefix {
                PortPrefix::Ports { port, bits, .. } => {
                    (candidate ^ port).leading_zeros() >= u32::from(bits)
                }
                _ => true,
            });
            for port in 0..=u16::MAX {
                prop_assert_eq!(matched(port), ranges.iter().any(|range| range.contains(&port)));
            }
        }
    }
}
