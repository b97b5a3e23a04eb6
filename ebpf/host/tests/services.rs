//! Services under real traffic: network stacks in namespaces, TCP with segmentation offloads and UDP with
//! fragments, over IPv4 and IPv6, from a guest, from the host and from behind it.

mod network;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{SocketAddr, TcpStream};

use keelson_ebpf::{
    Direction, DirectionCounters, DropReason, HookChoice, MacAddress, Protocol, SERVICE_MAC,
    Service, ServiceBackend, Verdict,
};
use network::fleet::{ADDRESSES, Fleet, SERVED, service_at};
use network::frames;
use network::machine::{Machine, connect, datagrams, exchange, talk};

with_both_hooks!(
    everyone_reaches_all_backends,
    flows_of_a_backend_that_is_gone_move,
    flows_of_a_backend_that_drains_go_on_until_it_is_gone,
    services_outlive_the_agent
);

/// More than any window, so that large segments come about.
const MUCH: usize = 4 << 20;

/// Both versions of IP, many flows: how many went to which backend.
fn use_service() -> BTreeMap<u8, u32> {
    let mut shares = BTreeMap::new();
    for address in ADDRESSES {
        let to = service_at(address, 80);
        for _ in 0..20 {
            let (mut stream, number) = connect(to);
            talk(&mut stream, 1000).expect("it answers");
            *shares.entry(number).or_insert(0) += 1;
            let socket = datagrams(to);
            let number = exchange(&socket, 100).expect("it answers");
            assert_eq!(exchange(&socket, 100).expect("it answers"), number);
            // Fragments follow their first one.
            assert_eq!(exchange(&socket, 5000).expect("it answers"), number);
            *shares.entry(number).or_insert(0) += 1;
        }
        let (mut stream, _) = connect(to);
        talk(&mut stream, MUCH).expect("it answers");
    }
    shares
}

fn everyone_reaches_all_backends(hook: HookChoice) {
    let fleet = Fleet::new(hook);
    let outside = Machine::outside(4);
    let by_guest = fleet.client().run(use_service);
    let by_host = use_service();
    let by_outside = outside.run(use_service);
    for shares in [by_guest, by_host, by_outside] {
        println!("{shares:?}");
        // One backend only: a chance of 2 to the power of -79.
        assert_eq!(shares.keys().copied().collect::<Vec<_>>(), [1, 2]);
    }
    let counters = fleet.datapath.counters("tap3").expect("attached");
    assert_eq!(dropped(&counters.from_guest), []);
}

fn dropped(counters: &DirectionCounters) -> Vec<(DropReason, u64)> {
    let dropped = counters
        .dropped
        .iter()
        .map(|(reason, tally)| (*reason, tally.packets));
    dropped.filter(|(_, packets)| *packets > 0).collect()
}

/// Connections of the client, until each backend has one.
fn one_with_each(to: SocketAddr) -> [TcpStream; 2] {
    let mut found = [None, None];
    while found.iter().any(Option::is_none) {
        let (stream, number) = connect(to);
        found[usize::from(number) - 1].get_or_insert(stream);
    }
    found.map(|stream| stream.expect("found"))
}

#[test]
fn flows_stay_with_their_backends() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    fleet.guests[2].serve(SERVED);
    let mut streams = Vec::new();
    for address in ADDRESSES {
        let to = service_at(address, 80);
        streams.extend(fleet.client().run(move || one_with_each(to)));
        streams.extend(one_with_each(to));
    }
    // A third one comes, and goes again.
    for backends in [&[0, 1, 2][..], &[0, 1], &[2, 1, 0]] {
        fleet.serve_from(backends);
        for stream in &mut streams {
            talk(stream, 10_000).expect("the flow goes on");
        }
    }
}

