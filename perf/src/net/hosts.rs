//! Two network namespaces that stand for guests, and a third between them that stands for the host.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use keelson_ebpf::{
    Datapath, DatapathConfig, Direction, InterfacePolicy, IpPrefix, MacAddress, Protocol, Service,
    ServiceBackend, count_run_costs,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::frames::{self, End};
use super::load::{self, Target};
use super::nftables;

/// The guest that opens flows.
pub const CLIENT: End = End {
    mac: [2, 0, 0, 0, 0, 1],
    address: Ipv4Addr::new(10, 99, 0, 1),
    port: 0,
};
/// The guest that the rules protect.
pub const SERVER: End = End {
    mac: [2, 0, 0, 0, 0, 2],
    address: Ipv4Addr::new(10, 99, 0, 2),
    port: 0,
};
/// The address of the service in front of it.
pub const SERVICE: End = End {
    mac: keelson_ebpf::SERVICE_MAC,
    address: Ipv4Addr::new(10, 99, 0, 80),
    port: 0,
};
/// The port of all load.
pub const PORT: u16 = 5000;
const NETWORK: u32 = 1;
/// Batches of runs of a program.
const PROGRAM_BATCHES: u32 = 50;

/// Who filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The eBPF network.
    Keelson,
    /// A bridge with nftables.
    Nftables,
    /// Nobody: a bridge.
    Bridge,
}

impl Peer {
    /// All, us first.
    pub const ALL: [Self; 3] = [Self::Keelson, Self::Nftables, Self::Bridge];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keelson => "keelson",
            Self::Nftables => "bridge and nftables",
            Self::Bridge => "bridge, no policy",
        }
    }
}

/// One thing that may reach the server.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// From where.
    pub peer: Ipv4Addr,
    /// By what.
    pub protocol: Protocol,
    /// To which port.
    pub port: u16,
}

/// The namespaces, with a policy in force. Dropping it removes them.
#[derive(Debug)]
pub struct Hosts {
    names: Names,
    datapath: Option<Datapath>,
}

/// Names of the namespaces; removes them at the end.
#[derive(Debug)]
struct Names {
    prefix: String,
}

impl Hosts {
    /// Makes the namespaces and the devices between them, and puts `rules` rules in force, of which
    /// two allow the load. None means that everything may reach the server.
    pub fn new(peer: Peer, rules: u32) -> anyhow::Result<Self> {
        let names = Names {
            prefix: format!("keelson-perf-{}", std::process::id()),
        };
        names.remove();
        names.make()?;
        let rules = rule_list(rules);
        let datapath = match peer {
            Peer::Bridge => None,
            Peer::Nftables => {
                names.within("host", || nftables::apply(&rules))?;
                None
            }
            Peer::Keelson => Some(names.within("host", || attach(&rules))?),
        };
        let hosts = Self { names, datapath };
        hosts.in_guest("client", || ping(SERVER.address))?;
        Ok(hosts)
    }

    /// Runs `work` on a thread of the namespace `client` or `server`.
    pub fn in_guest<T: Send>(
        &self,
        name: &str,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        self.names.within(name, work)
    }

    /// Packets that have left the host toward the server.
    pub fn delivered(&self) -> anyhow::Result<u64> {
        // The file system shows the devices of the namespace of whoever mounted it: ask the kernel.
        self.names.within("host", || {
            let output = Command::new("ip")
                .args(["-s", "-j", "link", "show", "hs"])
                .output()?;
            let links: serde_json::Value = serde_json::from_slice(&output.stdout)?;
            links
                .pointer("/0/stats64/tx/packets")
                .and_then(serde_json::Value::as_u64)
                .context("the packets of hs")
        })
    }

    /// What the kernel counts for the program of a direction, and those that go on with the packet, under
    /// the load of packets.
    pub fn counted_cost(
        &mut self,
        direction: Direction,
        target: Target,
        duration: Duration,
    ) -> anyhow::Result<f64> {
        let before = self.datapath()?.run_cost(direction)?;
        let counting = count_run_costs()?;
        load::packets(self, duration, target)?;
        drop(counting);
        let after = self.datapath()?.run_cost(direction)?;
        #[allow(clippy::cast_precision_loss)] // far below 2^52
        let counted_ns = after.time.saturating_sub(before.time).as_nanos() as f64
            / (after.runs - before.runs).max(1) as f64;
        Ok(counted_ns)
    }

    /// What the program of a direction takes for a packet of an established flow, by itself and
    /// under load.
    pub fn program_cost(
        &mut self,
        direction: Direction,
        runs: u32,
        duration: Duration,
    ) -> anyhow::Result<BTreeMap<&'static str, f64>> {
        let counted_ns = self.counted_cost(direction, Target::Server, duration)?;
        let (from, to) = load::flow(Target::Server, 0);
        let (device, frame) = match direction {
            Direction::FromGuest => ("hc", frames::udp(from, to)),
            Direction::ToGuest => ("hs", frames::udp(from, to)),
        };
        let names = Names {
            prefix: self.names.prefix.clone(),
        };
        let datapath = self.datapath()?;
        let times = names.within("host", || {
            let mut times = Vec::new();
            for _ in 0..PROGRAM_BATCHES {
                let runs = runs / PROGRAM_BATCHES;
                times.push(datapath.time_frame(device, direction, &frame, runs)?);
            }
            times.sort_unstable();
            Ok(times)
        });
        std::mem::forget(names);
        // The median of short batches: others on the machine interrupt only some of them.
        let times = times?;
        #[allow(clippy::cast_precision_loss)]
        let program_ns = times[times.len() / 2].as_nanos() as f64;
        Ok(BTreeMap::from([
            ("program_ns", program_ns),
            ("counted_ns", counted_ns),
        ]))
    }

    fn datapath(&mut self) -> anyhow::Result<&mut Datapath> {
        self.datapath.as_mut().context("no eBPF network is here")
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if let Some(mut datapath) = self.datapath.take() {
            let _ = self.names.within("host", move || {
                datapath.detach("hc")?;
                datapath.detach("hs")?;
                Ok(())
            });
            let _ = std::fs::remove_dir_all(pin_root());
        }
    }
}

