//! Source NAT under real traffic: network stacks in namespaces, TCP with segmentation offloads, UDP with
//! fragments, ICMP, over IPv4 and IPv6, to a machine that can't reach the guests' network by itself.

mod network;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use keelson_ebpf::{Direction, DropReason, Happening, HookChoice, Observed, SourceNat};
use network::ip;
use network::machine::{connect, datagrams, exchange, talk};
use network::uplink::{
    EXTERNAL, MIRROR, PORTS, SERVED, Scene, UPLINK, do_not_fragment, hide, mirror, nat, path_mtu,
    ping, seen, set_option, socket,
};

with_both_hooks!(
    guests_reach_the_outside,
    two_guests_use_the_same_port,
    errors_find_their_way_back,
    the_uplink_goes_and_comes_back,
    connections_outlive_the_agent,
    the_last_network_leaves_nothing
);

/// More than any window, so that large segments come about.
const MUCH: usize = 4 << 20;

fn guests_reach_the_outside(hook: HookChoice) {
    let scene = Scene::new(hook);
    for (to, external) in scene.outside_at(SERVED).into_iter().zip(EXTERNAL) {
        let mirror = SocketAddr::new(to.ip(), MIRROR);
        let external: IpAddr = external.parse().expect("valid");
        scene.guests[0].run(move || {
            let (mut stream, _) = connect(to);
            talk(&mut stream, MUCH).expect("it answers");
            let datagrams = datagrams(to);
            exchange(&datagrams, 100).expect("it answers");
            // Fragments follow their first one, out and in.
            exchange(&datagrams, 5000).expect("it answers");
            assert!(ping(to.ip(), 1));
            let seen = seen(&socket(0, mirror)).expect("it answers");
            assert_eq!(seen.ip(), external);
            assert!(PORTS.contains(&seen.port()), "{seen}");
        });
    }
    let uses = scene.datapath.external_use().expect("read");
    assert_eq!(uses.len(), 2);
    for external in uses {
        assert_eq!(external.uplink, UPLINK);
        assert!(external.to_uplink.bytes > MUCH as u64, "{external:?}");
        assert!(external.from_uplink.bytes > MUCH as u64, "{external:?}");
    }
    let counters = scene.datapath.counters("tap1").expect("attached");
    assert!(counters.from_guest.dropped.is_empty(), "{counters:?}");
    let not_allowed = counters.to_guest.dropped_for(DropReason::NotAllowed);
    assert_eq!(not_allowed.packets, 0);
}

fn two_guests_use_the_same_port(hook: HookChoice) {
    let scene = Scene::new(hook);
    for mirror in scene.outside_at(MIRROR) {
        for port in [5000, 20_500] {
            let ask = move || {
                let socket = socket(port, mirror);
                let first = seen(&socket).expect("it answers");
                assert_eq!(seen(&socket).expect("it answers"), first);
                (socket, first)
            };
            let (one, first) = scene.guests[0].run(ask);
            let (_other, second) = scene.guests[1].run(ask);
            assert_ne!(first, second);
            assert_eq!(
                first.port() == port,
                PORTS.contains(&port),
                "kept where it can be"
            );
            assert!(PORTS.contains(&second.port()), "{second}");
            assert_eq!(seen(&one).expect("it answers"), first);
        }
        // And by the same identifiers.
        for guest in &scene.guests {
            assert!(guest.run(move || ping(mirror.ip(), 77)));
        }
    }
}

/// A port has one external port, whomever it talks to (RFC 4787, 4.1).
#[test]
fn a_mapping_is_independent_of_the_other_end() {
    let scene = Scene::new(HookChoice::Auto);
    scene.outside.run(|| {
        ip("addr add 10.99.0.200/24 dev eth0");
    });
    let other = SocketAddr::from(([10, 99, 0, 200], MIRROR + 1));
    mirror(&scene.outside, other);
    let [one, _] = scene.outside_at(MIRROR);
    scene.guests[0].run(move || {
        let socket = socket(6000, one);
        let first = seen(&socket).expect("it answers");
        socket.connect(other).expect("there is a route");
        assert_eq!(seen(&socket).expect("it answers"), first);
    });
}