fn flows_of_a_backend_that_is_gone_move(hook: HookChoice) {
    let mut fleet = Fleet::new(hook);
    for address in ADDRESSES {
        fleet.serve_from(&[0, 1]);
        let to = service_at(address, 80);
        let [mut first, mut second] = fleet.client().run(move || one_with_each(to));
        let socket = fleet.client().run(move || {
            let mut sockets = std::iter::repeat_with(|| datagrams(to));
            let to_second = |socket: &_| exchange(socket, 100).expect("it answers") == 2;
            sockets.find(to_second).expect("endless")
        });
        fleet.serve_from(&[0]);
        talk(&mut first, MUCH).expect("the other's flow goes on");
        assert_eq!(exchange(&socket, 100).expect("it answers"), 1);
        let error = talk(&mut second, 1000).expect_err("nobody knows the connection");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
        let numbers = fleet.client().run(move || [0; 10].map(|_| connect(to).1));
        assert_eq!(numbers, [1; 10]);
    }
}

fn flows_of_a_backend_that_drains_go_on_until_it_is_gone(hook: HookChoice) {
    let mut fleet = Fleet::new(hook);
    let mut streams = Vec::new();
    let mut sockets = Vec::new();
    for address in ADDRESSES {
        let to = service_at(address, 80);
        streams.push(fleet.client().run(move || one_with_each(to)));
        streams.push(one_with_each(to));
        sockets.push(fleet.client().run(move || {
            let mut sockets = std::iter::repeat_with(|| datagrams(to));
            let to_second = |socket: &_| exchange(socket, 100).expect("it answers") == 2;
            sockets.find(to_second).expect("endless")
        }));
    }
    fleet.drain(&[0], &[1]);
    for _ in 0..2 {
        for stream in streams.iter_mut().flatten() {
            talk(stream, 100_000).expect("it goes on with its backend");
        }
        for socket in &sockets {
            assert_eq!(exchange(socket, 100).expect("it answers"), 2);
            assert_eq!(exchange(socket, 5000).expect("it answers"), 2, "fragments");
        }
        let new = || ADDRESSES.map(|address| [0; 10].map(|_| connect(service_at(address, 80)).1));
        assert_eq!(fleet.client().run(new), [[1; 10]; 2]);
        assert_eq!(new(), [[1; 10]; 2]);
        // The next agent knows who drains.
        fleet = fleet.open_again();
        let found = fleet.datapath.services().expect("read");
        let numbers = found.iter().map(|service| {
            let numbers = |backends: &[ServiceBackend]| -> Vec<u8> {
                backends.iter().map(|backend| backend.mac.0[5]).collect()
            };
            (numbers(&service.backends), numbers(&service.draining))
        });
        assert_eq!(numbers.collect::<Vec<_>>(), vec![(vec![1], vec![2]); 4]);
    }
    // Its time is over.
    fleet.serve_from(&[0]);
    for [first, second] in &mut streams {
        talk(first, MUCH).expect("the other's flow goes on");
        let error = talk(second, 1000).expect_err("nobody knows the connection");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    }
    for socket in &sockets {
        assert_eq!(exchange(socket, 100).expect("it answers"), 1);
    }
}

/// It drains, and serves again: as if nothing had been. If all drain, what is new is dropped.
#[test]
fn a_backend_that_drains_no_longer_gets_its_share() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    let to = service_at(ADDRESSES[0], 80);
    let mut streams = fleet.client().run(move || one_with_each(to));
    fleet.drain(&[], &[1, 0]);
    for stream in &mut streams {
        talk(stream, 10_000).expect("it goes on");
    }
    fleet.client().run(move || {
        datagrams(to).send(b"anyone?").expect("sent");
    });
    let counters = fleet.datapath.counters("tap3").expect("attached");
    let dropped = counters.from_guest.dropped_for(DropReason::NoBackend);
    assert_eq!(dropped.packets, 1);
    fleet.serve_from(&[0, 1]);
    for stream in &mut streams {
        talk(stream, 10_000).expect("it goes on");
    }
    fleet.client().run(move || one_with_each(to));
}

