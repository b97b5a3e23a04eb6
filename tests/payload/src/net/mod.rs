//! The little of Ethernet, ARP, IPv4 and ICMP that a ping needs (RFC 826, 791, 792).

pub mod frame;
pub mod host;