fn errors_find_their_way_back(hook: HookChoice) {
    let scene = Scene::new(hook);
    scene.outside.run(|| {
        for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{file}"), "1").expect("it forwards");
        }
        ip("link add far mtu 1300 type veth peer name further");
        ip("link set further up");
        ip("addr add 10.88.0.1/24 dev far");
        ip("addr add fd88::1/64 dev far nodad");
        ip("link set far up");
    });
    ip("route add 10.88.0.0/24 via 10.99.0.109");
    ip("-6 route add fd88::/64 via fd99::100:9");
    for closed in scene.outside_at(9) {
        scene.guests[0].run(move || {
            let socket = datagrams(closed);
            socket.send(b"anyone?").expect("sent");
            let by_udp = socket.recv(&mut [0; 16]).expect_err("nobody answers");
            assert_eq!(by_udp.kind(), io::ErrorKind::ConnectionRefused);
            let by_tcp = TcpStream::connect_timeout(&closed, network::PATIENCE);
            let by_tcp = by_tcp.expect_err("nobody listens");
            assert_eq!(by_tcp.kind(), io::ErrorKind::ConnectionRefused);
        });
    }
    for far in ["10.88.0.9:9", "[fd88::9]:9"] {
        let far: SocketAddr = far.parse().expect("valid");
        scene.guests[0].run(move || {
            assert!(is_told_of_a_second_hop(far), "{far}");
            learn_the_path_mtu(far, 1300);
        });
    }
}

/// Whether a packet with two hops to live comes to an end with a message from behind the host.
fn is_told_of_a_second_hop(far: SocketAddr) -> bool {
    let socket = datagrams(far);
    if far.is_ipv4() {
        set_option(&socket, libc::IPPROTO_IP, libc::IP_TTL, 2);
        set_option(&socket, libc::IPPROTO_IP, libc::IP_RECVERR, 1);
    } else {
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 2);
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1);
    }
    socket.send(b"how far?").expect("sent");
    let error = socket.recv(&mut [0; 16]).expect_err("it ends on the way");
    error.raw_os_error() == Some(libc::EHOSTUNREACH)
}

