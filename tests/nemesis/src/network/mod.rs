//! The run's own network: hosts in network namespaces, each with a TAP device, and a switch between
//! them that can be told to lose, delay and cut.
//!
//! The switch is this program and not a bridge of the kernel's, for there are kernels without netem;
//! and as a program it can cut one direction alone.

mod switch;
mod tap;

use std::fs::File;
use std::net::Ipv4Addr;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;
use rustix::fd::AsFd as _;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use self::switch::Switch;
use crate::sandbox::run;

/// The clients' port of the switch; the others are members'.
pub const CLIENTS: usize = 0;

/// How frames from one host to another fare.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Link {
    /// None arrive.
    pub cut: bool,
    /// The share of frames that is lost, of 1,000.
    pub loss_permille: u32,
    /// They arrive so much later.
    pub delay: Duration,
    /// And up to so much later still, each by itself, so that they overtake each other.
    pub jitter: Duration,
}

type Links = Arc<Mutex<Vec<Vec<Link>>>>;

/// Hosts and the switch between them.
pub struct Network {
    hosts: Vec<File>,
    links: Links,
    /// Dropped before the devices could be made again.
    _switch: Switch,
}

impl Network {
    /// A network of `members` hosts beside this program's own.
    pub fn new(members: usize, seed: u64) -> anyhow::Result<Self> {
        let count = members + 1;
        let mut taps = vec![tap::open("clients")?];
        tap::configure("clients", CLIENTS, count)?;
        let mut hosts = vec![File::open("/proc/thread-self/ns/net")?];
        for host in 1..count {
            let made = std::thread::spawn(move || make_host(host, count)).join();
            let (namespace, tap) =
                made.map_err(|_| anyhow::anyhow!("the thread that makes host {host} panicked"))??;
            hosts.push(namespace);
            taps.push(tap);
        }
        let links: Links = Arc::new(Mutex::new(vec![vec![Link::default(); count]; count]));
        let switch = Switch::start(taps, links.clone(), seed)?;
        Ok(Self {
            hosts,
            links,
            _switch: switch,
        })
    }

    /// The address of a host.
    pub fn address(host: usize) -> Ipv4Addr {
        // No run has more hosts than a /24 network.
        Ipv4Addr::new(10, 99, 0, u8::try_from(host + 1).unwrap_or(u8::MAX))
    }

    /// Changes how frames fare on each link: from, to, and how it is now.
    pub fn change(&self, change: impl Fn(usize, usize, &mut Link)) {
        for (from, row) in self.links.lock().iter_mut().enumerate() {
            for (to, link) in row.iter_mut().enumerate() {
                change(from, to, link);
            }
        }
    }

    /// Every frame arrives at once.
    pub fn heal(&self) {
        self.change(|_, _, link| *link = Link::default());
    }

    /// Starts a process on a host.
    pub fn spawn(&self, host: usize, mut command: Command) -> anyhow::Result<Child> {
        let namespace = self
            .hosts
            .get(host)
            .context("there is no such host")?
            .try_clone()?;
        let spawned = std::thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .context("enter the host's network namespace")?;
            command
                .spawn()
                .with_context(|| format!("run {}", command.get_program().display()))
        });
        spawned
            .join()
            .map_err(|_| anyhow::anyhow!("the thread that starts a process panicked"))?
    }
}

fn make_host(host: usize, count: usize) -> anyhow::Result<(File, File)> {
    // SAFETY: a new network namespace for this thread leaves memory and descriptors shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.context("make a network namespace")?;
    run("ip", &["link", "set", "dev", "lo", "up"])?;
    let tap = tap::open("eth0")?;
    tap::configure("eth0", host, count)?;
    Ok((File::open("/proc/thread-self/ns/net")?, tap))
}
