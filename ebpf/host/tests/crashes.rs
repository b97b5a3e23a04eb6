//! An agent that is killed between any two of its steps leaves the old or the new state in force, nothing in
//! between, and the next one makes it what it should be.
//!
//! The agent is another process, this test's own program. `strace` kills it as it enters its n-th system call of a
//! kind, for every n: all that an agent changes in the kernel, it changes by system calls.

mod network;
mod older;

use std::fs;
use std::net::UdpSocket;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use keelson_ebpf::{Datapath, DatapathConfig, HookChoice, InterfacePolicy, PortForward, Protocol};
use keelson_ebpf_common::LAYOUT_VERSION;
use network::frames;
use network::machine::Machine;
use network::uplink::{EXTERNAL, UPLINK, hide, nat};
use network::{Guest, HOST_IP, Network, allow, host_socket};

with_both_hooks!(a_change_of_rules);

/// Kinds of system calls that change something: of BPF, netlink, and files.
const CALLS: [&str; 4] = ["bpf", "sendto", "unlink", "unlinkat"];
/// What the child does before its work begins, so that the trace shows where that is.
const MARK: &str = "keelson-mark";
/// Steps that are tried, spread over all of them; all where `KEELSON_ALL_STEPS` is set, which takes minutes.
const STEPS: usize = 6;
const SIGKILL: i32 = 9;

/// What the child is told, by its environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Attach,
    Detach,
    Open,
    Forward,
}

impl Work {
    const fn name(self) -> &'static str {
        match self {
            Self::Attach => "attach",
            Self::Detach => "detach",
            Self::Open => "open",
            Self::Forward => "forward",
        }
    }
}

/// The child; without being told what to do, as when all tests are run, it does nothing.
#[test]
#[ignore = "a part of the other tests, which start it"]
fn child() {
    let (Ok(work), Ok(pin_root)) = (std::env::var("WORK"), std::env::var("PIN_ROOT")) else {
        return;
    };
    let hook = match std::env::var("HOOK").as_deref() {
        Ok("tcx") => HookChoice::Tcx,
        Ok("clsact") => HookChoice::Clsact,
        _ => HookChoice::Auto,
    };
    let config = DatapathConfig {
        pin_root: pin_root.into(),
        hook,
        max_flows: 4096,
    };
    if work == Work::Open.name() {
        let _ = fs::remove_file(MARK);
    }
    let mut datapath = Datapath::open(&config).expect("opened");
    if work != Work::Open.name() {
        let _ = fs::remove_file(MARK);
    }
    // The device, which belongs to the parent.
    let policy = policy_of("tap1", [0x52, 0x54, 0, 0, 0, 1], 7001);
    match work.as_str() {
        "attach" => drop(datapath.attach(&policy).expect("attached")),
        "detach" => drop(datapath.detach("tap1").expect("detached")),
        "forward" => drop(datapath.set_nat(&[nat()], &[forward(8001)]).expect("valid")),
        _ => {}
    }
}

/// A forward of a port of the uplink to the guest.
fn forward(port: u16) -> PortForward {
    PortForward {
        uplink: UPLINK.into(),
        address: EXTERNAL[0].parse().expect("valid"),
        protocol: Protocol::Udp,
        port,
        interface: "tap1".into(),
        guest_port: 6000,
    }
}

fn policy_of(name: &str, mac: [u8; 6], port: u16) -> InterfacePolicy {
    InterfacePolicy {
        name: name.into(),
        mac: keelson_ebpf::MacAddress(mac),
        ipv4: Some([10, 77, 0, 101].into()),
        ingress: vec![
            allow(Protocol::Udp, 6000..=6000),
            allow(Protocol::Udp, port..=port),
        ],
        ..InterfacePolicy::default()
    }
}

struct Scene {
    network: Network,
    guest: Guest,
    hook: HookChoice,
}

impl Scene {
    fn new(hook: HookChoice) -> Self {
        let network = Network::new(hook);
        let guest = network.guest(1);
        Self {
            network,
            guest,
            hook,
        }
    }

    fn policy(&self, port: u16) -> InterfacePolicy {
        policy_of(&self.guest.name, self.guest.mac.0, port)
    }

    /// Runs the child under `strace`; whether it was killed, and its trace.
    fn run(&self, work: Work, kill: Option<(&str, usize)>) -> (bool, String) {
        let trace = std::env::temp_dir().join(format!(
            "keelson-crashes-{}-{}",
            std::process::id(),
            rustix::thread::gettid().as_raw_nonzero()
        ));
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o"]).arg(&trace);
        command.arg("-e").arg(format!("trace={}", CALLS.join(",")));
        if let Some((call, number)) = kill {
            let inject = format!("inject={call}:signal=KILL:when={number}");
            command.arg("-e").arg(inject);
        }
        let this = std::env::current_exe().expect("this program");
        let hook = match self.hook {
            HookChoice::Tcx => "tcx",
            HookChoice::Clsact => "clsact",
            HookChoice::Auto => "auto",
        };
        let status = command
            .arg(this)
            .args(["child", "--exact", "--ignored", "--test-threads=1"])
            .env("WORK", work.name())
            .env("PIN_ROOT", &self.network.config.pin_root)
            .env("HOOK", hook)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("strace is installed");
        let text = fs::read_to_string(&trace).unwrap_or_default();
        let _ = fs::remove_file(&trace);
        let killed = status.signal() == Some(SIGKILL) || status.code() == Some(128 + SIGKILL);
        assert!(killed || status.success(), "{status}: {text}");
        (killed, text)
    }

    /// The steps at which to kill the child, of those that come after its mark.
    fn steps(&self, work: Work) -> Vec<(&'static str, usize)> {
        let (killed, trace) = self.run(work, None);
        assert!(!killed);
        let mut steps = Vec::new();
        let mut counts = CALLS.map(|call| (call, 0));
        let mut marked = false;
        for line in trace.lines() {
            marked |= line.contains(MARK);
            for (call, count) in &mut counts {
                if line.contains(&format!(" {call}(")) {
                    *count += 1;
                    if marked && !line.contains(MARK) {
                        steps.push((*call, *count));
                    }
                }
            }
        }
        assert!(steps.len() > 5, "{trace}");
        println!("{} steps", steps.len());
        if std::env::var_os("KEELSON_ALL_STEPS").is_none() {
            let last = steps.len() - 1;
            let spread = (0..STEPS).map(|index| index * last / (STEPS - 1));
            let mut spread: Vec<_> = spread.map(|index| steps[index]).collect();
            spread.dedup();
            return spread;
        }
        steps
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

/// A guest's port gets another external one: cut short it has the old one, the new one or, for as long as no
/// agent comes, none, but never both.
#[test]
fn a_change_of_forwards() {
    let scene = Scene::new(HookChoice::Auto);
    let outside = Machine::outside(9);
    hide(&outside);
    scene.guest.up();
    let mut datapath = scene.converge(7001);
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
