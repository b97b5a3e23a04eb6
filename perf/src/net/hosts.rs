//! A host with two guests, and whoever filters between them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use keelson_ebpf::{Direction, Protocol, count_run_costs};

use super::frames::{self, End};
use super::keelson::Keelson;
use super::load::{self, Target};
use super::namespaces::{self, Namespaces};
use super::nftables;
use super::openvswitch::OpenVswitch;
use super::xdp::{PASS, Program};

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
/// Batches of runs of a program.
const PROGRAM_BATCHES: u32 = 50;

/// Who filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The eBPF network.
    Keelson,
    /// A bridge with nftables.
    Nftables,
    /// Open vSwitch.
    OpenVswitch,
    /// Nobody: a bridge.
    Bridge,
}

impl Peer {
    /// All, us first.
    pub const ALL: [Self; 4] = [
        Self::Keelson,
        Self::Nftables,
        Self::OpenVswitch,
        Self::Bridge,
    ];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keelson => "keelson",
            Self::Nftables => "bridge and nftables",
            Self::OpenVswitch => "Open vSwitch",
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

/// The host and its guests, with a policy in force. Dropping it removes them.
pub struct Hosts<'a> {
    filter: Filter<'a>,
    namespaces: Namespaces,
}

/// What lives as long as the policy is to be in force.
enum Filter<'a> {
    Keelson(&'a mut Keelson),
    OpenVswitch(#[allow(dead_code)] OpenVswitch), // ends when it is dropped
    Kernel,
}

impl<'a> Hosts<'a> {
    /// Makes the namespaces and the devices between them, and puts `rules` rules in force, of which
    /// two allow the load. None means that everything may reach the server. `keelson` is loaded if it is the
    /// peer and isn't yet.
    pub fn new(peer: Peer, rules: u32, keelson: &'a mut Option<Keelson>) -> anyhow::Result<Self> {
        let namespaces = Namespaces::new()?;
        let rules = rule_list(rules);
        if peer != Peer::OpenVswitch {
            namespaces.within("host", namespaces::add_bridge)?;
        }
        let filter = match peer {
            Peer::Bridge => Filter::Kernel,
            Peer::Nftables => {
                namespaces.within("host", || nftables::apply(&rules))?;
                Filter::Kernel
            }
            Peer::OpenVswitch => {
                Filter::OpenVswitch(namespaces.within("host", || OpenVswitch::start(&rules))?)
            }
            Peer::Keelson => {
                let keelson = match keelson {
                    Some(keelson) => keelson,
                    none => none.insert(Keelson::open()?),
                };
                namespaces.within("host", || keelson.attach(&rules))?;
                Filter::Keelson(keelson)
            }
        };
        let hosts = Self { filter, namespaces };
        hosts.within("client", || ping(SERVER.address))?;
        Ok(hosts)
    }

    /// Runs `work` on a thread of the namespace `host`, `client` or `server`.
    pub fn within<T: Send>(
        &self,
        name: &str,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        self.namespaces.within(name, work)
    }

    /// Packets that have left the host toward the server.
    pub fn delivered(&self) -> anyhow::Result<u64> {
        // The file system shows the devices of the namespace of whoever mounted it: ask the kernel.
        self.namespaces.within("host", || {
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
        let before = self.keelson()?.run_cost(direction)?;
        let counting = count_run_costs()?;
        load::packets(self, duration, target)?;
        drop(counting);
        let after = self.keelson()?.run_cost(direction)?;
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
        let Filter::Keelson(keelson) = &mut self.filter else {
            anyhow::bail!("no eBPF network is here");
        };
        let mut times = self.namespaces.within("host", || {
            let runs = runs / PROGRAM_BATCHES;
            let batch = |_| keelson.time_frame(device, direction, &frame, runs);
            (0..PROGRAM_BATCHES)
                .map(batch)
                .collect::<Result<Vec<_>, _>>()
        })?;
        // The median of short batches: others on the machine interrupt only some of them.
        times.sort_unstable();
        #[allow(clippy::cast_precision_loss)]
        let program_ns = times[times.len() / 2].as_nanos() as f64;
        Ok(BTreeMap::from([
            ("program_ns", program_ns),
            ("counted_ns", counted_ns),
            ("counting_ns", counting_cost(runs)?),
        ]))
    }

    fn keelson(&mut self) -> anyhow::Result<&mut Keelson> {
        match &mut self.filter {
            Filter::Keelson(keelson) => Ok(keelson),
            _ => anyhow::bail!("no eBPF network is here"),
        }
    }
}

impl Drop for Hosts<'_> {
    fn drop(&mut self) {
        if let Filter::Keelson(keelson) = &mut self.filter {
            let _ = self.namespaces.within("host", || keelson.detach());
        }
    }
}

/// What the kernel counts for a program that does nothing, in nanoseconds.
fn counting_cost(runs: u32) -> anyhow::Result<f64> {
    let program = Program::load(&PASS)?;
    let counting = count_run_costs()?;
    program.run(&frames::udp(CLIENT, SERVER), runs, None)?;
    drop(counting);
    program.counted_ns()
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

/// Makes sure that the two see each other: a TCP connection is refused, not unanswered.
fn ping(address: Ipv4Addr) -> anyhow::Result<()> {
    let limit = Duration::from_secs(10);
    match std::net::TcpStream::connect_timeout(&(address, PORT).into(), limit) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error).context("the client does not reach the server"),
    }
}
