//! A network namespace per test, and guests in it: TAP devices whose frames the test sends and
//! receives itself, as a VMM does, with the kernel's own IPv4 stack as the host on the other side.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod fleet;
pub mod frames;
pub mod hosts;
pub mod machine;
pub mod uplink;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{self, Command};
use std::time::Duration;

use keelson_ebpf::{
    Datapath, DatapathConfig, HookChoice, InterfacePolicy, MacAddress, Protocol, Rule,
};

/// How long something that must happen may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub const HOST_MAC: MacAddress = MacAddress([0x02, 0, 0, 0, 0, 0x01]);
pub const HOST_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// Runs a test body with each kind of hook.
#[macro_export]
macro_rules! with_both_hooks {
    ($($name:ident),* $(,)?) => {
        $(
            mod $name {
                #[test]
                fn tcx() {
                    super::$name(keelson_ebpf::HookChoice::Tcx);
                }

                #[test]
                fn clsact() {
                    super::$name(keelson_ebpf::HookChoice::Clsact);
                }
            }
        )*
    };
}

/// A network namespace of this thread's own and a pin root of this test's own.
pub struct Network {
    pub config: DatapathConfig,
}

impl Network {
    pub fn new(hook: HookChoice) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "the eBPF tests load programs and make network namespaces: run them as root"
        );
        // SAFETY: unshare(2) with these flags changes only what this thread sees.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(
            result,
            0,
            "cannot make a network namespace: {}",
            io::Error::last_os_error()
        );
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").expect("no IPv6 chatter");
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").expect("no IPv6 chatter");
        ip("link set lo up");
        let thread = rustix::thread::gettid().as_raw_nonzero();
        let pin_root = PathBuf::from(format!(
            "/sys/fs/bpf/keelson-test-{}-{thread}",
            process::id()
        ));
        Self {
            config: DatapathConfig {
                pin_root,
                hook,
                max_flows: 4096,
            },
        }
    }

    pub fn open(&self) -> Datapath {
        Datapath::open(&self.config).expect("the datapath opens")
    }

    /// A TAP device called `tap{number}` with no address on the host's side, and the guest behind it.
    #[allow(clippy::unused_self)] // Only where there is a network can a guest join it.
    pub fn guest(&self, number: u8) -> Guest {
        Guest::new(number, None)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for folder in ["links", "maps", ""] {
            let folder = self.config.pin_root.join(folder);
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let _ = fs::remove_file(entry.path());
            }
            let _ = fs::remove_dir(&folder);
        }
    }
}

/// Runs `ip` with arguments separated by blanks.
pub fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("iproute2 is installed");
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {problem}");
}

/// The guest side of a TAP device.
pub struct Guest {
    tap: File,
    pub name: String,
    pub mac: MacAddress,
    pub ip: Ipv4Addr,
}

impl Guest {
    pub fn new(number: u8, ifindex: Option<u32>) -> Self {
        let name = format!("tap{number}");
        if let Some(ifindex) = ifindex {
            // Only rtnetlink lets one choose the index; the TAP is then opened by its name.
            ip(&format!("link add {name} index {ifindex} type dummy"));
        }
        let guest = Self {
            tap: open_tap(&name),
            name,
            mac: MacAddress([0x52, 0x54, 0, 0, 0, number]),
            ip: Ipv4Addr::new(10, 77, 0, 100 + number),
        };
        ip(&format!("link set {} address {HOST_MAC}", guest.name));
        guest
    }

    /// Brings the device up and gives the host its address and a route and neighbour for the guest.
    /// After the policy is attached, as an agent does it, so that nothing slips by.
    pub fn up(&self) {
        ip(&format!("link set {} up", self.name));
        ip(&format!(
            "addr add {HOST_IP} peer {} dev {}",
            self.ip, self.name
        ));
        ip(&format!(
            "neigh replace {} lladdr {} nud permanent dev {}",
            self.ip, self.mac, self.name
        ));
    }

    /// A policy that lets nothing in.
    pub fn policy(&self) -> InterfacePolicy {
        InterfacePolicy {
            name: self.name.clone(),
            mac: self.mac,
            ipv4: Some(self.ip),
            ..InterfacePolicy::default()
        }
    }

    pub fn policy_with(&self, ingress: &[Rule]) -> InterfacePolicy {
        InterfacePolicy {
            ingress: ingress.to_vec(),
            ..self.policy()
        }
    }

    pub fn send(&self, frame: &[u8]) {
        (&self.tap).write_all(frame).expect("the TAP takes a frame");
    }

    /// The next frame, which must come.
    pub fn receive(&self) -> Vec<u8> {
        let mut poll = libc::pollfd {
            fd: self.tap.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let milliseconds = i32::try_from(PATIENCE.as_millis()).expect("short");
        // SAFETY: one pollfd is passed and lives through the call.
        let ready = unsafe { libc::poll(&raw mut poll, 1, milliseconds) };
        assert_eq!(ready, 1, "no frame reached the guest of {}", self.name);
        self.receive_now().expect("poll said so")
    }

    /// The next frame, if one is there.
    pub fn receive_now(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 65_536];
        match (&self.tap).read(&mut frame) {
            Ok(length) => {
                frame.truncate(length);
                Some(frame)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("cannot read from {}: {error}", self.name),
        }
    }
}

fn open_tap(name: &str) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("/dev/net/tun can be opened");
    // SAFETY: all bytes zero are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI).expect("small");
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(
        result,
        0,
        "cannot make {name}: {}",
        io::Error::last_os_error()
    );
    rustix::io::ioctl_fionbio(&file, true).expect("non-blocking");
    file
}

/// A packet socket of the host that sends out of one interface, without any mark.
pub fn raw_socket(interface: &str) -> OwnedFd {
    let name = std::ffi::CString::new(interface).expect("a name");
    // SAFETY: the name is a terminated string that lives through the call.
    let ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) };
    // SAFETY: takes three numbers.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
    assert!(socket >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all bytes zero are a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET.try_into().expect("small");
    address.sll_ifindex = ifindex.try_into().expect("small");
    let length = size_of::<libc::sockaddr_ll>().try_into().expect("small");
    // SAFETY: the address lives through the call, with its size.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    socket
}

/// A UDP socket of the host.
pub fn host_socket(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((HOST_IP, port)).expect("the host has the address");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    socket
}

/// Allows ports from everywhere.
pub fn allow(protocol: Protocol, ports: std::ops::RangeInclusive<u16>) -> Rule {
    allow_from(protocol, ports, "0.0.0.0/0")
}

pub fn allow_from(protocol: Protocol, ports: std::ops::RangeInclusive<u16>, peer: &str) -> Rule {
    Rule {
        protocol,
        ports,
        peer: peer.parse().expect("a valid prefix"),
        counter: 0,
    }
}
