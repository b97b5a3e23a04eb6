//! Kills an agent as it enters one of its system calls.
//!
//! The agent is another process, this test's own program. `strace` kills it as it enters its n-th system call of a
//! kind, for every n: all that an agent changes in the kernel, it changes by system calls.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use keelson_ebpf::{
    Datapath, DatapathConfig, HookChoice, InterfacePolicy, PortForward, Protocol, Tunnel,
};

use crate::network::allow;
use crate::network::hosts::{NETWORK, PORT, VNI};
use crate::network::uplink::{EXTERNAL, UPLINK, nat};

/// Kinds of system calls that change something: of BPF, netlink, and files.
const CALLS: [&str; 4] = ["bpf", "sendto", "unlink", "unlinkat"];
/// What the child does before its work begins, so that the trace shows where that is.
const MARK: &str = "keelson-mark";
/// Steps that are tried, spread over all of them; all where `KEELSON_ALL_STEPS` is set, which takes minutes.
const STEPS: usize = 6;
const SIGKILL: i32 = 9;

/// What the child is told, by its environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Attach,
    Detach,
    Open,
    Forward,
    EndNat,
    Tunnel,
    EndTunnel,
}

impl Work {
    const ALL: [Self; 7] = [
        Self::Attach,
        Self::Detach,
        Self::Open,
        Self::Forward,
        Self::EndNat,
        Self::Tunnel,
        Self::EndTunnel,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Attach => "attach",
            Self::Detach => "detach",
            Self::Open => "open",
            Self::Forward => "forward",
            Self::EndNat => "end-nat",
            Self::Tunnel => "tunnel",
            Self::EndTunnel => "end-tunnel",
        }
    }
}

/// The child; without being told what to do, as when all tests are run, it does nothing.
pub fn child() {
    let (Ok(name), Ok(pin_root)) = (std::env::var("WORK"), std::env::var("PIN_ROOT")) else {
        return;
    };
    let work = Work::ALL.into_iter().find(|work| work.name() == name);
    let work = work.expect("it is told what to do");
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
    if work == Work::Open {
        let _ = fs::remove_file(MARK);
    }
    let mut datapath = Datapath::open(&config).expect("opened");
    if work != Work::Open {
        let _ = fs::remove_file(MARK);
    }
    // The device, which belongs to the parent.
    let policy = policy_of("tap1", [0x52, 0x54, 0, 0, 0, 1], 7001);
    match work {
        Work::Attach => drop(datapath.attach(&policy).expect("attached")),
        Work::Detach => drop(datapath.detach("tap1").expect("detached")),
        Work::Forward => drop(datapath.set_nat(&[nat()], &[forward(8001)]).expect("valid")),
        Work::EndNat => drop(datapath.set_nat(&[], &[]).expect("valid")),
        Work::Tunnel => begin_tunnel(&mut datapath),
        Work::EndTunnel => end_tunnel(&mut datapath),
        Work::Open => {}
    }
}

/// Makes the host with the address 10.50.0.1 an end of the tunnel.
pub fn begin_tunnel(datapath: &mut Datapath) {
    let tunnel = Tunnel {
        device: "vx0".into(),
        address: [10, 50, 0, 1].into(),
        port: PORT,
    };
    datapath.set_tunnel(Some(&tunnel)).expect("attached");
    let overlays = BTreeMap::from([(VNI, NETWORK)]);
    datapath.set_overlays(&overlays).expect("written");
}

pub fn end_tunnel(datapath: &mut Datapath) {
    datapath.set_overlays(&BTreeMap::new()).expect("written");
    datapath.set_tunnel(None).expect("detached");
}

/// A forward of a port of the uplink to the guest.
pub fn forward(port: u16) -> PortForward {
    PortForward {
        uplink: UPLINK.into(),
        address: EXTERNAL[0].parse().expect("valid"),
        protocol: Protocol::Udp,
        port,
        interface: "tap1".into(),
        guest_port: 6000,
    }
}

pub fn policy_of(name: &str, mac: [u8; 6], port: u16) -> InterfacePolicy {
    InterfacePolicy {
        name: name.into(),
        mac: keelson_ebpf::MacAddress(mac),
        ipv4: Some([10, 77, 0, 101].into()),
        network: NETWORK,
        ingress: vec![
            allow(Protocol::Udp, 6000..=6000),
            allow(Protocol::Udp, port..=port),
        ],
        ..InterfacePolicy::default()
    }
}

/// Runs the child under `strace`; whether it was killed, and its trace.
pub fn run(config: &DatapathConfig, work: Work, kill: Option<(&str, usize)>) -> (bool, String) {
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
    let hook = match config.hook {
        HookChoice::Tcx => "tcx",
        HookChoice::Clsact => "clsact",
        HookChoice::Auto => "auto",
    };
    let status = command
        .arg(this)
        .args(["child", "--exact", "--ignored", "--test-threads=1"])
        .env("WORK", work.name())
        .env("PIN_ROOT", &config.pin_root)
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
pub fn steps(config: &DatapathConfig, work: Work) -> Vec<(&'static str, usize)> {
    let (killed, trace) = run(config, work, None);
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
