//! Machines with a network stack of their own: a namespace on a thread, linked to the test's own by a
//! pair of devices, with all offloads that the kernel has for these.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::thread;

use keelson_ebpf::{InterfacePolicy, MacAddress, ServiceBackend};

use super::{PATIENCE, ip};

pub const BRIDGE: &str = "br0";
pub const HOST_IPV6: &str = "fd77::1";

type Work = Box<dyn FnOnce() + Send>;

/// A machine; what it runs ends with the test's process.
pub struct Machine {
    pub name: String,
    pub mac: MacAddress,
    pub ipv4: IpAddr,
    pub ipv6: IpAddr,
    work: mpsc::Sender<Work>,
}

/// Gives the host a bridge with addresses, to which machines are linked.
pub fn bridge() {
    enable_ipv6();
    ip(&format!("link add {BRIDGE} type bridge"));
    ip(&format!("addr add 10.77.0.1/24 dev {BRIDGE}"));
    ip(&format!("addr add {HOST_IPV6}/64 dev {BRIDGE} nodad"));
    ip(&format!("link set {BRIDGE} up"));
}

fn enable_ipv6() {
    for setting in ["all", "default"] {
        let file = format!("/proc/sys/net/ipv6/conf/{setting}/disable_ipv6");
        std::fs::write(file, "0").expect("the namespace has IPv6");
    }
}

impl Machine {
    /// A guest on the bridge, behind the device `tap{number}`, which is left down: a policy comes
    /// first.
    pub fn guest(number: u8) -> Self {
        let machine = Self::linked(number, 77, 24);
        ip(&format!("link set {} master {BRIDGE}", machine.name));
        machine
    }

    /// The machine as a backend of a service at an address of this version of IP, by this port of its own.
    pub fn backend(&self, service: IpAddr, port: u16) -> ServiceBackend {
        ServiceBackend {
            address: if service.is_ipv4() {
                self.ipv4
            } else {
                self.ipv6
            },
            port,
            mac: self.mac,
        }
    }

