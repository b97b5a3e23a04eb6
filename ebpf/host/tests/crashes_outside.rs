//! An agent that is killed between any two of its steps while it begins, changes or ends source NAT, forwards or the
//! tunnel to other hosts: what guests send leaves as it did before or as it should, and the next agent makes all of it
//! what it should be.

mod crash;
mod network;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use crash::{Work, forward, policy_of};
use keelson_ebpf::{Datapath, DatapathConfig, HookChoice};
use network::frames;
use network::hosts::{Hosts, Inside, Underlay, remote};
use network::machine::Machine;
use network::uplink::{EXTERNAL, PORTS, hide, nat};
use network::{Guest, HOST_MAC, Network};

/// How long what should not come is waited for.
const SHORT: Duration = Duration::from_millis(300);
/// Where the machine outside listens.
const OUTSIDE: u16 = 9000;

#[test]
#[ignore = "a part of the other tests, which start it"]
fn child() {
    crash::child();
}

/// A guest, whose policy is attached, and a machine outside.
struct Scene {
    network: Network,
    guest: Guest,
}

impl Scene {
    fn new() -> (Self, Machine) {
        let network = Network::new(HookChoice::Auto);
        let guest = network.guest(1);
        let outside = Machine::outside(9);
        hide(&outside);
        guest.up();
        let mut datapath = network.open();
        let policy = policy_of(&guest.name, guest.mac.0, 7001);
        datapath.attach(&policy).expect("attached");
        drop(datapath);
        (Self { network, guest }, outside)
    }

    fn run(&self, work: Work, kill: Option<(&str, usize)>) -> (bool, String) {
        crash::run(&self.network.config, work, kill)
    }

    fn steps(&self, work: Work) -> Vec<(&'static str, usize)> {
        crash::steps(&self.network.config, work)
    }

    /// Files of links that are pinned.
    fn links(&self) -> usize {
        links(&self.network.config)
    }

    /// The guest sends to the machine outside: whom that sees, if it gets it. What it answers comes back, if it
    /// was sent from the uplink's address.
    fn seen_outside(&self, outside: &Machine) -> Option<SocketAddr> {
        while self.guest.receive_now().is_some() {}
        let IpAddr::V4(to) = outside.ipv4 else {
            unreachable!("it is one of IPv4");
        };
        let socket = outside.run(|| {
            let socket = UdpSocket::bind(("0.0.0.0", OUTSIDE)).expect("bound");
            socket.set_read_timeout(Some(SHORT)).expect("set");
            socket
        });
        let ends = frames::Ends {
            source_mac: self.guest.mac,
            destination_mac: HOST_MAC,
            source: self.guest.ip,
            destination: to,
        };
        self.guest.send(&frames::udp(ends, 6001, OUTSIDE, b"hello"));
        let (_, from) = socket.recv_from(&mut [0; 16]).ok()?;
        if from.ip() != IpAddr::from(self.guest.ip) {
            socket.send_to(b"answer", from).expect("sent");
            let answer = frames::seen(&self.guest.receive());
            assert_eq!(
                (answer.destination_port, answer.data),
                (6001, b"answer".to_vec())
            );
        }
        Some(from)
    }
}

fn links(config: &DatapathConfig) -> usize {
    let links = fs::read_dir(config.pin_root.join("links"));
    links.expect("read").count()
}

/// Whether what the machine outside sees is the uplink's address with a port that guests get.
fn is_translated(seen: Option<SocketAddr>) -> bool {
    seen.is_some_and(|seen| seen.ip().to_string() == EXTERNAL[0] && PORTS.contains(&seen.port()))
}

