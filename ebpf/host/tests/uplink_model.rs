//! Any packets of guests to the outside and back, and any forwards: the programs of the uplink and of guests, run by
//! the kernel through BPF_PROG_TEST_RUN, say and do what plain models of both do.

mod agreement;
mod model;
mod network;
mod outside;
mod recipe;

use agreement::{count, rules};
use aya::maps::{HashMap, Map, MapData};
use keelson_ebpf::{
    Datapath, DropReason, HookChoice, InterfacePolicy, PortForward, Protocol, SourceNat,
};
use model::Model;
use model::uplink::{Inside, Uplink};
use network::{Network, ip};
use outside::{BRIDGE, EXTERNAL, Note, Trial, UPLINK, addresses};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use recipe::Choices;

/// Two of the three guests have source NAT.
const WITH_NAT: usize = 2;

fn nat() -> SourceNat {
    SourceNat {
        network: 7,
        uplink: UPLINK.into(),
        ipv4: Some(EXTERNAL[0].parse().expect("valid")),
        ipv6: Some(EXTERNAL[1].parse().expect("valid")),
        // So few that they run out, with the numbers that recipes use among them.
        ports: 1000..=1001,
        max_mappings: 1024,
    }
}

/// Forwards to some of the guests' ports, from ports in the range of source NAT and others.
fn forwards(choices: &mut Choices<'_>, guests: &[InterfacePolicy]) -> Vec<PortForward> {
    let mut forwards = Vec::new();
    for address in EXTERNAL {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for port in [80, 546, 1000, 1003] {
                let mut guest_ports = [80, 1000, 68, 546].into_iter();
                let taken = |forwards: &[PortForward], interface: &str, guest_port| {
                    forwards.iter().any(|other| {
                        other.interface == interface
                            && other.guest_port == guest_port
                            && other.protocol == protocol
                            && other.address.to_string() == address
                    })
                };
                let interface = &choices.of(guests).name;
                if choices.rarely(3) {
                    continue;
                }
                let free = guest_ports.find(|port| !taken(&forwards, interface, *port));
                let Some(guest_port) = free else { continue };
                forwards.push(PortForward {
                    uplink: UPLINK.into(),
                    address: address.parse().expect("valid"),
                    protocol,
                    port,
                    interface: interface.clone(),
                    guest_port,
                });
            }
        }
    }
    forwards
}

/// Of an earlier case; identifications are always the same.
fn forget_fragments(network: &Network) {
    let path = network.config.pin_root.join("maps/NAT_FRAGMENTS");
    let map = MapData::from_pin(path).and_then(Map::from_map_data);
    let map = map.and_then(HashMap::<_, [u8; 24], [u8; 16]>::try_from);
    let mut map = map.expect("it is pinned");
    let keys: Result<Vec<_>, _> = map.keys().collect();
    for key in keys.expect("read") {
        map.remove(&key).expect("removed");
    }
}

fn check_steps(
    datapath: &mut Datapath,
    guests: &[InterfacePolicy],
    steps: &[(bool, [u8; 32])],
    notes: &mut Vec<Note>,
) {
    for guest in guests {
        datapath.detach(&guest.name).expect("detached");
    }
    let mut policies = Vec::new();
    let mut models = Vec::new();
    for (index, guest) in guests.iter().enumerate() {
        let bytes = steps[index % steps.len()].1;
        let policy = rules(&mut Choices::new(&bytes), guest, 8);
        datapath.attach(&policy).expect("attached");
        models.push(Model::new(&policy, Vec::new()));
        policies.push(policy);
    }
    let inside = policies.iter().map(|policy| Inside {
        interface: policy.name.clone(),
        network: policy.network,
        addresses: addresses(policy),
    });
    let mut trial = Trial {
        uplink: Uplink::new(&nat(), inside.collect()),
        datapath,
        policies,
        models,
        seen: Vec::new(),
        notes,
    };
    for (index, (changes, bytes)) in steps.iter().enumerate() {
        let mut choices = Choices::new(bytes);
        if index == 0 || *changes && index % 8 == 5 {
            let wanted = forwards(&mut choices, guests);
            let missing = trial.datapath.set_nat(&[nat()], &wanted);
            assert_eq!(missing.expect("valid"), [""; 0]);
            trial.uplink.set_forwards(&wanted);
        } else {
            trial.step(&mut choices);
        }
    }
}

#[test]
fn the_programs_agree_with_the_model_about_the_uplink() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    ip(&format!("link add {UPLINK} type veth peer name outer"));
    ip(&format!("link set {UPLINK} up"));
    ip(&format!("link add {BRIDGE} type bridge"));
    let bridges = [(BRIDGE.to_owned(), 7)];
    datapath.set_gateways(&bridges).expect("attached");
    let taps: Vec<_> = (1..=3).map(|number| network.guest(number)).collect();
    let guests: Vec<_> = taps
        .iter()
        .enumerate()
        .map(|(index, tap)| InterfacePolicy {
            ipv6: Some(format!("fd77::6{}", index + 5).parse().expect("valid")),
            network: if index < WITH_NAT { 7 } else { 8 },
            ..tap.policy()
        })
        .collect();
    let steps = prop::collection::vec((prop::bool::weighted(0.3), any::<[u8; 32]>()), 1..120);
    let mut runner = TestRunner::new(Config {
        cases: 96,
        failure_persistence: None,
        max_shrink_iters: 100,
        ..Config::default()
    });
    let state = std::cell::RefCell::new((datapath, Vec::new()));
    let result = runner.run(&steps, |steps| {
        let (datapath, notes) = &mut *state.borrow_mut();
        forget_fragments(&network);
        check_steps(datapath, &guests, &steps, notes);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    check_notes(&state.into_inner().1);
}

/// That they agree says little unless they had much to agree about.
fn check_notes(notes: &[Note]) {
    let mut expected = vec![
        ("guest", "fragment", Ok(true)),
        ("guest", "error", Ok(true)),
        ("host", "error", Ok(true)),
        ("error", "error", Ok(true)),
        ("answer", "echo", Ok(true)),
    ];
    for kind in ["tcp", "udp"] {
        expected.push(("guest", kind, Ok(true)));
        expected.push(("guest", kind, Ok(false)));
        expected.push(("answer", kind, Ok(true)));
        expected.push(("stranger", kind, Ok(true)));
        expected.push(("turned", kind, Ok(true)));
        expected.push(("turned", kind, Ok(false)));
        expected.push(("stranger", kind, Ok(false)));
    }
    let untranslatable = DropReason::NotTranslatable.as_str();
    expected.push(("guest", "tcp", Err(untranslatable)));
    expected.push(("guest", "other", Err(untranslatable)));
    count(notes.iter().copied(), &expected, 1);
    let exhausted = DropReason::PortsExhausted.as_str();
    let mut of_guests = notes.iter().filter(|note| note.0 == "guest");
    assert!(
        of_guests.any(|note| note.2 == Err(exhausted)),
        "{exhausted}"
    );
}
