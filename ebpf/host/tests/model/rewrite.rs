//! Writes ends into frames; sums are left as they are.

use std::net::IpAddr;

fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ipv4) => ipv4.octets().to_vec(),
        IpAddr::V6(ipv6) => ipv6.octets().to_vec(),
    }
}

pub fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    bytes[at..at + new.len()].copy_from_slice(new);
}

/// Writes the addresses of the IP header that begins at `at`.
pub fn put_addresses(bytes: &mut [u8], at: usize, source: IpAddr, destination: IpAddr) {
    let first = if source.is_ipv4() { 12 } else { 8 };
    let both = [address_bytes(source), address_bytes(destination)].concat();
    put(bytes, at + first, &both);
}

pub fn rewrite_addresses(frame: &mut [u8], source: IpAddr, destination: IpAddr) {
    put_addresses(frame, 14, source, destination);
}

pub fn put_ports(bytes: &mut [u8], at: usize, source: u16, destination: u16) {
    put(bytes, at, &source.to_be_bytes());
    put(bytes, at + 2, &destination.to_be_bytes());
}