/// By which external ports a machine outside reaches the guest. Nobody runs meanwhile.
fn reached_from_outside(scene: &Scene, outside: &Machine) -> Vec<u16> {
    while scene.guest.receive_now().is_some() {}
    outside.run(|| {
        for port in [8000, 8001] {
            // Whoever has another source port is another one.
            let socket = UdpSocket::bind(("0.0.0.0", port - 3000)).expect("bound");
            socket.send_to(b"?", (EXTERNAL[0], port)).expect("sent");
        }
    });
    let mut reached = Vec::new();
    while let Some(frame) = scene.guest.receive_now() {
        let seen = frames::seen(&frame);
        assert_eq!(seen.destination_port, 6000);
        reached.push(seen.source_port + 3000);
    }
    reached
}

/// What is left without an agent is the old state or the new one, for the guest's packets and for the forward, each
/// by itself: a forward may be there before source NAT.
fn check_between(scene: &Scene, outside: &Machine, step: &str) {
    let seen = scene.seen_outside(outside);
    let own = IpAddr::from(scene.guest.ip);
    let is_old = seen.is_none_or(|seen| seen.ip() == own);
    assert!(is_old || is_translated(seen), "{step}: {seen:?}");
    let reached = reached_from_outside(scene, outside);
    assert!(
        reached.is_empty() || reached == [8001],
        "{step}: {reached:?}"
    );
}

/// A new agent, which makes source NAT and a forward be there.
fn converge_nat(scene: &Scene, outside: &Machine, step: &str) -> Datapath {
    let mut datapath = scene.network.open();
    datapath.set_nat(&[nat()], &[forward(8001)]).expect("valid");
    let seen = scene.seen_outside(outside);
    assert!(is_translated(seen), "{step}: {seen:?}");
    assert_eq!(reached_from_outside(scene, outside), [8001], "{step}");
    datapath
}

/// A new agent, which has neither, and leaves nothing.
fn converge_without_nat(scene: &Scene, outside: &Machine, step: &str) -> Datapath {
    let mut datapath = scene.network.open();
    datapath.set_nat(&[], &[]).expect("valid");
    assert!(!is_translated(scene.seen_outside(outside)), "{step}");
    assert_eq!(reached_from_outside(scene, outside), [0_u16; 0], "{step}");
    assert!(datapath.external_use().expect("read").is_empty(), "{step}");
    datapath
}

#[test]
fn a_beginning_of_nat() {
    let (scene, outside) = Scene::new();
    let links = scene.links();
    for (call, number) in scene.steps(Work::Forward) {
        let step = format!("{call} {number}");
        drop(converge_without_nat(&scene, &outside, &step));
        assert_eq!(scene.links(), links, "{step}");
        let (killed, trace) = scene.run(Work::Forward, Some((call, number)));
        check_between(&scene, &outside, &format!("{step} {trace}"));
        let is_new = || reached_from_outside(&scene, &outside) == [8001];
        assert!(killed || is_new(), "{step}");
        drop(converge_nat(&scene, &outside, &step));
    }
    drop(converge_without_nat(&scene, &outside, "at last"));
    assert_eq!(scene.links(), links);
}

#[test]
fn an_end_of_nat() {
    let (scene, outside) = Scene::new();
    let links = scene.links();
    drop(converge_nat(&scene, &outside, "at first"));
    for (call, number) in scene.steps(Work::EndNat) {
        let step = format!("{call} {number}");
        drop(converge_nat(&scene, &outside, &step));
        let (_, trace) = scene.run(Work::EndNat, Some((call, number)));
        check_between(&scene, &outside, &format!("{step} {trace}"));
        drop(converge_without_nat(&scene, &outside, &step));
        assert_eq!(scene.links(), links, "{step}");
    }
}

