//! Flows that move to another host with their guest: connections in which the guest only receives go on,
//! the other host's rules judge them, and its limits hold.

mod network;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use keelson_ebpf::{
    Datapath, Direction, DropReason, EgressPolicy, HookChoice, InterfacePolicy, MovedFlows,
    Protocol, Rule, Verdict,
};
use network::frames::{self, Ends};
use network::hosts::{Hosts, Underlay, move_guest, policy};
use network::machine::Machine;
use network::{HOST_IP, HOST_MAC, Network, PATIENCE, allow};

const PORT: u16 = 7001;
/// How long nothing comes where nothing is to come: longer than TCP waits before it sends again.
const SILENCE: Duration = Duration::from_secs(3);

/// Has a machine send to whoever connects to it, without end.
fn pour(machine: &Machine) {
    machine.run(|| {
        let listener = TcpListener::bind(("0.0.0.0", PORT)).expect("the port is free");
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    while stream.write_all(&[1; 100]).is_ok() {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                });
            }
        });
    });
}

/// Reads until what was on its way is through, and then some more.
fn hears(stream: &mut TcpStream, patience: Duration) -> bool {
    stream.set_read_timeout(Some(patience)).expect("set");
    let mut buffer = vec![0; 1 << 16];
    let started = Instant::now();
    let mut heard = 0;
    while heard < 100_000 && started.elapsed() < 2 * PATIENCE {
        match stream.read(&mut buffer) {
            Ok(length) if length > 0 => heard += length,
            _ => return false,
        }
    }
    heard >= 100_000
}

/// Nobody may begin anything with the guest.
fn closed(guest: &Machine) -> InterfacePolicy {
    InterfacePolicy {
        ingress: Vec::new(),
        ..policy(guest)
    }
}

/// A guest that only receives moves, with its flows or without; whether it hears on under `there`.
fn hears_after_its_move(
    with_flows: bool,
    there: impl Fn(InterfacePolicy) -> InterfacePolicy,
) -> bool {
    let hosts = Hosts::new(HookChoice::Auto, Underlay::Ipv4);
    hosts.one.attach(&hosts.here, closed(&hosts.here));
    pour(&hosts.there);
    let to = SocketAddr::new(hosts.there.ipv4, PORT);
    let mut stream = hosts.here.run(move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).expect("it takes connections");
        assert!(hears(&mut stream, PATIENCE));
        stream
    });
    let policy = there(closed(&hosts.here));
    let way = [&hosts.one, &hosts.other];
    let (here, taken) = move_guest(hosts.here, way, policy, |flows| {
        if with_flows {
            flows
        } else {
            MovedFlows::default()
        }
    });
    assert_eq!(taken, usize::from(with_flows));
    here.run(move || hears(&mut stream, SILENCE))
}

#[test]
fn a_guest_that_only_receives_goes_on_with_its_flows_and_not_without() {
    assert!(hears_after_its_move(true, |policy| policy));
    assert!(!hears_after_its_move(false, |policy| policy));
}

#[test]
fn the_rules_where_it_comes_to_judge_its_flows() {
    let nowhere = |policy| InterfacePolicy {
        egress: EgressPolicy::Only(Vec::new()),
        ..policy
    };
    assert!(!hears_after_its_move(true, nowhere));
    let only_there = |policy| InterfacePolicy {
        egress: EgressPolicy::Only(vec![allow(Protocol::Tcp, PORT..=PORT)]),
        ..policy
    };
    assert!(hears_after_its_move(true, only_there));
}

struct Ports {
    mac: keelson_ebpf::MacAddress,
    address: std::net::Ipv4Addr,
}

impl Ports {
    fn frame(&self, direction: Direction, guest_port: u16) -> Vec<u8> {
        let out = Ends {
            source_mac: self.mac,
            destination_mac: HOST_MAC,
            source: self.address,
            destination: HOST_IP,
        };
        let back = Ends {
            source_mac: HOST_MAC,
            destination_mac: self.mac,
            source: HOST_IP,
            destination: self.address,
        };
        match direction {
            Direction::FromGuest => frames::udp(out, guest_port, PORT, b"asks"),
            Direction::ToGuest => frames::udp(back, PORT, guest_port, b"answers"),
        }
    }
}

fn passes(datapath: &mut Datapath, ports: &Ports, direction: Direction, port: u16) -> bool {
    let frame = ports.frame(direction, port);
    let verdict = datapath.evaluate("tap1", direction, &frame);
    verdict.expect("evaluated") == Verdict::Pass
}

/// Flows of a guest on another host: those to the first `answered` ports of both sides, the other ones of one.
fn flows(network: &Network, answered: u16, all: u16) -> MovedFlows {
    let mut datapath = network.open();
    let guest = network.guest(1);
    datapath.attach(&guest.policy()).expect("attached");
    let ports = Ports {
        mac: guest.mac,
        address: guest.ip,
    };
    for port in 1..=all {
        assert!(passes(&mut datapath, &ports, Direction::FromGuest, port));
        if port <= answered {
            assert!(passes(&mut datapath, &ports, Direction::ToGuest, port));
        }
    }
    let leaving = datapath.leaving_flows("tap1").expect("read");
    assert_eq!(leaving.flows.through_services, []);
    assert_eq!(
        (leaving.flows.translations.len(), leaving.mapped_ports),
        (0, 0)
    );
    assert_eq!(leaving.flows.direct.len(), usize::from(all));
    datapath.detach("tap1").expect("detached");
    leaving.flows
}

#[test]
fn no_more_flows_come_than_fit_and_other_guests_keep_theirs() {
    let mut network = Network::new(HookChoice::Auto);
    let flows = flows(&network, 2000, 2500);
    // As on another host: nothing is left of the first one.
    network.config.max_flows = 256;
    let mut datapath = network.open();
    let guest = network.guest(3);
    let ports = Ports {
        mac: guest.mac,
        address: guest.ip,
    };
    let policy = InterfacePolicy {
        name: "tap3".into(),
        ..guest.policy()
    };
    datapath.attach(&policy).expect("attached");
    let taken = datapath.take_flows("tap3", &flows).expect("taken");
    assert_eq!(taken, 256 + 256 / 4);
    let usage = datapath.statistics().expect("read")["tap3"].1;
    assert!(usage.established <= usage.max_established, "{usage:?}");
    assert!(usage.opening <= usage.max_opening, "{usage:?}");
    assert!(usage.established > 128, "{usage:?}");
    // What came lets through what it is for, and nothing else.
    let answers = (1..=2500).filter(|port| {
        let frame = ports.frame(Direction::ToGuest, *port);
        let verdict = datapath.evaluate("tap3", Direction::ToGuest, &frame);
        verdict.expect("evaluated") == Verdict::Pass
    });
    let answers = answers.count();
    assert!((128..=256 + 256 / 4).contains(&answers), "{answers}");
    let counters = datapath.counters("tap3").expect("attached");
    let dropped = counters.to_guest.dropped_for(DropReason::NotAllowed);
    assert_eq!(dropped.packets, 2500 - answers as u64);
    // A second guest's flows are its own.
    let other = network.guest(4);
    let open = InterfacePolicy {
        ingress: vec![allow(Protocol::Udp, Rule::ALL_PORTS)],
        ..other.policy()
    };
    datapath.attach(&open).expect("attached");
    let usage = datapath.statistics().expect("read")["tap4"].1;
    assert_eq!((usage.established, usage.opening), (0, 0));
    assert!(
        datapath.take_flows("tap5", &flows).is_err(),
        "no such interface"
    );
}
