//! What rules allowed is counted by rule, across changes of the rules and of the agent.

mod network;

use std::collections::BTreeMap;

use keelson_ebpf::{Datapath, Direction, HookChoice, InterfacePolicy, Protocol, Rule, Verdict};
use network::frames::{self, Ends};
use network::{Guest, HOST_IP, HOST_MAC, Network, allow};

fn counted(rule: Rule, counter: u64) -> Rule {
    Rule { counter, ..rule }
}

fn frame(guest: &Guest, from: u16, to: u16) -> Vec<u8> {
    let ends = Ends {
        source_mac: HOST_MAC,
        destination_mac: guest.mac,
        source: HOST_IP,
        destination: guest.ip,
    };
    frames::udp(ends, from, to, b"hello")
}

/// Sends the guest a datagram that must pass.
fn send(datapath: &mut Datapath, guest: &Guest, from: u16, to: u16) {
    let frame = frame(guest, from, to);
    let verdict = datapath.evaluate(&guest.name, Direction::ToGuest, &frame);
    assert_eq!(verdict.expect("run"), Verdict::Pass);
}

fn packets(datapath: &Datapath, guest: &Guest) -> BTreeMap<u64, u64> {
    let counters = datapath.counters(&guest.name).expect("attached");
    let allowed = counters.to_guest.allowed.into_iter();
    allowed
        .map(|(counter, tally)| (counter, tally.packets))
        .collect()
}

#[test]
fn the_first_rule_that_allows_a_flow_counts_it_once() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let narrow = counted(allow(Protocol::Udp, 7000..=7000), 10);
    let wide = counted(allow(Protocol::Udp, 6000..=8000), 20);
    let unused = counted(allow(Protocol::Udp, 7000..=7000), 30);
    let policy = guest.policy_with(&[narrow.clone(), wide.clone(), unused]);
    datapath.attach(&policy).expect("attached");
    for _ in 0..3 {
        send(&mut datapath, &guest, 4000, 7000);
    }
    send(&mut datapath, &guest, 4001, 7000);
    send(&mut datapath, &guest, 4000, 7001);
    assert_eq!(
        packets(&datapath, &guest),
        [(10, 2), (20, 1), (30, 0)].into()
    );
    let counters = datapath.counters(&guest.name).expect("attached");
    let length = u64::try_from(frame(&guest, 1, 1).len()).expect("short");
    assert_eq!(counters.to_guest.allowed[&10].bytes, 2 * length);
    assert_eq!(counters.to_guest.passed.packets, 5);
    assert_eq!(counters.from_guest.allowed, BTreeMap::new());
}

#[test]
fn counters_outlive_other_rules_and_the_agent() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let one = counted(allow(Protocol::Udp, 1..=1), 10);
    let other = counted(allow(Protocol::Udp, 2..=2), u64::MAX);
    let both = guest.policy_with(&[one.clone(), other.clone()]);
    datapath.attach(&both).expect("attached");
    send(&mut datapath, &guest, 4000, 1);
    send(&mut datapath, &guest, 4000, 2);
    let turned = guest.policy_with(&[other.clone(), one]);
    datapath.update(&turned).expect("updated");
    send(&mut datapath, &guest, 4001, 2);
    drop(datapath);

    let mut datapath = network.open();
    assert_eq!(packets(&datapath, &guest), [(10, 1), (u64::MAX, 2)].into());
    datapath.attach(&turned).expect("taken over");
    send(&mut datapath, &guest, 4002, 2);
    assert_eq!(packets(&datapath, &guest), [(10, 1), (u64::MAX, 3)].into());
    datapath
        .update(&guest.policy_with(&[other]))
        .expect("updated");
    assert_eq!(packets(&datapath, &guest), [(u64::MAX, 3)].into());
    datapath.update(&both).expect("updated");
    assert_eq!(
        packets(&datapath, &guest),
        [(10, 0), (u64::MAX, 3)].into(),
        "a rule that comes back begins anew"
    );
    datapath.detach(&guest.name).expect("detached");
    datapath.attach(&both).expect("attached");
    assert_eq!(packets(&datapath, &guest), [(10, 0), (u64::MAX, 0)].into());
}

#[test]
fn more_counters_than_there_may_be_are_refused() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let with = |count: u16| {
        let rules = (1..=count).map(|n| counted(allow(Protocol::Udp, n..=n), n.into()));
        InterfacePolicy {
            ingress: rules.collect(),
            ..guest.policy()
        }
    };
    datapath.attach(&with(1024)).expect("attached");
    let error = datapath.update(&with(1025)).expect_err("too many");
    assert!(error.to_string().contains("1024 counters"), "{error}");
    assert_eq!(packets(&datapath, &guest).len(), 1024, "the old ones stay");
}

#[test]
fn statistics_tell_the_use_of_flows() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let policy = guest.policy_with(&[allow(Protocol::Udp, 1..=9)]);
    datapath.attach(&policy).expect("attached");
    for port in 1..=5 {
        send(&mut datapath, &guest, 4000, port);
    }
    let statistics = datapath.statistics().expect("read");
    let (counters, flows) = &statistics[&guest.name];
    assert_eq!(counters.to_guest.passed.packets, 5);
    assert_eq!((flows.opening, flows.established), (5, 0));
    assert_eq!((flows.max_opening, flows.max_established), (1024, 4096));
}
