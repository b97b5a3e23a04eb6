//! Reads and checks the headers behind IP. Uses no maps.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{Address, DropReason, from_ipv4};
use network_types::ip::Ipv4Hdr;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;

use crate::frame::read;
use crate::ip::{IPV6_LEN, Ip, protocol};

/// ICMP types (RFC 792, RFC 1256).
pub mod icmp_type {
    pub const ECHO_REPLY: u8 = 0;
    pub const DESTINATION_UNREACHABLE: u8 = 3;
    pub const REDIRECT: u8 = 5;
    pub const ECHO_REQUEST: u8 = 8;
    pub const ROUTER_ADVERTISEMENT: u8 = 9;
    pub const TIME_EXCEEDED: u8 = 11;
    pub const PARAMETER_PROBLEM: u8 = 12;
}

/// ICMPv6 types (RFC 4443, RFC 2710, RFC 4861, RFC 3810).
pub mod icmpv6_type {
    pub const LAST_ERROR: u8 = 127;
    pub const ECHO_REQUEST: u8 = 128;
    pub const ECHO_REPLY: u8 = 129;
    pub const LISTENER_QUERY: u8 = 130;
    pub const LISTENER_DONE: u8 = 132;
    pub const ROUTER_SOLICITATION: u8 = 133;
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    pub const REDIRECT: u8 = 137;
    pub const LISTENER_REPORT: u8 = 143;
}

/// Bytes of an ICMP header with the four that depend on its type.
const ICMP_LEN: usize = 8;

const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

/// What the policy needs of a transport header.
pub struct Transport {
    /// IP protocol number.
    pub protocol: u8,
    /// The flags of TCP, the type of ICMP, else zero.
    pub detail: u8,
    /// Zero for protocols without ports; for an ICMP echo, the identifier.
    pub source_port: u16,
    /// As the source port; what rules call ports of ICMP is in `rule_port`.
    pub destination_port: u16,
    /// What a rule's ports are compared with: the destination port, or ICMP's type and code.
    pub rule_port: u16,
}

impl Transport {
    /// TCP that asks for a new connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.protocol == protocol::TCP && self.detail & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// TCP that says it has no more to send.
    #[inline(always)]
    pub fn finishes(&self) -> bool {
        self.protocol == protocol::TCP && self.detail & TCP_FIN != 0
    }

    /// TCP that ends the connection at once.
    #[inline(always)]
    pub fn resets(&self) -> bool {
        self.protocol == protocol::TCP && self.detail & TCP_RST != 0
    }

    /// ICMP of this type.
    #[inline(always)]
    pub fn is_icmp(&self, icmp_type: u8) -> bool {
        self.protocol == protocol::ICMP && self.detail == icmp_type
    }

    /// ICMPv6 of this type.
    #[inline(always)]
    pub fn is_icmpv6(&self, icmp_type: u8) -> bool {
        self.protocol == protocol::ICMPV6 && self.detail == icmp_type
    }

    /// Asks the other side to answer.
    #[inline(always)]
    pub fn is_echo_request(&self) -> bool {
        self.is_icmp(icmp_type::ECHO_REQUEST) || self.is_icmpv6(icmpv6_type::ECHO_REQUEST)
    }

    /// Answers such a request.
    #[inline(always)]
    pub fn is_echo_reply(&self) -> bool {
        self.is_icmp(icmp_type::ECHO_REPLY) || self.is_icmpv6(icmpv6_type::ECHO_REPLY)
    }

    /// Either ICMP.
    #[inline(always)]
    pub fn is_any_icmp(&self) -> bool {
        matches!(self.protocol, protocol::ICMP | protocol::ICMPV6)
    }

    /// ICMP that reports what became of an earlier packet, which it quotes.
    #[inline(always)]
    pub fn is_icmp_error(&self) -> bool {
        self.is_icmp(icmp_type::DESTINATION_UNREACHABLE)
            || self.is_icmp(icmp_type::TIME_EXCEEDED)
            || self.is_icmp(icmp_type::PARAMETER_PROBLEM)
            || (self.protocol == protocol::ICMPV6 && self.detail <= icmpv6_type::LAST_ERROR)
    }
}

/// Whether the flags are those of a TCP segment in the middle of a connection.
#[inline(always)]
pub fn goes_on(flags: u8) -> bool {
    flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK) == TCP_ACK
}

/// The transport header of a whole packet or of a first fragment, which must hold all of that header
/// (RFC 1858, RFC 7112).
#[inline(always)]
pub fn transport(ip: &Ip) -> Result<Transport, DropReason> {
    match (ip.protocol, ip.is_ipv6) {
        (protocol::TCP, _) => tcp(ip),
        (protocol::UDP, _) => udp(ip),
        (protocol::ICMP, false) | (protocol::ICMPV6, true) => icmp(ip),
        // Each of the two belongs to its own version of IP only.
        (protocol::ICMP, true) | (protocol::ICMPV6, false) => Err(DropReason::Malformed),
        (other, _) => Ok(Transport {
            protocol: other,
            detail: 0,
            source_port: 0,
            destination_port: 0,
            rule_port: 0,
        }),
    }
}

