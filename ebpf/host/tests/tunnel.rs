//! Guests of one network on two hosts reach each other by the tunnel: real network stacks, TCP with
//! segmentation offloads, fragments, over both versions of IP, and an underlay of either.

mod network;

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use keelson_ebpf::{
    Direction, DropReason, Happening, HookChoice, InterfacePolicy, MacAddress, Observed, Service,
    ServiceBackend,
};
use network::frames::{self, Ends};
use network::hosts::{Hosts, MTU, NETWORK, PORT, Underlay, VNI, policy, remote};
use network::machine::{Machine, connect, datagrams, exchange, talk};
use network::uplink::ping;
use network::{PATIENCE, ip};

with_both_hooks!(
    guests_talk_over_ipv4,
    guests_talk_over_ipv6,
    a_guest_moves_and_goes_on
);

/// More than any window, so that large segments come about.
const MUCH: usize = 4 << 20;
const SERVED: u16 = 7000;

fn addresses(guest: &Machine) -> [IpAddr; 2] {
    [guest.ipv4, guest.ipv6]
}

/// IP packets that a host had to cut to get them out, of both versions of IP.
fn fragments() -> Vec<String> {
    let ipv4 = fs::read_to_string("/proc/net/snmp").expect("read");
    let mut lines = ipv4.lines().filter_map(|line| line.strip_prefix("Ip: "));
    let names = lines.next().expect("names").split(' ');
    let mut values = names.zip(lines.next().expect("values").split(' '));
    let created = values.find(|(name, _)| *name == "FragCreates");
    let ipv6 = fs::read_to_string("/proc/net/snmp6").expect("read");
    let created_v6 = ipv6.lines().find(|line| line.starts_with("Ip6FragCreates"));
    let created_v6 = created_v6.and_then(|line| line.split_whitespace().last());
    let created = created.map(|(_, value)| value);
    [created, created_v6]
        .into_iter()
        .map(|count| count.expect("counted").to_owned())
        .collect()
}

fn guests_talk_over_ipv4(hook: HookChoice) {
    guests_talk(hook, Underlay::Ipv4);
}

fn guests_talk_over_ipv6(hook: HookChoice) {
    guests_talk(hook, Underlay::Ipv6);
}

fn guests_talk(hook: HookChoice, underlay: Underlay) {
    let hosts = Hosts::new(hook, underlay);
    hosts.there.serve(SERVED);
    for to in addresses(&hosts.there) {
        hosts.here.run(move || {
            let to = SocketAddr::new(to, SERVED);
            let (mut stream, number) = connect(to);
            assert_eq!(number, 2);
            talk(&mut stream, MUCH).expect("it answers");
            let datagrams = datagrams(to);
            exchange(&datagrams, 100).expect("it answers");
            // Fragments follow their first one.
            exchange(&datagrams, 5000).expect("it answers");
            assert!(ping(to.ip(), 1));
        });
    }
    for host in [&hosts.one, &hosts.other] {
        let (counters, fragments) = host.run(|inside| {
            let counters = inside.datapath().tunnel_counters().expect("read");
            (counters.expect("there is a tunnel"), fragments())
        });
        assert!(counters.sent.bytes > 2 * MUCH as u64, "{counters:?}");
        let received = counters.received;
        assert!(received.passed.bytes > 2 * MUCH as u64, "{received:?}");
        assert!(received.dropped.is_empty(), "{received:?}");
        assert_eq!(fragments, ["0", "0"], "packets fit into the underlay");
    }
    let counters = hosts
        .one
        .run(|inside| inside.datapath().counters("tap1").expect("attached"));
    assert!(counters.from_guest.dropped.is_empty(), "{counters:?}");
}

/// By each host's own rules: what the destination's let in, and nothing else.
#[test]
fn the_destination_decides_about_what_comes() {
    let hosts = Hosts::new(HookChoice::Auto, Underlay::Ipv4);
    hosts.there.serve(SERVED);
    let nothing = InterfacePolicy {
        ingress: Vec::new(),
        ..policy(&hosts.there)
    };
    hosts.other.attach(&hosts.there, nothing);
    let to = SocketAddr::new(hosts.there.ipv4, SERVED);
    hosts.here.run(move || {
        let socket = datagrams(to);
        socket.send(b"unwanted").expect("sent");
    });
    hosts.other.run(|inside| {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let counters = inside.datapath().counters("tap2").expect("attached");
            if counters
                .to_guest
                .dropped_for(DropReason::NotAllowed)
                .packets
                > 0
            {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{counters:?}");
            std::thread::yield_now();
        }
    });
    let isolated = InterfacePolicy {
        isolated: true,
        ..policy(&hosts.here)
    };
    hosts.one.attach(&hosts.here, isolated);
    hosts.here.run(move || {
        let socket = datagrams(to);
        socket.send(b"kept apart").expect("sent");
    });
    let counters = hosts
        .one
        .run(|inside| inside.datapath().counters("tap1").expect("attached"));
    let dropped = counters.from_guest.dropped_for(DropReason::Isolated);
    assert!(dropped.packets > 0, "{counters:?}");
}

