//! An agent that is killed between any two of its steps leaves the old or the new state in force, nothing in
//! between, and the next one makes it what it should be. What leads outside has tests of its own,
//! `crashes_outside.rs`.

mod crash;
mod network;
mod older;

use std::fs;
use std::net::UdpSocket;
use std::time::Duration;

use crash::{Work, policy_of};
use keelson_ebpf::{Datapath, HookChoice, InterfacePolicy};
use keelson_ebpf_common::LAYOUT_VERSION;
use network::frames;
use network::{Guest, HOST_IP, Network, host_socket};

with_both_hooks!(a_change_of_rules);

#[test]
#[ignore = "a part of the other tests, which start it"]
fn child() {
    crash::child();
}

struct Scene {
    network: Network,
    guest: Guest,
}

impl Scene {
    fn new(hook: HookChoice) -> Self {
        let network = Network::new(hook);
        let guest = network.guest(1);
        Self { network, guest }
    }

    fn policy(&self, port: u16) -> InterfacePolicy {
        policy_of(&self.guest.name, self.guest.mac.0, port)
    }

    fn run(&self, work: Work, kill: Option<(&str, usize)>) -> (bool, String) {
        crash::run(&self.network.config, work, kill)
    }

    fn steps(&self, work: Work) -> Vec<(&'static str, usize)> {
        crash::steps(&self.network.config, work)
    }

    /// Which UDP ports the guest is reached on, of the one that it always is, two that it may be, and one that it
    /// never is. Nobody runs meanwhile.
    fn reached(&self) -> Vec<u16> {
        while self.guest.receive_now().is_some() {}
        let socket = UdpSocket::bind((HOST_IP, 0)).expect("bound");
        for port in [9, 7000, 7001, 6000] {
            socket.send_to(b"?", (self.guest.ip, port)).expect("sent");
        }
        let mut reached = Vec::new();
        while let Some(frame) = self.guest.receive_now() {
            reached.push(frames::seen(&frame).destination_port);
        }
        reached
    }

    /// A new agent, which makes the guest be reached on this port, and leaves nothing else.
    fn converge(&self, port: u16) -> Datapath {
        let mut datapath = self.network.open();
        datapath.attach(&self.policy(port)).expect("attached");
        assert_eq!(datapath.attached().expect("read").len(), 1);
        assert_eq!(self.reached(), [port, 6000]);
        assert_eq!(older::layout(&self.network.config), LAYOUT_VERSION);
        datapath
    }

    /// A new agent, which attaches nothing, and leaves nothing.
    fn converge_detached(&self) -> Datapath {
        let mut datapath = self.network.open();
        datapath.detach(&self.guest.name).expect("detached");
        assert!(datapath.attached().expect("read").is_empty());
        let links = self.network.config.pin_root.join("links");
        assert_eq!(fs::read_dir(links).expect("read").count(), 0);
        datapath
    }
}

fn a_change_of_rules(hook: HookChoice) {
    let scene = Scene::new(hook);
    let mut datapath = scene.network.open();
    datapath.attach(&scene.policy(7000)).expect("attached");
    scene.guest.up();
    drop(datapath);
    let steps = scene.steps(Work::Attach);
    let mut seen = [0, 0];
    for (call, number) in steps {
        let mut datapath = scene.converge(7001);
        datapath.attach(&scene.policy(7000)).expect("as before");
        drop(datapath);
        let (killed, trace) = scene.run(Work::Attach, Some((call, number)));
        let reached = scene.reached();
        let is_old = reached == [7000, 6000];
        let is_new = reached == [7001, 6000];
        assert!(is_old || is_new, "{call} {number}: {reached:?}\n{trace}");
        assert!(killed || is_new, "{call} {number}");
        seen[usize::from(is_new)] += 1;
    }
    drop(scene.converge(7001));
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

/// The device is down until an attach is done, so that what matters is what the next agent makes of it.
#[test]
fn a_first_attach() {
    let scene = Scene::new(HookChoice::Auto);
    for (call, number) in scene.steps(Work::Attach) {
        drop(scene.converge_detached());
        scene.run(Work::Attach, Some((call, number)));
        let mut datapath = scene.network.open();
        datapath.attach(&scene.policy(7001)).expect("attached");
        scene.guest.up();
        assert_eq!(scene.reached(), [7001, 6000], "{call} {number}");
        drop(datapath);
        network::ip(&format!("address flush dev {}", scene.guest.name));
        network::ip(&format!("link set {} down", scene.guest.name));
    }
}

#[test]
fn a_detach() {
    let scene = Scene::new(HookChoice::Auto);
    scene.guest.up();
    drop(scene.converge(7001));
    for (call, number) in scene.steps(Work::Detach) {
        drop(scene.converge(7001));
        scene.run(Work::Detach, Some((call, number)));
        drop(scene.converge_detached());
    }
}

#[test]
fn an_upgrade() {
    let scene = Scene::new(HookChoice::Auto);
    scene.guest.up();
    drop(scene.converge(7000));
    let socket = host_socket(9000);
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("set");
    let flow = frames::Ends {
        source_mac: scene.guest.mac,
        destination_mac: network::HOST_MAC,
        source: scene.guest.ip,
        destination: HOST_IP,
    };
    scene.guest.send(&frames::udp(flow, 4000, 9000, b"hello"));
    let mut buffer = [0; 64];
    socket.recv(&mut buffer).expect("it arrives");
    older::make_older(&scene.network.config);
    for (call, number) in scene.steps(Work::Open) {
        drop(scene.network.open());
        older::make_older(&scene.network.config);
        let (_, trace) = scene.run(Work::Open, Some((call, number)));
        assert_eq!(scene.reached(), [7000, 6000], "{call} {number}\n{trace}");
        socket
            .send_to(b"flow", (scene.guest.ip, 4000))
            .expect("sent");
        assert_eq!(frames::seen(&scene.guest.receive()).data, b"flow");
    }
    drop(scene.converge(7000));
}
