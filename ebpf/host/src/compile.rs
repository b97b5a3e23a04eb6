//! Compiles a list of rules to classes of peers and their ports; see `keelson_ebpf_common`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use crate::address::Ipv4Prefix;
use crate::policy::{Protocol, Rule};

/// Port entries that one table may have. Reached only by many ranges for peers that contain each
/// other; each entry is one element of a map.
pub const MAX_ENTRIES: usize = 65_536;

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Rules in the form that the programs look up.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CompiledRules {
    /// Each peer prefix and its class, an index of `classes`.
    pub peers: Vec<(Ipv4Prefix, usize)>,
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

/// Compiles `rules`. A peer that several rules' networks cover may use what any of them allows.
pub fn compile(rules: &[Rule]) -> Result<CompiledRules, TooManyEntries> {
    let prefixes: BTreeSet<Ipv4Prefix> = rules.iter().map(|rule| rule.peer).collect();
    let mut class_of: BTreeMap<BTreeSet<PortPrefix>, usize> = BTreeMap::new();
    let mut entries = 0;
    let mut compiled = CompiledRules::default();
    for prefix in prefixes {
        let allowed = ports_of(rules.iter().filter(|rule| rule.peer.covers(prefix)));
        let next = class_of.len();
        let class = *class_of.entry(allowed.clone()).or_insert(next);
        if class == next {
            entries += allowed.len();
            if entries > MAX_ENTRIES {
                return Err(TooManyEntries);
            }
            compiled.classes.push(allowed);
        }
        compiled.peers.push((prefix, class));
    }
    Ok(compiled)
}

/// The smallest set of prefixes that allows what any of the rules allows.
fn ports_of<'a>(rules: impl Iterator<Item = &'a Rule>) -> BTreeSet<PortPrefix> {
    let mut everything = false;
    let mut icmp = false;
    let mut tcp = Vec::new();
    let mut udp = Vec::new();
    for rule in rules {
        match rule.protocol {
            Protocol::Any => everything = true,
            Protocol::Icmp => icmp = true,
            Protocol::Tcp => tcp.push(rule.ports.clone()),
            Protocol::Udp => udp.push(rule.ports.clone()),
        }
    }
    if everything {
        return BTreeSet::from([PortPrefix::Everything]);
    }
    let mut prefixes = BTreeSet::new();
    if icmp {
        prefixes.insert(PortPrefix::Protocol(ICMP));
    }
    for (protocol, ranges) in [(TCP, tcp), (UDP, udp)] {
        for range in merge(ranges) {
            split(protocol, &range, &mut prefixes);
        }
    }
    prefixes
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

    fn rule(protocol: Protocol, ports: RangeInclusive<u16>, peer: &str) -> Rule {
        let peer = peer.parse().expect("valid prefix");
        Rule {
            protocol,
            ports,
            peer,
        }
    }

    #[test]
    fn a_narrow_peer_inherits_what_its_wider_networks_may() {
        let compiled = compile(&[
            rule(Protocol::Tcp, 80..=80, "0.0.0.0/0"),
            rule(Protocol::Tcp, 22..=22, "10.0.0.0/8"),
        ])
        .expect("few");
        let port = |port| PortPrefix::Ports {
            protocol: TCP,
            port,
            bits: 16,
        };
        assert_eq!(
            compiled.classes,
            [
                BTreeSet::from([port(80)]),
                BTreeSet::from([port(22), port(80)])
            ]
        );
        assert_eq!(compiled.peers.len(), 2);
    }

    #[test]
    fn peers_with_the_same_ports_share_a_class() {
        let rules: Vec<Rule> = (0..=255)
            .map(|index| rule(Protocol::Udp, 53..=53, &format!("10.0.{index}.0/24")))
            .collect();
        let compiled = compile(&rules).expect("few");
        assert_eq!((compiled.peers.len(), compiled.classes.len()), (256, 1));
    }

    #[test]
    fn rules_that_would_need_too_many_entries_are_refused() {
        let wide = (0..512)
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
