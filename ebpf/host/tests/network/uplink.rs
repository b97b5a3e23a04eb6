//! A host with guests on a bridge and an uplink, behind which is a machine that knows nothing of the
//! guests' network.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::thread;

use keelson_ebpf::{Datapath, HookChoice, InterfacePolicy, PortForward, Protocol, SourceNat};

use super::machine::{Machine, bridge};
use super::{Network, PATIENCE, allow_from, ip};

pub const UPLINK: &str = "tap9";
/// The host's addresses at the uplink, by version of IP.
pub const EXTERNAL: [&str; 2] = ["10.99.0.1", "fd99::1"];
pub const PORTS: RangeInclusive<u16> = 20_000..=20_999;
/// Where the machine outside answers.
pub const SERVED: u16 = 8080;
/// Where it says whom it sees.
pub const MIRROR: u16 = 8081;
/// Where guests answer.
pub const INSIDE: u16 = 7000;

pub struct Scene {
    // First, so that it is closed before the namespace goes.
    pub datapath: Datapath,
    pub guests: Vec<Machine>,
    pub outside: Machine,
    pub network: Network,
}

pub fn nat() -> SourceNat {
    SourceNat {
        network: 9,
        uplink: UPLINK.into(),
        ipv4: Some("10.99.0.1".parse().expect("valid")),
        ipv6: Some("fd99::1".parse().expect("valid")),
        ports: PORTS,
        max_mappings: 1024,
    }
}

/// A forward from each external address to a guest.
pub fn forwards(guest: &Machine, port: u16, guest_port: u16) -> Vec<PortForward> {
    let mut forwards = Vec::new();
    for address in EXTERNAL {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            forwards.push(PortForward {
                uplink: UPLINK.into(),
                address: address.parse().expect("valid"),
                protocol,
                port,
                interface: guest.name.clone(),
                guest_port,
            });
        }
    }
    forwards
}

/// Lets in what is forwarded.
pub fn policy(guest: &Machine) -> InterfacePolicy {
    let mut ingress = Vec::new();
    for peer in ["0.0.0.0/0", "::/0"] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            ingress.push(allow_from(protocol, INSIDE..=INSIDE, peer));
        }
    }
    InterfacePolicy {
        ingress,
        ..guest.policy()
    }
}

impl Scene {
    pub fn new(hook: HookChoice) -> Self {
        let network = Network::new(hook);
        let mut datapath = network.open();
        bridge();
        let guests: Vec<_> = (1..=2).map(Machine::guest).collect();
        for guest in &guests {
            datapath.attach(&policy(guest)).expect("attached");
            guest.up();
            guest.serve(INSIDE);
        }
        let outside = Machine::outside(9);
        hide(&outside);
        outside.serve(SERVED);
        mirror(&outside, SocketAddr::new([0_u16; 8].into(), MIRROR));
        let missing = datapath.set_nat(&[nat()], &[]).expect("valid");
        assert!(missing.is_empty(), "{missing:?}");
        Self {
            datapath,
            guests,
            outside,
            network,
        }
    }

    /// Where the machine outside is, by version of IP.
    pub fn outside_at(&self, port: u16) -> [SocketAddr; 2] {
        let Machine { ipv4, ipv6, .. } = self.outside;
        [ipv4, ipv6].map(|address| SocketAddr::new(address, port))
    }
}

/// Takes a machine's way to the guests' network away.
pub fn hide(outside: &Machine) {
    outside.run(|| {
        ip("route del default");
        ip("-6 route del default");
    });
}

/// Answers each datagram to an address of the machine with where it came from.
pub fn mirror(machine: &Machine, at: SocketAddr) {
    machine.run(move || {
        let socket = UdpSocket::bind(at).expect("the port is free");
        thread::spawn(move || {
            while let Ok((_, from)) = socket.recv_from(&mut [0; 2048]) {
                let seen = SocketAddr::new(from.ip().to_canonical(), from.port());
                let _ = socket.send_to(seen.to_string().as_bytes(), from);
            }
        });
    });
}

/// A socket from a port, or any, to an address.
pub fn socket(port: u16, to: SocketAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() {
        [0; 4].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = UdpSocket::bind((any, port)).expect("bound");
    socket.connect(to).expect("there is a route");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    socket
}

/// Whom the mirror at the socket's other end sees.
pub fn seen(socket: &UdpSocket) -> io::Result<SocketAddr> {
    socket.send(b"who?")?;
    let mut buffer = [0; 128];
    let length = socket.recv(&mut buffer)?;
    let text = std::str::from_utf8(&buffer[..length]).expect("an address");
    Ok(text.parse().expect("an address"))
}

/// Sets a number as a socket's option.
pub fn set_option(socket: &impl AsRawFd, level: i32, name: i32, value: i32) {
    let length = size_of_val(&value).try_into().expect("small");
    // SAFETY: the option's value lives through the call, with its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            length,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// The largest packet that a connected socket may send.
pub fn path_mtu(socket: &UdpSocket) -> i32 {
    let (level, name) = if socket.local_addr().expect("bound").is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU)
    };
    let mut value: i32 = 0;
    let mut length = size_of_val(&value).try_into().expect("small");
    // SAFETY: the value and its size live through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    value
}

/// Lets nobody on the way cut a socket's packets.
pub fn do_not_fragment(socket: &UdpSocket) {
    if socket.local_addr().expect("bound").is_ipv4() {
        let value = libc::IP_PMTUDISC_DO;
        set_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value);
    } else {
        let value = libc::IPV6_PMTUDISC_DO;
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, value);
    }
}

/// Asks for an echo, with an identifier; whether it is answered.
pub fn ping(to: IpAddr, identifier: u16) -> bool {
    let (family, protocol, request) = if to.is_ipv4() {
        (libc::AF_INET, libc::IPPROTO_ICMP, 8)
    } else {
        (libc::AF_INET6, libc::IPPROTO_ICMPV6, 128)
    };
    // SAFETY: takes three numbers.
    let socket = unsafe { libc::socket(family, libc::SOCK_RAW, protocol) };
    assert!(socket >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else has it.
    let socket: UdpSocket = unsafe { std::os::fd::FromRawFd::from_raw_fd(socket) };
    socket.connect((to, 0)).expect("there is a route");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    let [a, b] = identifier.to_be_bytes();
    let mut message = vec![request, 0, 0, 0, a, b, 0, 1, b'p', b'i', b'n', b'g'];
    if to.is_ipv4() {
        let sum = super::frames::checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    socket.send(&message).expect("sent");
    let mut buffer = [0; 256];
    while let Ok(length) = socket.recv(&mut buffer) {
        // Of IPv4 with its header.
        let at = if to.is_ipv4() { 20 } else { 0 };
        let answer = &buffer[at..length];
        if [0, 129].contains(&answer[0]) && answer[4..] == message[4..] {
            return true;
        }
    }
    false
}