fn pin_root() -> std::path::PathBuf {
    format!("/sys/fs/bpf/keelson-perf-{}", std::process::id()).into()
}

/// `count` rules, all different; the last ones are those that the load needs.
fn rule_list(count: u32) -> Vec<Rule> {
    let mut rules: Vec<Rule> = (0..count.saturating_sub(2))
        .map(|index| Rule {
            peer: Ipv4Addr::from_bits(0x0a64_0000 + index),
            protocol: if index % 2 == 0 {
                Protocol::Tcp
            } else {
                Protocol::Udp
            },
            port: u16::try_from(1024 + index % 16).unwrap_or(0),
        })
        .collect();
    if count > 0 {
        rules.extend([Protocol::Tcp, Protocol::Udp].map(|protocol| Rule {
            peer: CLIENT.address,
            protocol,
            port: PORT,
        }));
    }
    rules
}

fn attach(rules: &[Rule]) -> anyhow::Result<Datapath> {
    let mut datapath = Datapath::open(&DatapathConfig {
        pin_root: pin_root(),
        ..DatapathConfig::default()
    })?;
    let policy = |name: &str, end: End, ingress| InterfacePolicy {
        name: name.into(),
        mac: MacAddress(end.mac),
        ipv4: Some(end.address),
        network: NETWORK,
        ingress,
        ..InterfacePolicy::default()
    };
    let everything = keelson_ebpf::Rule {
        protocol: Protocol::Any,
        ports: keelson_ebpf::Rule::ALL_PORTS,
        peer: IpPrefix::ANY_IPV4,
        counter: 0,
    };
    let mut ingress: Vec<_> = rules
        .iter()
        .map(|rule| keelson_ebpf::Rule {
            protocol: rule.protocol,
            ports: rule.port..=rule.port,
            peer: IpPrefix::from(std::net::IpAddr::from(rule.peer)),
            counter: 0,
        })
        .collect();
    if ingress.is_empty() {
        ingress.push(everything.clone());
    }
    datapath.attach(&policy("hc", CLIENT, vec![everything]))?;
    datapath.attach(&policy("hs", SERVER, ingress))?;
    datapath.set_services(&[Service {
        network: NETWORK,
        address: SERVICE.address.into(),
        protocol: Protocol::Udp,
        port: PORT,
        backends: vec![ServiceBackend {
            address: SERVER.address.into(),
            port: PORT,
            mac: MacAddress(SERVER.mac),
        }],
    }])?;
    Ok(datapath)
}

/// Makes sure that the two see each other: a TCP connection is refused, not unanswered.
fn ping(address: Ipv4Addr) -> anyhow::Result<()> {
    let limit = Duration::from_secs(10);
    match std::net::TcpStream::connect_timeout(&(address, PORT).into(), limit) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error).context("the client does not reach the server"),
    }
}

impl Names {
    fn make(&self) -> anyhow::Result<()> {
        for name in ["host", "client", "server"] {
            ip(&format!("netns add {}-{name}", self.prefix))?;
        }
        self.within("host", || {
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
            std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")?;
            ip("link add br0 type bridge")?;
            ip("link set br0 up")?;
            for (inner, outer, guest, end) in [
                ("c0", "hc", "client", CLIENT),
                ("s0", "hs", "server", SERVER),
            ] {
                let mac = MacAddress(end.mac);
                ip(&format!(
                    "link add {outer} type veth peer name {inner} address {mac}"
                ))?;
                ip(&format!("link set {inner} netns {}-{guest}", self.prefix))?;
                ip(&format!("link set {outer} master br0 up"))?;
            }
            Ok(())
        })?;
        for (guest, device, end) in [("client", "c0", CLIENT), ("server", "s0", SERVER)] {
            self.within(guest, || {
                std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
                ip("link set lo up")?;
                ip(&format!("addr add {}/24 dev {device}", end.address))?;
                ip(&format!("link set {device} up"))
            })?;
        }
        Ok(())
    }

    fn within<T: Send>(
        &self,
        name: &str,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let path = format!("/run/netns/{}-{name}", self.prefix);
        let namespace = File::open(&path).with_context(|| format!("open {path}"))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&namespace),
                    Some(LinkNameSpaceType::Network),
                )
                .with_context(|| format!("enter {path}"))?;
                work()
            });
            thread
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread in {path} panicked")))
        })
    }

    fn remove(&self) {
        for name in ["client", "server", "host"] {
            let _ = Command::new("ip")
                .args(["netns", "delete", &format!("{}-{name}", self.prefix)])
                .stderr(std::process::Stdio::null())
                .status();
        }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.remove();
    }
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let status = Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .context("start ip (Debian's package iproute2)")?;
    anyhow::ensure!(status.success(), "ip {arguments} failed");
    Ok(())
}