/// A client uses its ports again, sooner or later: a new connection is new though there was one between the same ends,
/// and a packet of the one that was goes where it went.
#[test]
fn a_connection_from_the_same_port_goes_to_who_does_not_drain() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    let ports = 20_000..20_100;
    let first = ask(&mut fleet, ports.clone(), frames::SYN);
    let numbers: BTreeSet<u8> = first.iter().copied().collect();
    assert_eq!(numbers, BTreeSet::from([1, 2]));
    fleet.drain(&[0], &[1]);
    let known = ask(&mut fleet, ports.clone(), frames::ACK);
    assert_eq!(known, first, "what is known goes on");
    let again = ask(&mut fleet, ports.clone(), frames::SYN);
    assert_eq!(again, [1; 100]);
    assert_eq!(ask(&mut fleet, ports, frames::ACK), [1; 100]);
}

/// Which backends segments with these flags go to that the client sends from these ports.
fn ask(fleet: &mut Fleet, ports: std::ops::Range<u16>, flags: u8) -> Vec<u8> {
    let client = fleet.client().policy();
    let ends = frames::Ends {
        source_mac: client.mac,
        destination_mac: MacAddress(SERVICE_MAC),
        source: client.ipv4.expect("it has one"),
        destination: ADDRESSES[0].parse().expect("valid"),
    };
    let numbers = ports.map(|port| {
        let tcp = frames::Tcp {
            source_port: port,
            destination_port: 80,
            sequence: 1,
            acknowledgement: 1,
            flags,
        };
        let frame = frames::tcp(ends, tcp);
        let sent = fleet
            .datapath
            .translate("tap3", Direction::FromGuest, &frame);
        let (_, after) = sent.expect("the kernel takes the frame");
        assert_eq!(after[..5], [0x52, 0x54, 0, 0, 0], "a guest's");
        after[5]
    });
    numbers.collect()
}

#[test]
fn a_guest_reaches_itself() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    fleet.serve_from(&[0]);
    let shares = fleet.guests[0].run(use_service);
    assert_eq!(shares.keys().copied().collect::<Vec<_>>(), [1]);
    let counters = fleet.datapath.counters("tap1").expect("attached");
    assert_eq!(dropped(&counters.from_guest), []);
}

/// Nobody listens where the service leads to: whoever asks is told so, in the service's name.
#[test]
fn errors_find_their_way_back() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    let services = fleet.services(&[0], SERVED + 1);
    fleet.datapath.set_services(&services).expect("valid");
    let outside = Machine::outside(4);
    for address in ADDRESSES {
        let to = service_at(address, 80);
        let ask = move || {
            let socket = datagrams(to);
            socket.send(b"anyone?").expect("sent");
            let by_udp = socket.recv(&mut [0; 16]).expect_err("nobody answers");
            let by_tcp = TcpStream::connect_timeout(&to, network::PATIENCE);
            [by_udp, by_tcp.expect_err("nobody listens")].map(|error| error.kind())
        };
        let refused = [io::ErrorKind::ConnectionRefused; 2];
        assert_eq!(fleet.client().run(ask), refused, "{address}");
        assert_eq!(ask(), refused, "{address}");
        assert_eq!(outside.run(ask), refused, "{address}");
    }
}

#[test]
fn what_no_service_has_is_dropped() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    let dropped = |fleet: &Fleet, reason| {
        let counters = fleet.datapath.counters("tap3").expect("attached");
        counters.from_guest.dropped_for(reason).packets
    };
    for (index, address) in (1..).zip(ADDRESSES) {
        fleet.client().run(move || {
            let socket = datagrams(service_at(address, 81));
            socket.send(b"anyone?").expect("sent");
        });
        assert_eq!(dropped(&fleet, DropReason::NoService), index);
    }
    fleet.serve_from(&[]);
    for (index, address) in (1..).zip(ADDRESSES) {
        fleet.client().run(move || {
            let socket = datagrams(service_at(address, 80));
            socket.send(b"anyone?").expect("sent");
        });
        assert_eq!(dropped(&fleet, DropReason::NoBackend), index);
    }
}

