//! Two hosts that only an underlay links: a namespace each, on a thread of its own, with a datapath and
//! guests.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use keelson_ebpf::{
    Datapath, HookChoice, InterfacePolicy, MovedFlows, Protocol, RemoteInterface, Rule, Tunnel,
};

use super::machine::{self, Machine};
use super::{Network, allow_from, ip};

/// The network of all guests, and its identifier.
pub const NETWORK: u32 = 9;
pub const VNI: u32 = 4711;
pub const PORT: u16 = 4789;
/// What fits into an underlay of 1,500 bytes, of either version of IP.
pub const MTU: u16 = 1430;

type Work = Box<dyn FnOnce(&mut Inside) + Send>;

/// What is in a host's namespace.
pub struct Inside {
    // First, so that it is closed before the namespace goes.
    pub datapath: Option<Datapath>,
    pub network: Network,
}

impl Inside {
    pub fn datapath(&mut self) -> &mut Datapath {
        self.datapath.as_mut().expect("the agent runs")
    }
}

pub struct Host {
    pub address: IpAddr,
    thread_id: i32,
    work: Option<mpsc::Sender<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    fn new(hook: HookChoice, address: IpAddr) -> Self {
        let (work, jobs) = mpsc::channel::<Work>();
        let (say, thread_id) = mpsc::channel();
        let thread = thread::spawn(move || {
            let network = Network::new(hook);
            machine::bridge();
            let thread_id = rustix::thread::gettid().as_raw_nonzero().get();
            say.send(thread_id).expect("the test waits");
            let mut inside = Inside {
                datapath: Some(network.open()),
                network,
            };
            for job in jobs {
                job(&mut inside);
            }
        });
        Self {
            address,
            thread_id: thread_id.recv().expect("the host starts"),
            work: Some(work),
            thread: Some(thread),
        }
    }

    /// Does work in the host's namespace.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Inside) -> T + Send + 'static,
    ) -> T {
        let (say, result) = mpsc::channel();
        let job: Work = Box::new(move |inside| {
            let _ = say.send(work(inside));
        });
        let to = self.work.as_ref().expect("the host runs");
        to.send(job).expect("the host runs");
        result.recv().expect("the work does not panic")
    }

    /// Makes the tunnel's device, and this host's end of it.
    fn begin_tunnel(&self) {
        let address = self.address;
        self.run(move |inside| {
            ip(&format!(
                "link add vx0 mtu 9000 type vxlan external dstport {PORT}"
            ));
            ip("link set vx0 up");
            let datapath = inside.datapath();
            let tunnel = Tunnel {
                device: "vx0".into(),
                address,
                port: PORT,
            };
            datapath.set_tunnel(Some(&tunnel)).expect("attached");
            let overlays = BTreeMap::from([(VNI, NETWORK)]);
            datapath.set_overlays(&overlays).expect("written");
        });
    }

    /// A guest of this host, which lets in what guests of its network send.
    pub fn guest(&self, number: u8) -> Machine {
        let guest = self.run(move |_| Machine::guest(number));
        guest.run(|| ip(&format!("link set eth0 mtu {MTU}")));
        self.attach(&guest, policy(&guest));
        guest
    }

    pub fn attach(&self, guest: &Machine, policy: InterfacePolicy) {
        let name = guest.name.clone();
        self.run(move |inside| {
            inside.datapath().attach(&policy).expect("attached");
            ip(&format!("link set {name} up"));
        });
    }

    /// Tells this host where a guest is.
    pub fn knows(&self, guest: &Machine, host: Option<&Self>) {
        let interfaces = host.map(|host| remote(guest, host.address));
        let name = guest.name.clone();
        self.run(move |inside| {
            let interfaces = interfaces.into_iter().collect();
            inside
                .datapath()
                .set_remote(&name, interfaces)
                .expect("written");
        });
    }
}

/// Moves a guest, with what becomes of its flows; how many of them were taken. Both hosts know of it.
pub fn move_guest(
    guest: Machine,
    [from, to]: [&Host; 2],
    policy: InterfacePolicy,
    flows: impl Fn(MovedFlows) -> MovedFlows,
) -> (Machine, usize) {
    let name = guest.name.clone();
    let leaving = from.run(move |inside| {
        ip(&format!("link del {name}"));
        let leaving = inside.datapath().leaving_flows(&name).expect("read");
        assert!(inside.datapath().detach(&name).expect("detached"));
        leaving.flows
    });
    assert_ne!(leaving.count(), 0);
    from.knows(&guest, Some(to));
    to.knows(&guest, None);
    let flows = flows(leaving);
    to.run(move |inside| {
        let name = guest.name.clone();
        guest.link_again();
        guest.run(|| ip(&format!("link set eth0 mtu {MTU}")));
        inside.datapath().attach(&policy).expect("attached");
        let taken = inside.datapath().take_flows(&name, &flows).expect("taken");
        ip(&format!("link set {name} up"));
        (guest, taken)
    })
}

impl Drop for Host {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Two hosts with a guest each, who know of each other.
pub struct Hosts {
    pub one: Host,
    pub other: Host,
    pub here: Machine,
    pub there: Machine,
}

/// Which version of IP the hosts reach each other by.
#[derive(Clone, Copy)]
pub enum Underlay {
    Ipv4,
    Ipv6,
}

impl Hosts {
    pub fn new(hook: HookChoice, underlay: Underlay) -> Self {
        let [one, other] = match underlay {
            Underlay::Ipv4 => ["10.50.0.1", "10.50.0.2"],
            Underlay::Ipv6 => ["fd50::1", "fd50::2"],
        };
        let [one, other] =
            [one, other].map(|address| Host::new(hook, address.parse().expect("valid")));
        let peer = other.thread_id;
        one.run(move |_| {
            ip(&format!(
                "link add under0 mtu 1500 type veth peer name under0 mtu 1500 netns {peer}"
            ));
        });
        for host in [&one, &other] {
            let address = host.address;
            host.run(move |_| {
                let (prefix, option) = if address.is_ipv4() {
                    (24, "")
                } else {
                    (64, "nodad")
                };
                ip(&format!("addr add {address}/{prefix} dev under0 {option}"));
                ip("link set under0 up");
            });
            host.begin_tunnel();
        }
        let (here, there) = (one.guest(1), other.guest(2));
        one.knows(&there, Some(&other));
        other.knows(&here, Some(&one));
        Self {
            one,
            other,
            here,
            there,
        }
    }
}

pub fn remote(guest: &Machine, host: IpAddr) -> RemoteInterface {
    let policy = guest.policy();
    RemoteInterface {
        network: NETWORK,
        vni: VNI,
        mac: guest.mac,
        ipv4: policy.ipv4,
        ipv6: policy.ipv6,
        host,
    }
}

/// Lets in what comes from guests' addresses.
pub fn policy(guest: &Machine) -> InterfacePolicy {
    let peers = ["10.77.0.0/24", "fd77::/64"];
    let ingress = peers.map(|peer| allow_from(Protocol::Any, Rule::ALL_PORTS, peer));
    InterfacePolicy {
        network: NETWORK,
        spans_hosts: true,
        mtu: MTU,
        ingress: ingress.to_vec(),
        ..guest.policy()
    }
}
