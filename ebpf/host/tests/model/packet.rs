//! Reads IP packets as the standards describe them, one field after the other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use keelson_ebpf::DropReason;
use keelson_ebpf::DropReason::{ExtensionHeaders, IpOptions, Malformed};

/// An IPv4 or IPv6 packet up to its transport header.
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub hop_limit: u8,
    /// Where the transport header begins in the frame.
    pub offset: usize,
    /// Bytes from there to the end of the packet.
    pub length: usize,
    pub fragment: Option<Fragment>,
    pub identification: [u8; 4],
    /// If it is ICMPv6, whole or a first fragment, with a whole header.
    pub icmpv6_type: Option<u8>,
}

#[derive(Clone, Copy)]
pub struct Fragment {
    pub offset: u32,
    pub length: u32,
    pub more: bool,
}

#[allow(clippy::struct_excessive_bools)] // Flags, as the header has them.
pub struct Transport {
    pub ports: (u16, u16),
    pub rule_port: u16,
    /// Identifier, and whether it asks.
    pub echo: Option<(u16, bool)>,
    pub is_error: bool,
    /// SYN without ACK.
    pub syn: bool,
    pub fin: bool,
    pub rst: bool,
    pub can_open: bool,
}

/// What an ICMP error quotes: ends as address and port.
pub struct Quoted {
    pub source: (IpAddr, u16),
    pub destination: (IpAddr, u16),
    pub protocol: u8,
    pub echo: Option<u16>,
}

fn number(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

pub fn read(frame: &[u8]) -> Result<Packet, DropReason> {
    if number(&frame[12..]) == 0x0800 {
        read_ipv4(frame)
    } else {
        read_ipv6(frame)
    }
}

fn read_ipv4(frame: &[u8]) -> Result<Packet, DropReason> {
    let header = frame.get(14..34).ok_or(Malformed)?;
    if header[0] >> 4 != 4 || header[0] & 15 < 5 {
        return Err(Malformed);
    }
    if header[0] & 15 > 5 {
        return Err(IpOptions);
    }
    let total = usize::from(number(&header[2..]));
    let flags = number(&header[6..]);
    let offset = u32::from(flags & 0x1fff) * 8;
    if total < 20 || frame.len() < 14 + total || offset as usize + total > 65_535 {
        return Err(Malformed);
    }
    let more = flags & 0x2000 != 0;
    let length = total - 20;
    let fragment = Fragment {
        offset,
        length: u32::try_from(length).expect("16 bits"),
        more,
    };
    Ok(Packet {
        source: Ipv4Addr::from(<[u8; 4]>::try_from(&header[12..16]).expect("four")).into(),
        destination: Ipv4Addr::from(<[u8; 4]>::try_from(&header[16..20]).expect("four")).into(),
        protocol: header[9],
        hop_limit: header[8],
        offset: 34,
        length,
        fragment: (more || offset != 0).then_some(fragment),
        identification: [header[4], header[5], 0, 0],
        icmpv6_type: None,
    })
}

fn read_ipv6(frame: &[u8]) -> Result<Packet, DropReason> {
    let header = frame.get(14..54).ok_or(Malformed)?;
    let length = usize::from(number(&header[4..]));
    if header[0] >> 4 != 6 || length == 0 || frame.len() < 54 + length {
        return Err(Malformed);
    }
    let address =
        |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&header[at..at + 16]).expect("16"));
    let mut packet = Packet {
        source: address(8).into(),
        destination: address(24).into(),
        protocol: header[6],
        hop_limit: header[7],
        offset: 54,
        length,
        fragment: None,
        identification: [0; 4],
        icmpv6_type: None,
    };
    let mut headers = 0;
    while matches!(packet.protocol, 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140) {
        let is_refused = match packet.protocol {
            0 => headers != 0,
            44 => packet.fragment.is_some(),
            60 => false,
            _ => true,
        };
        if headers == 4 || is_refused {
            return Err(ExtensionHeaders);
        }
        headers += 1;
        packet.skip_extension_header(frame)?;
        if packet.fragment.is_some_and(|fragment| fragment.offset != 0) {
            return Ok(packet);
        }
    }
    if packet.protocol == 58 && packet.length >= 8 {
        packet.icmpv6_type = frame.get(packet.offset).copied();
    }
    Ok(packet)
}