/// A guest's port gets another external one: cut short it has the old one, the new one or, for as long as no
/// agent comes, none, but never both.
#[test]
fn a_change_of_forwards() {
    let (scene, outside) = Scene::new();
    let mut datapath = scene.network.open();
    datapath.set_nat(&[nat()], &[forward(8000)]).expect("valid");
    assert_eq!(reached_from_outside(&scene, &outside), [8000]);
    drop(datapath);
    for (call, number) in scene.steps(Work::Forward) {
        let mut datapath = scene.network.open();
        datapath.set_nat(&[nat()], &[forward(8000)]).expect("valid");
        assert_eq!(reached_from_outside(&scene, &outside), [8000]);
        drop(datapath);
        let (killed, trace) = scene.run(Work::Forward, Some((call, number)));
        let reached = reached_from_outside(&scene, &outside);
        assert!(reached.len() <= 1, "{call} {number}: {reached:?}\n{trace}");
        assert!(killed || reached == [8001], "{call} {number}");
        let mut datapath = scene.network.open();
        datapath.set_nat(&[nat()], &[forward(8001)]).expect("valid");
        assert_eq!(
            reached_from_outside(&scene, &outside),
            [8001],
            "{call} {number}"
        );
        datapath.set_nat(&[], &[]).expect("valid");
        assert!(reached_from_outside(&scene, &outside).is_empty());
        assert!(datapath.external_use().expect("read").is_empty());
    }
}

/// Whether a guest here hears from one on the other host.
fn reaches(hosts: &Hosts) -> bool {
    let to = SocketAddr::new(hosts.there.ipv4, 7000);
    let heard = hosts.here.run(move || -> io::Result<bool> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(SHORT))?;
        socket.connect(to)?;
        let mut buffer = [0; 16];
        // The first byte is the number of the one that answers.
        for _ in 0..3 {
            socket.send(b"?")?;
            if let Ok(length) = socket.recv(&mut buffer) {
                return Ok(buffer[..length] == *b"\x02?");
            }
        }
        Ok(false)
    });
    heard.unwrap_or(false)
}

/// Has the next agent of the first host begin or end the tunnel, and go.
fn settle(hosts: &Hosts, is_wanted: bool) -> (usize, bool) {
    let (name, there) = (
        hosts.there.name.clone(),
        remote(&hosts.there, hosts.other.address),
    );
    hosts.one.run(move |Inside { datapath, network }| {
        let config = network.config.clone();
        drop(datapath.take());
        let mut agent = network.open();
        let known = if is_wanted {
            crash::begin_tunnel(&mut agent);
            BTreeMap::from([(name, vec![there])])
        } else {
            crash::end_tunnel(&mut agent);
            BTreeMap::new()
        };
        agent.set_all_remote(known).expect("written");
        let has_tunnel = agent.tunnel_counters().expect("read").is_some();
        drop(agent);
        (links(&config), has_tunnel)
    })
}

fn tunnel_is_cut_short(work: Work) {
    let hosts = Hosts::new(HookChoice::Auto, Underlay::Ipv4);
    hosts.there.serve(7000);
    assert!(reaches(&hosts));
    let begins = work == Work::Tunnel;
    let (without, _) = settle(&hosts, false);
    settle(&hosts, !begins);
    let steps = hosts
        .one
        .run(move |inside| crash::steps(&inside.network.config, work));
    for (call, number) in steps {
        let (_, has_tunnel) = settle(&hosts, !begins);
        assert_eq!(
            (has_tunnel, reaches(&hosts)),
            (!begins, !begins),
            "{call} {number}"
        );
        let (killed, trace) = hosts
            .one
            .run(move |inside| crash::run(&inside.network.config, work, Some((call, number))));
        // Nobody told the agent that began the tunnel of guests there.
        let is_reached = reaches(&hosts);
        assert!(killed || !is_reached, "{call} {number}: {trace}");
        let (links, has_tunnel) = settle(&hosts, begins);
        assert_eq!(
            (has_tunnel, reaches(&hosts)),
            (begins, begins),
            "{call} {number}"
        );
        assert_eq!(links == without, !begins, "{call} {number}");
    }
}

#[test]
fn a_beginning_of_the_tunnel() {
    tunnel_is_cut_short(Work::Tunnel);
}

#[test]
fn an_end_of_the_tunnel() {
    tunnel_is_cut_short(Work::EndTunnel);
}