/// The client has a connection to a backend from the very port from which it goes there through the
/// service.
#[test]
fn a_port_that_is_in_use_is_told_apart() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    fleet.serve_from(&[0]);
    for address in ADDRESSES {
        let to = service_at(address, 80);
        let backend = if to.is_ipv4() {
            fleet.guests[0].ipv4
        } else {
            fleet.guests[0].ipv6
        };
        fleet.client().run(move || {
            let direct = datagrams(SocketAddr::new(backend, SERVED));
            assert_eq!(exchange(&direct, 10).expect("it answers"), 1);
            let own = direct.local_addr().expect("bound");
            direct.connect(to).expect("there is a route");
            assert_eq!(exchange(&direct, 20).expect("it answers"), 1);
            assert_eq!(direct.local_addr().expect("bound").port(), own.port());
            direct.connect((backend, SERVED)).expect("there is a route");
            assert_eq!(exchange(&direct, 30).expect("it answers"), 1);
        });
    }
    let counters = fleet.datapath.counters("tap3").expect("attached");
    assert_eq!(dropped(&counters.from_guest), []);
}

/// Nobody runs for a while, then the next one takes over: translations were there all the time.
fn services_outlive_the_agent(hook: HookChoice) {
    let Fleet {
        datapath,
        guests,
        network,
    } = Fleet::new(hook);
    let mut streams = Vec::new();
    for address in ADDRESSES {
        let to = service_at(address, 80);
        streams.extend(guests[2].run(move || one_with_each(to)));
        streams.extend(one_with_each(to));
    }
    let mut talk_all = || {
        for stream in &mut streams {
            talk(stream, 10_000).expect("the flow goes on");
        }
    };
    drop(datapath);
    talk_all();
    let datapath = network.open();
    talk_all();
    let mut fleet = Fleet {
        datapath,
        guests,
        network,
    };
    fleet.serve_from(&[1, 0]);
    talk_all();
    let shares = fleet.client().run(use_service);
    assert_eq!(shares.keys().copied().collect::<Vec<_>>(), [1, 2]);
    // All of it goes.
    fleet.datapath.set_services(&[]).expect("none");
    fleet.datapath.set_gateways(&[]).expect("none");
    let (verdict, _) = fleet
        .datapath
        .translate("tap3", Direction::FromGuest, &[0; 60])
        .expect("the kernel takes the frame");
    assert_eq!(verdict, Verdict::Drop);
    let moment = std::time::Duration::from_millis(200);
    let to = service_at(ADDRESSES[0], 80);
    TcpStream::connect_timeout(&to, moment).expect_err("nobody answers for the address");
}

#[test]
fn what_contradicts_itself_is_refused() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    let good = fleet.services(&[0, 1], SERVED).swap_remove(0);
    let wrong = [
        (
            Service {
                network: 0,
                ..good.clone()
            },
            "network",
        ),
        (
            Service {
                port: 0,
                ..good.clone()
            },
            "zero",
        ),
        (
            Service {
                protocol: Protocol::Icmp,
                ..good.clone()
            },
            "neither TCP nor UDP",
        ),
        (
            Service {
                backends: vec![good.backends[0]; 2],
                ..good.clone()
            },
            "twice",
        ),
        (
            Service {
                draining: vec![good.backends[0]],
                ..good.clone()
            },
            "twice",
        ),
        (
            Service {
                address: "fd77::80".parse().expect("valid"),
                ..good.clone()
            },
            "version of IP",
        ),
    ];
    for (service, expected) in wrong {
        let error = fleet.datapath.set_services(&[service]).expect_err("wrong");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let twice = [good.clone(), good];
    let error = fleet.datapath.set_services(&twice).expect_err("wrong");
    assert!(error.to_string().contains("twice"), "{error}");
}