#[inline(always)]
fn tcp(ip: &Ip) -> Result<Transport, DropReason> {
    let [data_offset, flags, ..] = ip.first[3].to_ne_bytes();
    let header_length = u32::from(data_offset >> 4) * 4;
    if header_length < TcpHdr::LEN as u32 || ip.length < header_length {
        return Err(DropReason::Malformed);
    }
    // No stack sends these; scanners do, to see what a filter makes of them.
    let contradicts = flags & TCP_SYN != 0 && flags & (TCP_FIN | TCP_RST) != 0;
    if contradicts || flags & (TCP_SYN | TCP_RST | TCP_ACK) == 0 {
        return Err(DropReason::Malformed);
    }
    let (source_port, destination_port) = ports(ip);
    Ok(Transport {
        protocol: protocol::TCP,
        detail: flags,
        source_port,
        destination_port,
        rule_port: destination_port,
    })
}

#[inline(always)]
fn udp(ip: &Ip) -> Result<Transport, DropReason> {
    let [high, low, ..] = ip.first[1].to_ne_bytes();
    let length = u32::from(u16::from_be_bytes([high, low]));
    if ip.length < UdpHdr::LEN as u32
        || length < UdpHdr::LEN as u32
        || (!ip.more_fragments && length > ip.length)
    {
        return Err(DropReason::Malformed);
    }
    let (source_port, destination_port) = ports(ip);
    Ok(Transport {
        protocol: protocol::UDP,
        detail: 0,
        source_port,
        destination_port,
        rule_port: destination_port,
    })
}

#[inline(always)]
fn icmp(ip: &Ip) -> Result<Transport, DropReason> {
    if ip.length < ICMP_LEN as u32 {
        return Err(DropReason::Malformed);
    }
    let [icmp_type, code, ..] = ip.first[0].to_ne_bytes();
    let [high, low, ..] = ip.first[1].to_ne_bytes();
    let identifier = u16::from_be_bytes([high, low]);
    Ok(Transport {
        protocol: ip.protocol,
        detail: icmp_type,
        source_port: identifier,
        destination_port: identifier,
        rule_port: u16::from_be_bytes([icmp_type, code]),
    })
}

#[inline(always)]
fn ports(ip: &Ip) -> (u16, u16) {
    let [a, b, c, d] = ip.first[0].to_ne_bytes();
    (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}

/// The packet that an ICMP error quotes: its IP header and 8 bytes (RFC 792, RFC 4443).
pub struct Quoted {
    pub source: Address,
    pub destination: Address,
    pub protocol: u8,
    pub source_port: u16,
    pub destination_port: u16,
    /// Whether it can belong to a flow: not so a later fragment, an ICMP message that is no echo
    /// request, a packet with IPv4 options or IPv6 extension headers.
    pub has_flow: bool,
}

/// Reads what an ICMP error quotes.
#[inline(always)]
pub fn quoted(packet: &TcContext, ip: &Ip) -> Result<Quoted, DropReason> {
    let offset = ip.offset + ICMP_LEN;
    let header_length = if ip.is_ipv6 { IPV6_LEN } else { Ipv4Hdr::LEN };
    if ip.length < (ICMP_LEN + header_length + 8) as u32 {
        return Err(DropReason::Malformed);
    }
    let mut has_flow = true;
    let (source, destination, protocol) = if ip.is_ipv6 {
        let [first, second]: [u32; 2] = read(packet, offset)?;
        let [source, destination]: [Address; 2] = read(packet, offset + 8)?;
        if first.to_ne_bytes()[0] >> 4 != 6 {
            return Err(DropReason::Malformed);
        }
        (source, destination, second.to_ne_bytes()[2])
    } else {
        let [first, second, third, source, destination]: [u32; 5] = read(packet, offset)?;
        let [_, _, fragment_high, fragment_low] = second.to_ne_bytes();
        let version_and_length = first.to_ne_bytes()[0];
        if version_and_length >> 4 != 4 || version_and_length & 0x0f < 5 {
            return Err(DropReason::Malformed);
        }
        let later_fragment = u16::from_be_bytes([fragment_high, fragment_low]) & 0x1fff != 0;
        has_flow = !later_fragment && version_and_length & 0x0f == 5;
        let protocol = third.to_ne_bytes()[1];
        (from_ipv4(source), from_ipv4(destination), protocol)
    };
    let bytes: [u8; 8] = read(packet, offset + header_length)?;
    let mut source_port = u16::from_be_bytes([bytes[0], bytes[1]]);
    let mut destination_port = u16::from_be_bytes([bytes[2], bytes[3]]);
    match protocol {
        protocol::TCP | protocol::UDP => {}
        protocol::ICMP | protocol::ICMPV6 => {
            source_port = u16::from_be_bytes([bytes[4], bytes[5]]);
            has_flow &= matches!(
                (protocol, bytes[0]),
                (protocol::ICMP, icmp_type::ECHO_REQUEST)
                    | (protocol::ICMPV6, icmpv6_type::ECHO_REQUEST)
            );
        }
        _ => (source_port, destination_port) = (0, 0),
    }
    Ok(Quoted {
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        has_flow,
    })
}