/// A guest's datagram as VXLAN carries it (RFC 7348, 5).
fn encapsulated(vni: u32, source_mac: MacAddress, hosts: &Hosts) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (hosts.there.ipv4, hosts.here.ipv4) else {
        unreachable!("of IPv4");
    };
    let ends = Ends {
        source_mac,
        destination_mac: hosts.here.mac,
        source,
        destination,
    };
    let [_, a, b, c] = vni.to_be_bytes();
    let header = [8, 0, 0, 0, a, b, c, 0];
    [&header[..], &frames::udp(ends, 1000, SERVED, b"forged")].concat()
}

#[test]
fn only_the_senders_host_may_send() {
    let hosts = Hosts::new(HookChoice::Auto, Underlay::Ipv4);
    let socket = hosts.here.run(|| {
        let socket = UdpSocket::bind(("0.0.0.0", SERVED)).expect("bound");
        socket.set_read_timeout(Some(PATIENCE)).expect("set");
        socket
    });
    let own = hosts.there.mac;
    let stranger = MacAddress([0x52, 0x54, 0, 0, 0, 77]);
    let to = SocketAddr::new(hosts.one.address, PORT);
    let forged = [
        // A host that nobody knows, in the guest's name.
        ("10.50.0.99", encapsulated(VNI, own, &hosts)),
        // A host that is known, in the name of nobody, and of a guest of the other host.
        ("10.50.0.2", encapsulated(VNI, stranger, &hosts)),
        ("10.50.0.2", encapsulated(VNI, hosts.here.mac, &hosts)),
        // And by the identifier of another network.
        ("10.50.0.2", encapsulated(VNI + 1, own, &hosts)),
    ];
    let count = forged.len();
    let mut reader = hosts.one.run(|inside| {
        let drops = Observed {
            drops: true,
            flows: false,
        };
        inside.datapath().observe(drops).expect("observed");
        let reader = inside.datapath().take_event_reader();
        reader.expect("the first")
    });
    let real = encapsulated(VNI, own, &hosts);
    hosts.other.run(move |_| {
        ip("addr add 10.50.0.99/24 dev under0");
        for (from, packet) in forged {
            let socket = UdpSocket::bind((from, 0)).expect("bound");
            socket.send_to(&packet, to).expect("sent");
        }
        let socket = UdpSocket::bind(("10.50.0.2", 0)).expect("bound");
        socket.send_to(&real, to).expect("sent");
    });
    let mut buffer = [0; 100];
    let (length, _) = socket.recv_from(&mut buffer).expect("the host's own comes");
    assert_eq!(&buffer[..length], b"forged");
    socket.set_nonblocking(true).expect("set");
    assert!(socket.recv_from(&mut buffer).is_err(), "one, and no other");
    let counters = hosts.one.run(|inside| {
        let counters = inside.datapath().tunnel_counters().expect("read");
        counters.expect("there is a tunnel")
    });
    let received = counters.received;
    assert_eq!(received.passed.packets, 1, "{received:?}");
    let dropped = received.dropped_for(DropReason::UnknownPeer);
    assert_eq!(dropped.packets, count as u64, "{received:?}");
    let events = hosts.one.run(move |_| reader.read(100));
    let unknown = Happening::Dropped(DropReason::UnknownPeer);
    let told: Vec<_> = events
        .iter()
        .filter(|event| event.happening == unknown && event.direction == Direction::ToGuest)
        .collect();
    assert_eq!(told.len(), count, "{events:?}");
    assert!(
        told.iter().all(|event| event.interface == "vx0"),
        "{told:?}"
    );
}

#[test]
fn guests_dont_reach_the_tunnels_port() {
    let hosts = Hosts::new(HookChoice::Auto, Underlay::Ipv4);
    let packet = encapsulated(VNI, hosts.there.mac, &hosts);
    hosts.here.run(move || {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).expect("bound");
        for to in ["10.77.0.1", "10.50.0.1", "10.50.0.2"] {
            socket.send_to(&packet, (to, PORT)).expect("sent");
        }
    });
    let counters = hosts
        .one
        .run(|inside| inside.datapath().counters("tap1").expect("attached"));
    let dropped = counters.from_guest.dropped_for(DropReason::TunnelPort);
    assert_eq!(dropped.packets, 3, "{counters:?}");
}

