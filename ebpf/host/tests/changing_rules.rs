//! Flows and changes of rules, with a real TAP device and the kernel's own stack on the other side.

mod network;

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};

use keelson_ebpf::{DropReason, EgressPolicy, HookChoice, InterfacePolicy, Protocol, Rule};
use network::frames::{self, Ends};
use network::{Guest, HOST_IP, HOST_MAC, Network, allow, host_socket};

with_both_hooks!(
    no_packet_that_both_rule_sets_allow_is_lost,
    a_flow_ends_with_the_rule_that_let_it_be,
    answers_need_no_rule,
    flows_outlive_the_agent
);

const ROUNDS: u32 = 300;

fn to_host(guest: &Guest) -> Ends {
    Ends {
        source_mac: guest.mac,
        destination_mac: HOST_MAC,
        source: guest.ip,
        destination: HOST_IP,
    }
}

fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 64];
    let (length, _) = socket.recv_from(&mut buffer).expect("the datagram arrives");
    buffer[..length].to_vec()
}

/// Two rule sets, put in force in turn while packets come: what both allow arrives, every single one;
/// what neither allows never does.
fn no_packet_that_both_rule_sets_allow_is_lost(hook: HookChoice) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let rules = [
        guest.policy_with(&[allow(Protocol::Udp, 7000..=7000)]),
        guest.policy_with(&[
            allow(Protocol::Udp, 6990..=7010),
            network::allow_from(Protocol::Tcp, 22..=22, "10.0.0.0/8"),
        ]),
    ];
    datapath.attach(&rules[0]).expect("attached");
    guest.up();
    let done = AtomicBool::new(false);
    let changes = std::thread::scope(|scope| {
        scope.spawn(|| {
            let socket = host_socket(9000);
            for round in 0..ROUNDS {
                // A new flow each time, and one that goes on.
                let fresh = UdpSocket::bind((HOST_IP, 0)).expect("bound");
                fresh.send_to(b"no", (guest.ip, 9)).expect("sent");
                for (sender, text) in [(&fresh, "fresh"), (&socket, "going on")] {
                    let text = format!("{text} {round}");
                    sender
                        .send_to(text.as_bytes(), (guest.ip, 7000))
                        .expect("sent");
                    let seen = frames::seen(&guest.receive());
                    assert_eq!(String::from_utf8_lossy(&seen.data), text);
                }
            }
            done.store(true, Ordering::Release);
        });
        let mut changes = 0_usize;
        while !done.load(Ordering::Acquire) {
            changes += 1;
            datapath.update(&rules[changes % 2]).expect("updated");
        }
        changes
    });
    assert!(changes > 0, "rules changed meanwhile");
    let counters = datapath.counters(&guest.name).expect("attached");
    let not_allowed = counters.to_guest.dropped_for(DropReason::NotAllowed);
    assert_eq!(not_allowed.packets, u64::from(ROUNDS));
}

fn a_flow_ends_with_the_rule_that_let_it_be(hook: HookChoice) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let only_dns = InterfacePolicy {
        egress: EgressPolicy::Only(vec![allow(Protocol::Udp, 9000..=9000)]),
        ..guest.policy()
    };
    datapath.attach(&only_dns).expect("attached");
    guest.up();
    let socket = host_socket(9000);
    guest.send(&frames::udp(to_host(&guest), 4000, 9000, b"one"));
    assert_eq!(receive(&socket), b"one");
    socket.send_to(b"answer", (guest.ip, 4000)).expect("sent");
    assert_eq!(frames::seen(&guest.receive()).data, b"answer");

    let nothing = InterfacePolicy {
        egress: EgressPolicy::Only(Vec::new()),
        ..only_dns.clone()
    };
    datapath.update(&nothing).expect("updated");
    socket.send_to(b"late", (guest.ip, 4000)).expect("sent");
    guest.send(&frames::udp(to_host(&guest), 4000, 9000, b"two"));
    let counters = datapath.counters(&guest.name).expect("attached");
    for direction in [&counters.from_guest, &counters.to_guest] {
        assert_eq!(direction.dropped_for(DropReason::NotAllowed).packets, 1);
    }

    datapath.update(&only_dns).expect("updated");
    guest.send(&frames::udp(to_host(&guest), 4000, 9000, b"three"));
    assert_eq!(receive(&socket), b"three");
    assert!(guest.receive_now().is_none(), "the late answer is lost");
}

