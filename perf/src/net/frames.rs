//! The frames of the packet load: UDP in the smallest Ethernet frame.

use std::net::Ipv4Addr;

/// One end of the traffic.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// IPv4 address.
    pub address: Ipv4Addr,
    /// UDP port.
    pub port: u16,
}

/// Bytes of a frame without its checksum, which makes 64 (IEEE 802.3).
const LENGTH: usize = 60;

/// A UDP datagram from one end to the other.
pub fn udp(from: End, to: End) -> Vec<u8> {
    let ip_length = LENGTH - 14;
    let mut frame = Vec::with_capacity(LENGTH);
    frame.extend(to.mac);
    frame.extend(from.mac);
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend(length_bytes(ip_length));
    frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    frame.extend(from.address.octets());
    frame.extend(to.address.octets());
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend(from.port.to_be_bytes());
    frame.extend(to.port.to_be_bytes());
    frame.extend(length_bytes(ip_length - 20));
    // No checksum of UDP's own, which IPv4 allows.
    frame.resize(LENGTH, 0);
    frame
}

fn length_bytes(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

/// The internet checksum (RFC 1071).
fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
