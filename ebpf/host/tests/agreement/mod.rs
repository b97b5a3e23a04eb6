//! What tests that compare the programs with a model have in common.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;

use keelson_ebpf::{
    Datapath, Direction, DropReason, EgressPolicy, InterfaceCounters, InterfacePolicy, Protocol,
    Rule, Verdict,
};

use crate::model::Allowed;
use crate::recipe::Choices;

/// What the programs say, with the reason that they counted, or the rule, and what became of the frame.
pub fn programs_say(
    datapath: &mut Datapath,
    interface: &str,
    direction: Direction,
    frame: &[u8],
) -> (Result<Allowed, DropReason>, Vec<u8>) {
    let of_direction = |counters: InterfaceCounters| match direction {
        Direction::FromGuest => counters.from_guest,
        Direction::ToGuest => counters.to_guest,
    };
    let before = of_direction(datapath.counters(interface).expect("attached"));
    let (verdict, frame) = datapath
        .translate(interface, direction, frame)
        .expect("the kernel takes the frame");
    let after = of_direction(datapath.counters(interface).expect("attached"));
    let reasons: Vec<DropReason> = after
        .dropped
        .iter()
        .filter(|(reason, tally)| before.dropped.get(reason) != Some(tally))
        .map(|(reason, _)| *reason)
        .collect();
    let allowed: Vec<u64> = after
        .allowed
        .iter()
        .filter(|(counter, tally)| before.allowed.get(counter) != Some(tally))
        .map(|(counter, _)| *counter)
        .collect();
    let said = match (verdict, reasons.as_slice(), allowed.as_slice()) {
        (Verdict::Pass, [], []) => Ok(None),
        // It went to the agent, and nowhere else.
        (Verdict::Drop, [], []) if after.passed != before.passed => Ok(None),
        (Verdict::Pass, [], [counter]) => Ok(Some(*counter)),
        (Verdict::Drop, [reason], []) => Err(*reason),
        other => panic!("one drop is counted once, and one rule: {other:?}"),
    };
    (said, frame)
}

fn rule(choices: &mut Choices<'_>) -> Rule {
    let protocols = [
        Protocol::Tcp,
        Protocol::Udp,
        Protocol::Icmp,
        Protocol::Icmpv6,
        Protocol::Any,
        Protocol::Number(132),
    ];
    let protocol = *choices.of(&protocols);
    let peers = [
        "0.0.0.0/0",
        "::/0",
        "10.77.0.0/24",
        "10.77.0.1",
        "10.77.0.102",
        "fd77::/64",
        "fd77::1",
        "fe80::/10",
    ];
    let ports = match protocol {
        Protocol::Any | Protocol::Number(_) => Rule::ALL_PORTS,
        Protocol::Icmp => Rule::icmp_type(*choices.of(&[8, 0, 3]), None),
        Protocol::Icmpv6 => Rule::icmp_type(*choices.of(&[128, 129, 1, 2]), None),
        _ => [80..=80, Rule::ALL_PORTS, 1000..=1003, 53..=80][choices.below(4)].clone(),
    };
    Rule {
        protocol,
        ports,
        peer: choices.of(&peers).parse().expect("valid"),
        counter: *choices.of(&[0, 1, 2, 3, 1 << 40]),
    }
}

pub fn rules(choices: &mut Choices<'_>, policy: &InterfacePolicy, focus: usize) -> InterfacePolicy {
    let ingress = (0..choices.below(6)).map(|_| rule(choices)).collect();
    let egress = match choices.below(8) {
        choice if choice <= 2 + focus / 2 => EgressPolicy::AllowAll,
        _ => EgressPolicy::Only((0..choices.below(6)).map(|_| rule(choices)).collect()),
    };
    InterfacePolicy {
        ingress,
        egress,
        ..policy.clone()
    }
}

pub fn is_question(direction: Direction, frame: &[u8]) -> bool {
    let is_icmpv6 = frame[12..14] == [0x86, 0xdd] && frame.get(20) == Some(&58);
    let is_solicitation = is_icmpv6 && frame.get(54) == Some(&135);
    direction == Direction::FromGuest && (frame[12..14] == [0x08, 0x06] || is_solicitation)
}

/// That the two agree says little unless they had much to agree about.
pub fn count<K: Ord + std::fmt::Debug>(seen: impl Iterator<Item = K>, expected: &[K], least: u32) {
    let mut counts = BTreeMap::new();
    for key in seen {
        *counts.entry(key).or_insert(0) += 1;
    }
    println!("{counts:?}");
    for key in expected {
        let count = counts.get(key).copied().unwrap_or(0);
        assert!(count >= least, "{key:?}: {count}");
    }
}
