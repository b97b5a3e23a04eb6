//! Guests that call forwarded ports of their own host: real network stacks reach each other by the uplink's address, with
//! large segments and fragments, and hear from that address only.

mod network;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};

use keelson_ebpf::{DropReason, HookChoice, InterfacePolicy, Protocol, Rule};
use network::machine::{BRIDGE, Machine, connect, datagrams, exchange, talk};
use network::uplink::{
    EXTERNAL, INSIDE, MIRROR, PORTS, Scene, forwards, mirror, nat, policy, seen, socket,
};
use network::{PATIENCE, allow_from};

with_both_hooks!(
    guests_reach_each_other_by_the_uplink,
    it_goes_on_without_an_agent
);

const FORWARDED: u16 = 8000;
/// More than any window, so that large segments come about.
const MUCH: usize = 4 << 20;

/// The second guest has a forwarded port.
fn scene(hook: HookChoice) -> Scene {
    let mut scene = Scene::new(hook);
    let wanted = forwards(&scene.guests[1], FORWARDED, INSIDE);
    scene.datapath.set_nat(&[nat()], &wanted).expect("valid");
    let bridges = [(BRIDGE.to_owned(), 9)];
    scene.datapath.set_gateways(&bridges).expect("attached");
    scene
}

fn external(port: u16) -> [SocketAddr; 2] {
    EXTERNAL.map(|address| SocketAddr::new(address.parse().expect("valid"), port))
}

/// Connections, large transfers, datagrams and fragments, by both versions of IP.
fn use_forward(guest: &Machine) {
    for to in external(FORWARDED) {
        guest.run(move || {
            let (mut stream, number) = connect(to);
            assert_eq!(number, 2);
            assert_eq!(stream.peer_addr().expect("connected"), to);
            talk(&mut stream, MUCH).expect("it answers");
            let datagrams = datagrams(to);
            for length in [100, 5000, 1] {
                assert_eq!(exchange(&datagrams, length).expect("it answers"), 2);
            }
        });
    }
}

fn guests_reach_each_other_by_the_uplink(hook: HookChoice) {
    let scene = scene(hook);
    // Another guest's, and its own.
    for guest in &scene.guests {
        use_forward(guest);
    }
    for guest in ["tap1", "tap2"] {
        let counters = scene.datapath.counters(guest).expect("attached");
        assert!(counters.from_guest.dropped.is_empty(), "{counters:?}");
    }
    for used in scene.datapath.external_use().expect("read") {
        assert!(used.to_uplink.bytes > 2 * MUCH as u64, "{used:?}");
        assert!(used.from_uplink.bytes > 2 * MUCH as u64, "{used:?}");
    }
}

fn it_goes_on_without_an_agent(hook: HookChoice) {
    let Scene {
        datapath,
        guests,
        network,
        ..
    } = scene(hook);
    let mut streams: Vec<TcpStream> = guests[0]
        .run(|| external(FORWARDED).map(|to| connect(to).0))
        .into();
    drop(datapath);
    use_forward(&guests[0]);
    let datapath = network.open();
    for stream in &mut streams {
        talk(stream, 10_000).expect("the connection goes on");
    }
    use_forward(&guests[0]);
    drop(datapath);
}

/// Whoever is called sees the uplink's address and the port that the caller has there, the same as from outside.
#[test]
fn the_caller_is_seen_as_from_outside() {
    let mut scene = scene(HookChoice::Auto);
    let mirrored = INSIDE + 1;
    let wanted = forwards(&scene.guests[1], FORWARDED, mirrored);
    scene.datapath.set_nat(&[nat()], &wanted).expect("valid");
    scene
        .datapath
        .attach(&open_policy(&scene.guests[1]))
        .expect("attached");
    mirror(
        &scene.guests[1],
        SocketAddr::new([0_u16; 8].into(), mirrored),
    );
    for (to, outside) in external(FORWARDED)
        .into_iter()
        .zip(scene.outside_at(MIRROR))
    {
        let [inside, outside] = scene.guests[0].run(move || {
            let inside = seen(&socket(4000, to)).expect("it answers");
            let outside = seen(&socket(4000, outside)).expect("it answers");
            [inside, outside]
        });
        assert_eq!(inside, outside);
        assert_eq!(inside.ip(), to.ip());
        assert!(PORTS.contains(&inside.port()), "{inside}");
    }
}