fn learn_the_path_mtu(far: SocketAddr, mtu: i32) {
    let socket = datagrams(far);
    do_not_fragment(&socket);
    assert_eq!(path_mtu(&socket), 1500);
    let patience = std::time::Instant::now() + network::PATIENCE;
    while path_mtu(&socket) != mtu {
        assert!(std::time::Instant::now() < patience, "{far}");
        // Refused once it is known to be too large.
        let _ = socket.send(&[0; 1400]);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The way to a guest is narrower than the one to the host: the host tells whoever sends too much, about
/// a packet that it has translated already.
#[test]
fn the_outside_learns_the_path_mtu_to_a_guest() {
    let scene = Scene::new(HookChoice::Auto);
    for (mirror, external) in scene.outside_at(MIRROR).into_iter().zip(EXTERNAL) {
        let (_socket, seen) = scene.guests[0].run(move || {
            let socket = socket(6000, mirror);
            let seen = seen(&socket).expect("it answers");
            (socket, seen)
        });
        assert_eq!(seen.ip(), external.parse::<IpAddr>().expect("valid"));
        ip("link set br0 mtu 1300");
        scene.outside.run(move || learn_the_path_mtu(seen, 1300));
        ip("link set br0 mtu 1500");
    }
}

#[test]
fn ports_run_out_for_the_guest_that_wants_more() {
    let mut scene = Scene::new(HookChoice::Auto);
    let few = SourceNat {
        ports: 20_000..=20_003,
        ..nat()
    };
    scene.datapath.set_nat(&[few], &[]).expect("valid");
    let mut reader = scene.datapath.take_event_reader().expect("the first");
    let drops = Observed {
        drops: true,
        flows: false,
    };
    scene.datapath.observe(drops).expect("observed");
    let [mirror, _] = scene.outside_at(MIRROR);
    let (sockets, refused) = scene.guests[0].run(move || {
        let mut sockets = Vec::new();
        let mut refused = 0;
        for _ in 0..40 {
            let socket = socket(0, mirror);
            socket
                .set_read_timeout(Some(Duration::from_millis(100)))
                .expect("set");
            match seen(&socket) {
                Ok(_) => sockets.push(socket),
                Err(_) => refused += 1,
            }
        }
        (sockets, refused)
    });
    assert_eq!(sockets.len(), 4);
    let counters = scene.datapath.counters("tap1").expect("attached");
    let dropped = counters.from_guest.dropped_for(DropReason::PortsExhausted);
    assert_eq!(dropped.packets, refused);
    // Each is told as the guest's own, though it had left the guest's interface already.
    let exhausted = Happening::Dropped(DropReason::PortsExhausted);
    let mut events = reader.read(100);
    events.retain(|event| event.happening == exhausted);
    assert_eq!(events.len() as u64, refused);
    for event in events {
        assert_eq!(
            (event.interface.as_str(), event.direction),
            ("tap1", Direction::FromGuest)
        );
    }
    for socket in &sockets {
        seen(socket).expect("the others go on");
    }
    // Of TCP there are as many again.
    let [served, _] = scene.outside_at(SERVED);
    scene.guests[1].run(move || talk(&mut connect(served).0, 1000).expect("it answers"));
}

/// A guest has some ports and no more: its oldest ones go, and nobody else's.
#[test]
fn a_guest_can_not_take_all_ports() {
    let mut scene = Scene::new(HookChoice::Auto);
    let limited = SourceNat {
        ports: 20_000..=22_000,
        max_mappings: 512,
        ..nat()
    };
    scene.datapath.set_nat(&[limited], &[]).expect("valid");
    let [mirror, _] = scene.outside_at(MIRROR);
    let one = scene.guests[1].run(move || {
        let socket = socket(0, mirror);
        seen(&socket).expect("it answers");
        socket
    });
    let before = seen(&one).expect("it answers");
    scene.guests[0].run(move || {
        for port in 30_000..34_000 {
            let socket = socket(port, mirror);
            socket.send(b"one more").expect("sent");
        }
    });
    let counters = scene.datapath.counters("tap1").expect("attached");
    let dropped = counters.from_guest.dropped_for(DropReason::PortsExhausted);
    assert_eq!(dropped.packets, 0);
    assert_eq!(seen(&one).expect("it answers"), before);
    scene.guests[1].run(move || {
        for _ in 0..50 {
            seen(&socket(0, mirror)).expect("it answers");
        }
    });
}

/// The host's own connections, and what it serves itself, pass by the programs.
#[test]
fn the_host_goes_on_by_itself() {
    let scene = Scene::new(HookChoice::Auto);
    let listener = TcpListener::bind((EXTERNAL[0], 20_100)).expect("the port is free");
    let host = UdpSocket::bind((EXTERNAL[0], 20_101)).expect("the port is free");
    for to in scene.outside_at(SERVED) {
        talk(&mut connect(to).0, MUCH).expect("it answers");
        exchange(&datagrams(to), 5000).expect("it answers");
        assert!(ping(to.ip(), 5));
    }
    scene.outside.run(|| {
        TcpStream::connect((EXTERNAL[0], 20_100)).expect("the host listens");
        let socket = socket(0, "10.99.0.1:20101".parse().expect("valid"));
        socket.send(b"hello").expect("sent");
        assert!(ping("10.99.0.1".parse().expect("valid"), 9));
        assert!(ping("fd99::1".parse().expect("valid"), 9));
    });
    listener.accept().expect("it came");
    host.set_read_timeout(Some(network::PATIENCE)).expect("set");
    host.recv(&mut [0; 16]).expect("it came");
    for external in scene.datapath.external_use().expect("read") {
        assert_eq!(external.to_uplink.packets, 0);
        assert_eq!(external.from_uplink.packets, 0);
    }
}

/// Connections of a guest by both versions of IP.
fn connections(scene: &Scene) -> Vec<TcpStream> {
    let to = scene.outside_at(SERVED);
    scene.guests[0].run(move || to.map(|to| connect(to).0).into())
}

fn talk_all(streams: &mut [TcpStream]) {
    for stream in streams {
        talk(stream, 100_000).expect("the connection goes on");
    }
}

fn the_uplink_goes_and_comes_back(hook: HookChoice) {
    let mut scene = Scene::new(hook);
    let mut streams = connections(&scene);
    talk_all(&mut streams);
    ip(&format!("link del {UPLINK}"));
    let missing = scene.datapath.set_nat(&[nat()], &[]).expect("valid");
    assert_eq!(missing, [UPLINK]);
    scene.outside.relink();
    hide(&scene.outside);
    assert_eq!(
        scene.datapath.set_nat(&[nat()], &[]).expect("valid").len(),
        0
    );
    talk_all(&mut streams);
    let mut others = connections(&scene);
    talk_all(&mut others);
    let uses = scene.datapath.external_use().expect("read");
    assert_eq!(uses.len(), 2, "the addresses are the same");
}

/// Nobody runs for a while, then the next one takes over: what is translated was there all the time.
fn connections_outlive_the_agent(hook: HookChoice) {
    let scene = Scene::new(hook);
    let mut streams = connections(&scene);
    let Scene {
        datapath,
        guests,
        outside,
        network,
    } = scene;
    drop(datapath);
    talk_all(&mut streams);
    let datapath = network.open();
    talk_all(&mut streams);
    let mut scene = Scene {
        datapath,
        guests,
        outside,
        network,
    };
    assert_eq!(
        scene.datapath.set_nat(&[nat()], &[]).expect("valid").len(),
        0
    );
    talk_all(&mut streams);
    talk_all(&mut connections(&scene));
}

fn the_last_network_leaves_nothing(hook: HookChoice) {
    let mut scene = Scene::new(hook);
    let [mirror, _] = scene.outside_at(MIRROR);
    let socket = scene.guests[0].run(move || {
        let socket = socket(0, mirror);
        seen(&socket).expect("it answers");
        socket
    });
    scene.datapath.set_nat(&[], &[]).expect("none");
    assert!(scene.datapath.external_use().expect("read").is_empty());
    let links = scene.network.config.pin_root.join("links");
    let names = std::fs::read_dir(links).expect("read").flatten();
    let names: Vec<_> = names.map(|entry| entry.file_name()).collect();
    let uplinks = names
        .iter()
        .filter(|name| name.to_string_lossy().contains("uplink"));
    assert_eq!(uplinks.count(), 0, "{names:?}");
    // It arrives as it is, and can't be answered.
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("set");
    seen(&socket).expect_err("nobody knows the way");
    assert!(socket.as_raw_fd() >= 0);
}

#[test]
fn what_contradicts_itself_is_refused() {
    let mut scene = Scene::new(HookChoice::Auto);
    let wrong = [
        (
            vec![SourceNat {
                network: 0,
                ..nat()
            }],
            "in no network",
        ),
        (vec![nat(), nat()], "twice"),
        (
            vec![
                nat(),
                SourceNat {
                    network: 10,
                    ports: 1024..=2047,
                    ..nat()
                },
            ],
            "other ports",
        ),
        (
            vec![SourceNat {
                ports: 0..=10,
                ..nat()
            }],
            "no ports",
        ),
        (
            vec![SourceNat {
                max_mappings: 1,
                ..nat()
            }],
            "limit",
        ),
        (
            vec![SourceNat {
                ipv4: Some("127.0.0.1".parse().expect("valid")),
                ..nat()
            }],
            "one host's",
        ),
        (
            vec![SourceNat {
                uplink: "lo".into(),
                ..nat()
            }],
            "no Ethernet device",
        ),
    ];
    for (networks, expected) in wrong {
        let error = scene.datapath.set_nat(&networks, &[]).expect_err("wrong");
        assert!(error.to_string().contains(expected), "{error}");
    }
    talk_all(&mut connections(&scene));
}
