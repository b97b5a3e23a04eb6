//! Forwarded ports under real traffic: a machine outside, which knows only the uplink, reaches guests through
//! them, by TCP and UDP, over IPv4 and IPv6, while forwards and guests change.

mod network;

use std::net::{SocketAddr, TcpStream};

use keelson_ebpf::HookChoice;
use network::machine::{Machine, connect, datagrams, exchange, talk};
use network::uplink::{EXTERNAL, INSIDE, SERVED, Scene, forwards, nat, policy};

with_both_hooks!(
    a_forward_leads_to_its_guest,
    a_guest_that_comes_back_has_its_forwards
);

/// More than any window, so that large segments come about.
const MUCH: usize = 4 << 20;
/// The external port.
const PORT: u16 = 8000;

/// Where the forwards are, by version of IP.
fn forwarded(port: u16) -> [SocketAddr; 2] {
    EXTERNAL.map(|address| SocketAddr::new(address.parse().expect("valid"), port))
}

/// Whom the machine outside reaches by a port of each external address, by TCP and UDP.
fn reached(outside: &Machine, port: u16) -> Vec<u8> {
    outside.run(move || {
        let mut reached = Vec::new();
        for to in forwarded(port) {
            let (mut stream, number) = connect(to);
            talk(&mut stream, MUCH).expect("it answers");
            reached.push(number);
            // Fragments as well.
            reached.push(exchange(&datagrams(to), 5000).expect("it answers"));
        }
        reached
    })
}

fn refused(outside: &Machine, port: u16) -> bool {
    outside.run(move || {
        let mut addresses = forwarded(port).into_iter();
        addresses.all(|to| TcpStream::connect(to).is_err())
    })
}

fn a_forward_leads_to_its_guest(hook: HookChoice) {
    let Scene {
        mut datapath,
        guests,
        outside,
        network: _network,
    } = Scene::new(hook);
    assert!(refused(&outside, PORT), "nothing is forwarded yet");
    let to_first = forwards(&guests[0], PORT, INSIDE);
    datapath.set_nat(&[nat()], &to_first).expect("valid");
    assert_eq!(reached(&outside, PORT), [1; 4]);

    let mut held: Vec<TcpStream> = outside.run(|| forwarded(PORT).map(|to| connect(to).0).into());
    // One that another guest gets besides disturbs nobody.
    let mut both = to_first.clone();
    both.extend(forwards(&guests[1], PORT + 1, INSIDE));
    datapath.set_nat(&[nat()], &both).expect("valid");
    assert_eq!(reached(&outside, PORT + 1), [2; 4]);
    for stream in &mut held {
        talk(stream, 100_000).expect("it goes on");
    }

    // It changes hands.
    let to_second = forwards(&guests[1], PORT, INSIDE);
    datapath.set_nat(&[nat()], &to_second).expect("valid");
    assert_eq!(reached(&outside, PORT), [2; 4]);
    assert!(refused(&outside, PORT + 1), "it is another port now");

    // Without source NAT beside it.
    datapath.set_nat(&[], &to_second).expect("valid");
    assert_eq!(reached(&outside, PORT), [2; 4]);
    datapath.set_nat(&[], &[]).expect("valid");
    assert!(refused(&outside, PORT));
}

/// What is forwarded to an interface that isn't attached waits for it; attaching one leaves what others have
/// alone.
fn a_guest_that_comes_back_has_its_forwards(hook: HookChoice) {
    let mut scene = Scene::new(hook);
    let mut wanted = forwards(&scene.guests[0], PORT, INSIDE);
    wanted.extend(forwards(&scene.guests[1], PORT + 1, INSIDE));
    scene.datapath.set_nat(&[nat()], &wanted).expect("valid");
    let outside_at = scene.outside_at(SERVED);
    let out = move || outside_at.map(|to| connect(to).0);
    let mut streams: Vec<TcpStream> = scene.guests[0].run(out).into();
    streams.extend(
        scene
            .outside
            .run(|| forwarded(PORT).map(|to| connect(to).0)),
    );

    let name = scene.guests[1].name.clone();
    assert!(scene.datapath.detach(&name).expect("detached"));
    assert!(refused(&scene.outside, PORT + 1), "nobody is there");
    let again = policy(&scene.guests[1]);
    scene.datapath.attach(&again).expect("attached");
    assert_eq!(reached(&scene.outside, PORT + 1), [2; 4]);
    for stream in &mut streams {
        talk(stream, 100_000).expect("it goes on");
    }
    for mut stream in scene.guests[1].run(out) {
        talk(&mut stream, 100_000).expect("it is translated again");
    }

    // One that loses its IPv6 address loses that forward, and has it again with the address.
    let mut without = again.clone();
    without.ipv6 = None;
    scene.datapath.update(&without).expect("updated");
    let seen = scene.outside.run(|| {
        let [ipv4, ipv6] = forwarded(PORT + 1);
        (connect(ipv4).1, TcpStream::connect(ipv6).is_err())
    });
    assert_eq!(seen, (2, true));
    scene.datapath.update(&again).expect("updated");
    assert_eq!(reached(&scene.outside, PORT + 1), [2; 4]);
    for stream in &mut streams {
        talk(stream, 100_000).expect("it goes on");
    }
}