/// Lets everything in.
fn open_policy(guest: &Machine) -> InterfacePolicy {
    let ingress =
        ["0.0.0.0/0", "::/0"].map(|peer| allow_from(Protocol::Any, Rule::ALL_PORTS, peer));
    InterfacePolicy {
        ingress: ingress.to_vec(),
        ..guest.policy()
    }
}

/// How a call by UDP and one by TCP end that nobody takes.
fn refused(to: SocketAddr) -> [io::ErrorKind; 2] {
    let socket = datagrams(to);
    socket.send(b"anyone?").expect("sent");
    let by_udp = socket.recv(&mut [0; 16]).expect_err("nobody answers");
    let by_tcp = TcpStream::connect_timeout(&to, PATIENCE).expect_err("nobody listens");
    [by_udp.kind(), by_tcp.kind()]
}

/// Nobody listens where the forward leads to: whoever calls is told so, in the uplink's name.
#[test]
fn errors_find_their_way_back() {
    let mut scene = scene(HookChoice::Auto);
    let wanted = forwards(&scene.guests[1], FORWARDED, INSIDE + 1);
    scene.datapath.set_nat(&[nat()], &wanted).expect("valid");
    let policies = [0, 1].map(|index: usize| open_policy(&scene.guests[index]));
    for policy in policies {
        scene.datapath.attach(&policy).expect("attached");
    }
    for to in external(FORWARDED) {
        let said = scene.guests[0].run(move || refused(to));
        assert_eq!(said, [io::ErrorKind::ConnectionRefused; 2], "{to}");
    }
}

#[test]
fn what_no_guest_has_is_the_hosts() {
    let scene = scene(HookChoice::Auto);
    for to in external(9999) {
        let listener = TcpListener::bind(to).expect("bound");
        let taken = std::thread::spawn(move || listener.accept().expect("a connection").1);
        let own = scene.guests[0].run(move || {
            let stream = TcpStream::connect_timeout(&to, PATIENCE).expect("the host listens");
            stream.local_addr().expect("connected")
        });
        assert_eq!(taken.join().expect("no panic"), own, "{to}");
    }
}

#[test]
fn the_guests_rules_decide() {
    let mut scene = scene(HookChoice::Auto);
    let closed = InterfacePolicy {
        ingress: Vec::new(),
        ..policy(&scene.guests[1])
    };
    scene.datapath.attach(&closed).expect("attached");
    for to in external(FORWARDED) {
        scene.guests[0].run(move || {
            let short = std::time::Duration::from_millis(300);
            TcpStream::connect_timeout(&to, short).expect_err("it may not");
        });
    }
    let counters = scene.datapath.counters("tap2").expect("attached").to_guest;
    assert!(counters.dropped_for(DropReason::NotAllowed).packets >= 2);
}

/// Guests that are kept apart do not reach each other this way either; to them the address is the host's.
#[test]
fn isolated_guests_stay_apart() {
    let mut scene = scene(HookChoice::Auto);
    let policies = [0, 1].map(|index: usize| InterfacePolicy {
        isolated: true,
        ..open_policy(&scene.guests[index])
    });
    for policy in policies {
        scene.datapath.attach(&policy).expect("attached");
    }
    for to in external(FORWARDED) {
        let said = scene.guests[0].run(move || refused(to));
        assert_eq!(said, [io::ErrorKind::ConnectionRefused; 2], "{to}");
        let number = scene.guests[1].run(move || connect(to).1);
        assert_eq!(number, 2, "its own is not another's");
    }
}