    /// A machine that the host routes for.
    pub fn outside(number: u8) -> Self {
        enable_ipv6();
        let machine = Self::linked(number, 99, 24);
        machine.join_outside();
        for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{file}"), "1").expect("the host forwards");
        }
        machine
    }

    /// Links an outside machine again, after its link was deleted.
    pub fn relink(&self) {
        let thread = self.run(|| rustix::thread::gettid().as_raw_nonzero());
        self.link(thread.get(), 99, 24);
        self.join_outside();
    }

    /// Links a guest to the bridge of the host that this is called on, after its link was deleted.
    pub fn link_again(&self) {
        let thread = self.run(|| rustix::thread::gettid().as_raw_nonzero());
        self.link(thread.get(), 77, 24);
        ip(&format!("link set {} master {BRIDGE}", self.name));
    }

    fn join_outside(&self) {
        ip(&format!("addr add 10.99.0.1/24 dev {}", self.name));
        ip(&format!("addr add fd99::1/64 dev {} nodad", self.name));
        self.up();
    }

    fn linked(number: u8, network: u8, prefix: u8) -> Self {
        let (work, jobs) = mpsc::channel::<Work>();
        let (say, thread) = mpsc::channel();
        thread::spawn(move || {
            // SAFETY: unshare(2) with these flags changes only what this thread sees.
            let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(result, 0, "cannot make a network namespace");
            let thread = rustix::thread::gettid().as_raw_nonzero();
            say.send(thread).expect("the test waits");
            for job in jobs {
                job();
            }
        });
        let thread = thread.recv().expect("the machine starts");
        let machine = Self {
            name: format!("tap{number}"),
            mac: MacAddress([0x52, 0x54, 0, 0, 0, number]),
            ipv4: [10, network, 0, 100 + number].into(),
            ipv6: format!("fd{network}::100:{number:x}")
                .parse()
                .expect("valid"),
            work,
        };
        machine.link(thread.get(), network, prefix);
        machine
    }

    fn link(&self, thread: i32, network: u8, prefix: u8) {
        let (name, mac) = (&self.name, self.mac);
        ip(&format!(
            "link add {name} type veth peer name eth0 address {mac} netns {thread}"
        ));
        let (ipv4, ipv6) = (self.ipv4, self.ipv6);
        self.run(move || {
            ip("link set lo up");
            ip(&format!("addr add {ipv4}/{prefix} dev eth0"));
            ip(&format!("addr add {ipv6}/64 dev eth0 nodad"));
            ip("link set eth0 up");
            ip(&format!("route add default via 10.{network}.0.1"));
            ip(&format!("-6 route add default via fd{network}::1"));
        });
    }

    /// Brings up the host's end of its link.
    pub fn up(&self) {
        ip(&format!("link set {} up", self.name));
    }

    /// A policy that lets nothing in.
    pub fn policy(&self) -> InterfacePolicy {
        let (IpAddr::V4(ipv4), IpAddr::V6(ipv6)) = (self.ipv4, self.ipv6) else {
            unreachable!("one of each version");
        };
        InterfacePolicy {
            name: self.name.clone(),
            mac: self.mac,
            ipv4: Some(ipv4),
            ipv6: Some(ipv6),
            network: 9,
            ..InterfacePolicy::default()
        }
    }

    /// Does work in the machine; what it starts there goes on.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (say, result) = mpsc::channel();
        let job = Box::new(move || {
            let _ = say.send(work());
        });
        self.work.send(job).expect("the machine runs");
        result.recv().expect("the work does not panic")
    }

    /// Takes connections and datagrams: says the machine's number first, then what it is told.
    pub fn serve(&self, port: u16) {
        let number = self.mac.0[5];
        self.run(move || {
            let everywhere = SocketAddr::new("::".parse().expect("valid"), port);
            let listener = TcpListener::bind(everywhere).expect("the port is free");
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    thread::spawn(move || echo(stream, number));
                }
            });
            let socket = UdpSocket::bind(everywhere).expect("the port is free");
            thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while let Ok((length, from)) = socket.recv_from(&mut buffer[1..]) {
                    buffer[0] = number;
                    let _ = socket.send_to(&buffer[..=length], from);
                }
            });
        });
    }
}

fn echo(mut stream: TcpStream, number: u8) {
    let mut buffer = vec![0; 65_536];
    let mut said = stream.write_all(&[number]);
    while said.is_ok() {
        said = match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(length) => stream.write_all(&buffer[..length]),
        };
    }
}

/// A connection to a machine that serves, and which one that is.
pub fn connect(to: SocketAddr) -> (TcpStream, u8) {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).expect("it takes connections");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream.set_write_timeout(Some(PATIENCE)).expect("set");
    let mut number = [0];
    stream.read_exact(&mut number).expect("it says its number");
    (stream, number[0])
}

/// Says `length` bytes and hears them again.
pub fn talk(stream: &mut TcpStream, length: usize) -> std::io::Result<()> {
    let sent: Vec<u8> = (0..=250).cycle().take(length).collect();
    let mut heard = vec![0; length];
    let mut writer = stream.try_clone()?;
    thread::scope(|scope| {
        let writing = scope.spawn(|| writer.write_all(&sent));
        stream.read_exact(&mut heard)?;
        writing.join().expect("no panic")
    })?;
    assert!(sent == heard, "what came back is what was said");
    Ok(())
}

/// A socket for datagrams to a machine that serves.
pub fn datagrams(to: SocketAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() {
        [0; 4].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = UdpSocket::bind((any, 0)).expect("bound");
    socket.connect(to).expect("there is a route");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    socket
}

/// Says `length` bytes and hears them again; from which machine.
pub fn exchange(socket: &UdpSocket, length: usize) -> std::io::Result<u8> {
    let sent: Vec<u8> = (0..=250).cycle().take(length).collect();
    socket.send(&sent)?;
    let mut heard = vec![0; length + 1];
    let count = socket.recv(&mut heard)?;
    assert_eq!(count, length + 1);
    assert_eq!(heard[1..], sent);
    Ok(heard[0])
}