/// Stateful in both directions: egress is closed, and the guest answers what its ingress let in.
fn answers_need_no_rule(hook: HookChoice) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let closed = InterfacePolicy {
        egress: EgressPolicy::Only(Vec::new()),
        ..guest.policy_with(&[allow(Protocol::Udp, 7000..=7000)])
    };
    datapath.attach(&closed).expect("attached");
    guest.up();
    let socket = host_socket(9000);
    guest.send(&frames::udp(to_host(&guest), 7000, 9000, b"unasked"));
    socket.send_to(b"question", (guest.ip, 7000)).expect("sent");
    assert_eq!(frames::seen(&guest.receive()).data, b"question");
    guest.send(&frames::udp(to_host(&guest), 7000, 9000, b"answer"));
    assert_eq!(receive(&socket), b"answer");
    let counters = datapath.counters(&guest.name).expect("attached");
    let dropped = counters.from_guest.dropped_for(DropReason::NotAllowed);
    assert_eq!(dropped.packets, 1, "what was sent unasked");
}

/// Nobody runs for a while, then the next one takes over: policy and flows were there all the time.
fn flows_outlive_the_agent(hook: HookChoice) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let policy = guest.policy_with(&[allow(Protocol::Udp, 7000..=7000)]);
    datapath.attach(&policy).expect("attached");
    guest.up();
    let socket = host_socket(9000);
    guest.send(&frames::udp(to_host(&guest), 4000, 9000, b"hello"));
    assert_eq!(receive(&socket), b"hello");
    socket.send_to(b"one", (guest.ip, 4000)).expect("sent");
    assert_eq!(frames::seen(&guest.receive()).data, b"one");
    drop(datapath);
    socket.send_to(b"two", (guest.ip, 4000)).expect("sent");
    assert_eq!(frames::seen(&guest.receive()).data, b"two");
    socket.send_to(b"no", (guest.ip, 9)).expect("sent");
    let mut datapath = network.open();
    datapath.attach(&policy).expect("taken over");
    socket.send_to(b"three", (guest.ip, 4000)).expect("sent");
    assert_eq!(frames::seen(&guest.receive()).data, b"three");
    let counters = datapath.counters(&guest.name).expect("attached");
    assert_eq!(counters.to_guest.passed.packets, 3);
    let dropped = counters.to_guest.dropped_for(DropReason::NotAllowed);
    assert_eq!(dropped.packets, 1);
}

#[test]
fn a_hundred_thousand_rules_can_be_put_in_force_and_replaced() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let mut rules: Vec<Rule> = (0..100_000_u32)
        .map(|index| {
            let peer = std::net::Ipv4Addr::from_bits(0x0b00_0000 + index);
            let port = u16::try_from(1 + index % 1000).expect("small");
            network::allow_from(Protocol::Udp, port..=port, &peer.to_string())
        })
        .collect();
    datapath
        .attach(&guest.policy_with(&rules))
        .expect("attached");
    guest.up();
    rules.push(allow(Protocol::Udp, 7000..=7000));
    datapath
        .update(&guest.policy_with(&rules))
        .expect("updated");
    let socket = host_socket(9000);
    socket.send_to(b"yes", (guest.ip, 7000)).expect("sent");
    assert_eq!(frames::seen(&guest.receive()).data, b"yes");
    socket.send_to(b"no", (guest.ip, 7001)).expect("sent");
    let counters = datapath.counters(&guest.name).expect("attached");
    assert_eq!(
        counters
            .to_guest
            .dropped_for(DropReason::NotAllowed)
            .packets,
        1
    );
}