impl Packet {
    fn skip_extension_header(&mut self, frame: &[u8]) -> Result<(), DropReason> {
        let header = frame.get(self.offset..self.offset + 8).ok_or(Malformed)?;
        let is_fragment_header = self.protocol == 44;
        let length = if is_fragment_header {
            8
        } else {
            (usize::from(header[1]) + 1) * 8
        };
        if self.length < length {
            return Err(Malformed);
        }
        self.protocol = header[0];
        self.offset += length;
        self.length -= length;
        if is_fragment_header {
            let field = number(&header[2..]);
            self.fragment = Some(Fragment {
                offset: u32::from(field & 0xfff8),
                length: u32::try_from(self.length).expect("16 bits"),
                more: field & 1 != 0,
            });
            self.identification = header[4..8].try_into().expect("four");
        }
        if let Some(fragment) = self.fragment
            && (fragment.offset as usize + self.length > 65_535
                || fragment.more && !self.length.is_multiple_of(8))
        {
            return Err(Malformed);
        }
        Ok(())
    }

    /// The transport header and what follows, up to the packet's end.
    pub fn payload<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        &frame[self.offset..self.offset + self.length]
    }

    /// Neighbour discovery and what belongs to it.
    pub fn is_housekeeping(&self) -> bool {
        self.icmpv6_type.is_some_and(super::is_housekeeping_type)
    }

    pub fn transport(&self, frame: &[u8]) -> Result<Transport, DropReason> {
        let bytes = &frame[self.offset..];
        let mut transport = Transport {
            ports: (0, 0),
            rule_port: 0,
            echo: None,
            is_error: false,
            syn: false,
            fin: false,
            rst: false,
            can_open: true,
        };
        match (self.protocol, self.source.is_ipv6()) {
            (6, _) => {
                let header = bytes.get(..14).ok_or(Malformed)?;
                let header_length = usize::from(header[12] >> 4) * 4;
                if header_length < 20 || self.length < header_length {
                    return Err(Malformed);
                }
                let flag = |bit: u8| header[13] & bit != 0;
                let (fin, syn, rst, ack) = (flag(1), flag(2), flag(4), flag(16));
                if syn && (fin || rst) || !(syn || rst || ack) {
                    return Err(Malformed);
                }
                transport.ports = (number(header), number(&header[2..]));
                transport.rule_port = transport.ports.1;
                transport.syn = syn && !ack;
                (transport.fin, transport.rst) = (fin, rst);
                transport.can_open = !fin && !rst;
            }
            (17, _) => {
                let header = bytes.get(..8).ok_or(Malformed)?;
                let length = usize::from(number(&header[4..]));
                let more = self.fragment.is_some_and(|fragment| fragment.more);
                if self.length < 8 || length < 8 || (!more && length > self.length) {
                    return Err(Malformed);
                }
                transport.ports = (number(header), number(&header[2..]));
                transport.rule_port = transport.ports.1;
            }
            (1, false) | (58, true) => {
                let header = bytes.get(..8).ok_or(Malformed)?;
                if self.length < 8 {
                    return Err(Malformed);
                }
                let asks = matches!((self.protocol, header[0]), (1, 8) | (58, 128));
                let answers = matches!((self.protocol, header[0]), (1, 0) | (58, 129));
                transport.rule_port = number(header);
                transport.echo = (asks || answers).then(|| (number(&header[4..]), asks));
                transport.is_error = match self.protocol {
                    1 => matches!(header[0], 3 | 11 | 12),
                    _ => header[0] < 128,
                };
                transport.can_open = asks;
            }
            (1, true) | (58, false) => return Err(Malformed),
            _ => {}
        }
        Ok(transport)
    }

    pub fn quoted(&self, frame: &[u8]) -> Result<Option<Quoted>, DropReason> {
        let header_length = if self.source.is_ipv6() { 40 } else { 20 };
        if self.length < 8 + header_length + 8 {
            return Err(Malformed);
        }
        let packet = &frame[self.offset + 8..];
        let address = |at: usize| -> IpAddr {
            if header_length == 40 {
                Ipv6Addr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).expect("16")).into()
            } else {
                Ipv4Addr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).expect("four")).into()
            }
        };
        let (source, destination, protocol, is_plain) = if header_length == 40 {
            if packet[0] >> 4 != 6 {
                return Err(Malformed);
            }
            (address(8), address(24), packet[6], true)
        } else {
            if packet[0] >> 4 != 4 || packet[0] & 15 < 5 {
                return Err(Malformed);
            }
            let offset = number(&packet[6..]) << 3;
            let is_first = offset == 0;
            let is_plain = is_first && packet[0] & 15 == 5;
            (address(12), address(16), packet[9], is_plain)
        };
        let bytes = &packet[header_length..header_length + 8];
        let (ports, echo) = match protocol {
            6 | 17 => ((number(bytes), number(&bytes[2..])), None),
            1 | 58 => ((0, 0), Some(number(&bytes[4..]))),
            _ => ((0, 0), None),
        };
        let asks = matches!((protocol, bytes[0]), (1, 8) | (58, 128));
        let can_belong = is_plain && (echo.is_none() || asks);
        Ok(can_belong.then_some(Quoted {
            source: (source, ports.0),
            destination: (destination, ports.1),
            protocol,
            echo,
        }))
    }
}
