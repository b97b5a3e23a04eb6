//! Compiles a list of rules to classes of peers and their ports; see `keelson_ebpf_common`.

use std::collections::{BTreeMap, HashMap};
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
    /// What the peers of each class may use, and the counter of the rule that says so.
    pub classes: Vec<BTreeMap<PortPrefix, u64>>,
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
    /// The counter of the rule that allows everything.
    everything: Option<u64>,
    /// By IP protocol; in order, without overlaps.
    ports: BTreeMap<u8, Vec<CountedRange>>,
}

/// Ports, and the counter of the rule that allows them.
type CountedRange = (RangeInclusive<u16>, u64);

/// Which of two rules counts a packet that both allow: the one whose counter the list names first.
struct Precedence(HashMap<u64, usize>);

impl Precedence {
    fn of(rules: &[Rule]) -> Self {
        let mut ranks = HashMap::new();
        for (rank, rule) in rules.iter().enumerate() {
            ranks.entry(rule.counter).or_insert(rank);
        }
        Self(ranks)
    }

    fn rank(&self, counter: u64) -> usize {
        self.0.get(&counter).copied().unwrap_or(usize::MAX)
    }
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
    let precedence = Precedence::of(rules);
    let mut classes = Classes::default();
    let mut peers = Vec::with_capacity(own.len());
    let mut covering: Vec<(IpPrefix, Allowed)> = Vec::new();
    for (prefix, rules) in own.into_values() {
        while covering
            .pop_if(|(wider, _)| !wider.covers(prefix))
            .is_some()
        {}
        let inherited = covering.last().map(|(_, allowed)| allowed.clone());
        let allowed = inherited.unwrap_or_default().and(&rules, &precedence);
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
    list: Vec<BTreeMap<PortPrefix, u64>>,
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
    fn and(mut self, rules: &[&Rule], precedence: &Precedence) -> Self {
        let rank = |counter| precedence.rank(counter);
        for rule in rules {
            match rule.protocol {
                Protocol::Any => {
                    let all = self.everything.into_iter().chain([rule.counter]);
                    self.everything = all.min_by_key(|counter| rank(*counter));
                }
                protocol => {
                    let ports = self.ports.entry(protocol.number()).or_default();
                    ports.push((rule.ports.clone(), rule.counter));
                }
            }
        }
        if let Some(everything) = self.everything {
            for ranges in self.ports.values_mut() {
                ranges.retain(|(_, counter)| rank(*counter) < rank(everything));
            }
            self.ports.retain(|_, ranges| !ranges.is_empty());
        }
        for ranges in self.ports.values_mut() {
            *ranges = flatten(ranges, precedence);
        }
        self
    }

    fn prefixes(&self) -> BTreeMap<PortPrefix, u64> {
        let everything = self.everything.into_iter();
        let mut prefixes: BTreeMap<_, _> = everything
            .map(|counter| (PortPrefix::Everything, counter))
            .collect();
        for (protocol, ranges) in &self.ports {
            for (range, counter) in ranges {
                split(*protocol, range, |prefix| {
                    prefixes.insert(prefix, *counter);
                });
            }
        }
        prefixes
    }
}

/// Cuts ranges where they begin and end, keeps of those that overlap the one that counts, and joins
/// neighbours with the same counter.
fn flatten(ranges: &[CountedRange], precedence: &Precedence) -> Vec<CountedRange> {
    // Where each begins, and the first port behind it.
    let mut edges: Vec<(u32, bool, (usize, u64))> = Vec::with_capacity(ranges.len() * 2);
    for (range, counter) in ranges {
        let which = (precedence.rank(*counter), *counter);
        edges.push((u32::from(*range.start()), true, which));
        edges.push((u32::from(*range.end()) + 1, false, which));
    }
    edges.sort_unstable();
    let mut open: BTreeMap<(usize, u64), usize> = BTreeMap::new();
    let mut flat: Vec<CountedRange> = Vec::new();
    let mut from = 0;
    for (at, begins, which) in edges {
        if let (Some((_, counter)), Ok(first), Ok(last)) = (
            open.keys().next(),
            u16::try_from(from),
            u16::try_from(at.saturating_sub(1)),
        ) && from < at
        {
            push(&mut flat, first..=last, *counter);
        }
        from = at;
        if begins {
            *open.entry(which).or_default() += 1;
        } else if let Some(count) = open.get_mut(&which) {
            *count -= 1;
            if *count == 0 {
                open.remove(&which);
            }
        }
    }
    flat
}

fn push(flat: &mut Vec<CountedRange>, range: RangeInclusive<u16>, counter: u64) {
    match flat.last_mut() {
        Some((last, same))
            if *same == counter && u32::from(*last.end()) + 1 == u32::from(*range.start()) =>
        {
            *last = *last.start()..=*range.end();
        }
        _ => flat.push((range, counter)),
    }
}

/// Splits a range into the fewest aligned blocks whose size is a power of two: at most 30.
fn split(protocol: u8, range: &RangeInclusive<u16>, mut add: impl FnMut(PortPrefix)) {
    let mut next = u32::from(*range.start());
    let end = u32::from(*range.end()) + 1;
    while next < end {
        let aligned = next.trailing_zeros().min(16);
        let fits = (end - next).ilog2();
        let size_bits = aligned.min(fits);
        let (Ok(port), Ok(bits)) = (u16::try_from(next), u8::try_from(16 - size_bits)) else {
            return;
        };
        add(match bits {
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
            counter: 0,
        }
    }

    fn class_of<'a>(compiled: &'a CompiledRules, peer: &str) -> &'a BTreeMap<PortPrefix, u64> {
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
            let expected: BTreeMap<_, _> = ports.into_iter().map(|at| (port(at), 0)).collect();
            assert_eq!(*class_of(&compiled, peer), expected, "{peer}");
        }
    }

    #[test]
    fn ipv4_does_not_inherit_from_ipv6() {
        let compiled = compile(&[rule(Protocol::Any, Rule::ALL_PORTS, "::/0")]).expect("few");
        assert_eq!(*class_of(&compiled, "0.0.0.0/0"), BTreeMap::new());
        assert_eq!(
            *class_of(&compiled, "::/0"),
            BTreeMap::from([(PortPrefix::Everything, 0)])
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

        /// Aligned blocks match exactly the ports of the ranges, and name the counter of the first one
        /// that has the port, checked port by port.
        #[test]
        fn port_prefixes_match_exactly_the_ranges(
            ranges in prop::collection::vec((any::<u16>(), any::<u16>(), 0..4_u64), 1..6),
        ) {
            let rules: Vec<Rule> = ranges
                .into_iter()
                .map(|(a, b, counter)| Rule {
                    counter,
                    ..rule(Protocol::Tcp, a.min(b)..=a.max(b), "0.0.0.0/0")
                })
                .collect();
            let precedence = Precedence::of(&rules);
            let compiled = compile(&rules).expect("few");
            let class = class_of(&compiled, "0.0.0.0/0");
            let said = |candidate: u16| {
                let matching = class.iter().filter(|(prefix, _)| match **prefix {
                    PortPrefix::Ports { port, bits, .. } => {
                        (candidate ^ port).leading_zeros() >= u32::from(bits)
                    }
                    _ => true,
                });
                matching.map(|(_, counter)| *counter).collect::<Vec<_>>()
            };
            for port in 0..=u16::MAX {
                let allowing = rules.iter().filter(|rule| rule.ports.contains(&port));
                let first = allowing.map(|rule| rule.counter).min_by_key(|c| precedence.rank(*c));
                prop_assert_eq!(said(port), first.into_iter().collect::<Vec<_>>());
            }
        }
    }
}
