//! Writes ends into frames; sums are left as they are.

use std::net::IpAddr;

use super::packet::{Packet, Quoted};

/// An address and a port; of an echo, its identifier.
pub type End = (IpAddr, u16);

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

/// Gives the packet that an error quotes another source or destination.
pub fn rewrite_quoted(
    packet: &Packet,
    frame: &mut [u8],
    quoted: &Quoted,
    (source, destination): (Option<End>, Option<End>),
) {
    let at = packet.offset + 8;
    let header = if packet.source.is_ipv4() { 20 } else { 40 };
    let new_source = source.unwrap_or(quoted.source);
    let new_destination = destination.unwrap_or(quoted.destination);
    put_addresses(frame, at, new_source.0, new_destination.0);
    if quoted.echo.is_some() {
        let identifier = source.map_or(quoted.echo.unwrap_or(0), |source| source.1);
        put(frame, at + header + 4, &identifier.to_be_bytes());
    } else {
        put_ports(frame, at + header, new_source.1, new_destination.1);
    }
}