/// A connection between the guests outlives that one of them moves to the other's host.
fn a_guest_moves_and_goes_on(hook: HookChoice) {
    let hosts = Hosts::new(hook, Underlay::Ipv4);
    hosts.there.serve(SERVED);
    let to = SocketAddr::new(hosts.there.ipv4, SERVED);
    let mut stream = hosts.here.run(move || {
        let (mut stream, _) = connect(to);
        talk(&mut stream, MUCH).expect("it answers");
        stream
    });
    hosts.one.run(|inside| {
        ip("link del tap1");
        assert!(inside.datapath().detach("tap1").expect("detached"));
    });
    hosts.one.knows(&hosts.here, Some(&hosts.other));
    hosts.other.knows(&hosts.here, None);
    let mut here = hosts.here;
    here = hosts.other.run(move |_| {
        here.link_again();
        here.run(|| ip(&format!("link set eth0 mtu {MTU}")));
        here
    });
    hosts.other.attach(&here, policy(&here));
    here.run(move || {
        talk(&mut stream, MUCH).expect("it goes on");
    });
    // And with a guest of the host that it left.
    let third = hosts.one.guest(3);
    hosts.other.knows(&third, Some(&hosts.one));
    third.serve(SERVED);
    let to = SocketAddr::new(third.ipv4, SERVED);
    here.run(move || {
        let (mut stream, number) = connect(to);
        assert_eq!(number, 3);
        talk(&mut stream, MUCH).expect("it answers");
    });
}

/// While a guest is moved live both hosts have its interface, and one has the guest.
#[test]
fn a_guest_on_its_way_is_reached_where_it_is() {
    let hosts = Hosts::new(HookChoice::Auto, Underlay::Ipv4);
    let coming = hosts.other.guest(3);
    coming.serve(SERVED);
    hosts.other.knows(&coming, Some(&hosts.one));
    let to = SocketAddr::new(coming.ipv4, SERVED);
    hosts.there.run(move || {
        datagrams(to).send(b"where it was").expect("sent");
    });
    hosts.other.run(|inside| {
        let deadline = std::time::Instant::now() + PATIENCE;
        let sent = |inside: &mut network::hosts::Inside| {
            let counters = inside.datapath().tunnel_counters().expect("read");
            counters.expect("there is a tunnel").sent.packets
        };
        while sent(inside) == 0 {
            assert!(std::time::Instant::now() < deadline, "it is sent here");
            std::thread::yield_now();
        }
    });
    hosts.other.knows(&coming, None);
    hosts.there.run(move || assert_eq!(connect(to).1, 3));
}

#[test]
fn connections_outlive_the_agent() {
    let hosts = Hosts::new(HookChoice::Auto, Underlay::Ipv4);
    hosts.there.serve(SERVED);
    let to = SocketAddr::new(hosts.there.ipv4, SERVED);
    let mut stream = hosts.here.run(move || connect(to).0);
    let there = remote(&hosts.there, hosts.other.address);
    hosts.one.run(|inside| inside.datapath = None);
    let mut stream = hosts.here.run(move || {
        talk(&mut stream, MUCH).expect("without an agent");
        stream
    });
    hosts.one.run(move |inside| {
        inside.datapath = Some(inside.network.open());
    });
    let mut stream = hosts.here.run(move || {
        talk(&mut stream, MUCH).expect("with one that knows nothing yet");
        stream
    });
    hosts.one.run(move |inside| {
        let guests = [("tap2".to_owned(), vec![there])];
        let datapath = inside.datapath();
        datapath.set_all_remote(guests.into()).expect("written");
    });
    hosts.here.run(move || {
        talk(&mut stream, MUCH).expect("as before");
    });
    // Who isn't in the list is unknown, whoever put it there.
    hosts.one.run(|inside| {
        let datapath = inside.datapath();
        datapath.set_all_remote([].into()).expect("written");
        datapath.set_tunnel(None).expect("detached");
        assert_eq!(datapath.tunnel_counters().expect("read"), None);
    });
}

/// Clients translate: a service's backend may be on another host.
#[test]
fn a_service_has_its_backend_on_another_host() {
    let hosts = Hosts::new(HookChoice::Auto, Underlay::Ipv4);
    hosts.there.serve(SERVED);
    let backend = ServiceBackend {
        address: hosts.there.ipv4,
        port: SERVED,
        mac: hosts.there.mac,
    };
    let address: IpAddr = "10.77.0.80".parse().expect("valid");
    hosts.one.run(move |inside| {
        let service = Service {
            network: NETWORK,
            address,
            protocol: keelson_ebpf::Protocol::Tcp,
            port: 80,
            backends: vec![backend],
            draining: Vec::new(),
        };
        inside.datapath().set_services(&[service]).expect("written");
    });
    hosts.here.run(move || {
        let (mut stream, number) = connect(SocketAddr::new(address, 80));
        assert_eq!(number, 2);
        talk(&mut stream, MUCH).expect("it answers");
    });
}
