//! Sockets that see what the payload sends and that ping it.

use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketType, ipproto, recv, sendto, socket,
};

/// A lost packet is lost for good after this long; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);
const LONGEST: usize = 2048;

/// A raw ICMP socket.
pub struct EchoSocket {
    socket: OwnedFd,
}

impl EchoSocket {
    /// Opens it in the calling thread's network namespace.
    ///
    /// # Panics
    /// Without the right to (`CAP_NET_RAW`).
    pub fn open() -> Self {
        let socket = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))
            .expect("this test opens a raw socket and needs root (CAP_NET_RAW)");
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).expect("sockets have timeouts");
        Self { socket }
    }

    /// Pings `target` once and checks that the same data comes back.
    ///
    /// # Panics
    /// If nothing comes back.
    pub fn ping(&self, target: Ipv4Addr, sequence: u16) {
        const REQUEST: u8 = 8;
        const IDENTIFIER: u16 = 0x1234;
        let mut packet = vec![REQUEST, 0, 0, 0];
        packet.extend(IDENTIFIER.to_be_bytes());
        packet.extend(sequence.to_be_bytes());
        packet.extend(b"keelson pings its payload");
        let sum = internet_checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        let to = SocketAddrV4::new(target, 0);
        sendto(&self.socket, &packet, SendFlags::empty(), &to).expect("the ping can be sent");
        loop {
            let mut bytes = [MaybeUninit::uninit(); LONGEST];
            let ((received, _), _) = recv(&self.socket, &mut bytes, RecvFlags::empty())
                .expect("the guest answers the ping");
            let header = usize::from(received.first().copied().unwrap_or(0) & 0xf) * 4;
            let message = received.get(header..).unwrap_or_default();
            // Type 0 and a checksum of its own; the rest as sent.
            if message.first() == Some(&0) && message.get(4..) == packet.get(4..) {
                assert_eq!(received.get(12..16), Some(target.octets().as_slice()));
                return;
            }
        }
    }
}

/// A socket that gets every frame of the network namespace.
pub struct FrameSocket {
    socket: OwnedFd,
}

impl FrameSocket {
    /// Opens it in the calling thread's network namespace.
    ///
    /// # Panics
    /// Without the right to (`CAP_NET_RAW`).
    pub fn open() -> Self {
        // ETH_P_ALL, in network byte order as packet(7) wants it.
        const ALL: u16 = 0x0003;
        let protocol =
            Protocol::from_raw(u32::from(ALL.to_be()).try_into().expect("it isn't zero"));
        let socket = socket(AddressFamily::PACKET, SocketType::RAW, Some(protocol))
            .expect("this test opens a packet socket and needs root (CAP_NET_RAW)");
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).expect("sockets have timeouts");
        Self { socket }
    }

    /// Waits for a frame for which `wanted` holds.
    ///
    /// # Panics
    /// If none comes.
    pub fn wait_for(&self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        loop {
            let mut bytes = [MaybeUninit::uninit(); LONGEST];
            let ((frame, _), _) = recv(&self.socket, &mut bytes, RecvFlags::empty())
                .expect("the frame waited for comes");
            if wanted(frame) {
                return frame.to_vec();
            }
        }
    }
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low)));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
