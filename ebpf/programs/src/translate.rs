//! Gives packets of services and of source NAT their other ends, with checksums right whoever completes them: what the
//! kernel or a device still has to sum up stays so, and segmentation offloads are left as they are.
//! Uses no maps.

use aya_ebpf::helpers::generated::bpf_csum_diff;
use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{Address, DropReason, Translation};
use network_types::eth::EthHdr;
use network_types::ip::Ipv4Hdr;

use crate::frame::read;
use crate::ip::{IPV6_LEN, Ip, protocol};

/// `BPF_F_RECOMPUTE_CSUM`: of IPv6 no header sum makes up for other addresses, where a device has summed
/// up the whole packet.
const SUM_ADDRESSES: u64 = 1;
/// `BPF_F_INVALIDATE_HASH`: what the kernel made of the old ends is no longer so.
const INVALIDATE_HASH: u64 = 1 << 1;
/// `BPF_F_PSEUDO_HDR`: the pseudo header changes, which is in sums that are still incomplete.
const PSEUDO_HEADER: u64 = 1 << 4;
/// `BPF_F_MARK_MANGLED_0`: a UDP sum of zero is none (RFC 768).
const ZERO_IS_NONE: u64 = 1 << 5;
/// Size of what changes, for a sum of words.
const WORD: u64 = 4;
/// As [`WORD`], of half a word.
const HALF_WORD: u64 = 2;

const IPV4_CHECKSUM: usize = 10;
const IPV4_SOURCE: usize = 12;
const IPV6_SOURCE: usize = 8;
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const ICMP_CHECKSUM: usize = 2;
const ICMP_LEN: usize = 8;
const ECHO_IDENTIFIER: usize = 4;

/// Gives a packet, or a fragment of one, the ends of `translation`.
#[inline(always)]
pub fn packet(frame: &TcContext, ip: &Ip, translation: &Translation) -> Result<(), DropReason> {
    let change = addresses(frame, ip, translation.source, translation.destination)?;
    if ip.fragment_offset != 0 {
        return Ok(());
    }
    let (at, flags) = match ip.protocol {
        protocol::TCP => (ip.offset + TCP_CHECKSUM, 0),
        protocol::ICMP | protocol::ICMPV6 => return echo(frame, ip, change, translation),
        _ => (ip.offset + UDP_CHECKSUM, ZERO_IS_NONE),
    };
    let old = ip.first[0];
    let new = port_word(translation.source_port, translation.destination_port);
    frame
        .l4_csum_replace(at, 0, change, flags | PSEUDO_HEADER)
        .and_then(|()| frame.l4_csum_replace(at, old.into(), new.into(), flags | WORD))
        .and_then(|()| frame.store(ip.offset, &new, INVALIDATE_HASH))
        .map_err(|_| DropReason::Malformed)
}

/// Gives an ICMP echo, whose addresses changed a sum by `change`, an identifier.
#[inline(always)]
fn echo(
    frame: &TcContext,
    ip: &Ip,
    change: u64,
    translation: &Translation,
) -> Result<(), DropReason> {
    let sum = ip.offset + ICMP_CHECKSUM;
    let old = ip.first[1];
    let [_, _, c, d] = old.to_ne_bytes();
    let [a, b] = translation.source_port.to_be_bytes();
    let new = u32::from_ne_bytes([a, b, c, d]);
    if ip.is_ipv6 {
        frame
            .l4_csum_replace(sum, 0, change, PSEUDO_HEADER)
            .map_err(|_| DropReason::Malformed)?;
    }
    frame
        .l4_csum_replace(sum, old.into(), new.into(), WORD)
        .and_then(|()| frame.store(ip.offset + ECHO_IDENTIFIER, &new, INVALIDATE_HASH))
        .map_err(|_| DropReason::Malformed)
}

/// Gives an ICMP error the source `source` and the destination of `translation`, and the packet that
/// it quotes, an ICMP echo or not, which went the other way, the same ends.
#[inline(always)]
pub fn error(
    frame: &TcContext,
    ip: &Ip,
    source: Address,
    translation: &Translation,
    is_echo: bool,
) -> Result<(), DropReason> {
    let change = addresses(frame, ip, source, translation.destination)?;
    let sum = ip.offset + ICMP_CHECKSUM;
    if ip.is_ipv6 {
        frame
            .l4_csum_replace(sum, 0, change, PSEUDO_HEADER)
            .map_err(|_| DropReason::Malformed)?;
        quoted_ipv6(frame, ip, translation, is_echo)?;
    } else {
        quoted_ipv4(frame, ip, translation, is_echo)?;
    }
    if !is_echo {
        return Ok(());
    }
    let header = if ip.is_ipv6 { IPV6_LEN } else { Ipv4Hdr::LEN };
    let at = ip.offset + ICMP_LEN + header + ECHO_IDENTIFIER;
    let [old]: [u16; 1] = read(frame, at)?;
    let new = translation.destination_port.to_be();
    frame
        .l4_csum_replace(sum, old.into(), new.into(), HALF_WORD)
        .and_then(|()| frame.store(at, &new, 0))
        .map_err(|_| DropReason::Malformed)
}

/// Of the quoted packet, the IP header and the ports: the four bytes behind them are left alone, for
/// whoever gets the error doesn't look at them.
#[inline(always)]
fn quoted_ipv4(
    frame: &TcContext,
    ip: &Ip,
    translation: &Translation,
    is_echo: bool,
) -> Result<(), DropReason> {
    let at = ip.offset + ICMP_LEN;
    let [from, to] = [translation.destination[3], translation.source[3]];
    let mut old: [u32; 3] = read(frame, at + IPV4_SOURCE)?;
    let ports = quoted_ports(translation, is_echo, old[2]);
    let mut new = [from, to, ports];
    let change = difference(&mut old, &mut new);
    let mut old_ends = [old[0], old[1]];
    let mut new_ends = [from, to];
    let header = difference(&mut old_ends, &mut new_ends);
    let [old_sum]: [u16; 1] = read(frame, at + IPV4_CHECKSUM)?;
    let sum = ip.offset + ICMP_CHECKSUM;
    frame
        .l3_csum_replace(at + IPV4_CHECKSUM, 0, header, 0)
        .and_then(|()| frame.store(at + IPV4_SOURCE, &new, INVALIDATE_HASH))
        .and_then(|()| frame.l4_csum_replace(sum, 0, change, 0))
        .map_err(|_| DropReason::Malformed)?;
    let [new_sum]: [u16; 1] = read(frame, at + IPV4_CHECKSUM)?;
    frame
        .l4_csum_replace(sum, old_sum.into(), new_sum.into(), HALF_WORD)
        .map_err(|_| DropReason::Malformed)
}

#[inline(always)]
fn quoted_ipv6(
    frame: &TcContext,
    ip: &Ip,
    translation: &Translation,
    is_echo: bool,
) -> Result<(), DropReason> {
    let at = ip.offset + ICMP_LEN + IPV6_SOURCE;
    let [a, b, c, d] = translation.destination;
    let [e, f, g, h] = translation.source;
    let mut old: [u32; 9] = read(frame, at)?;
    let ports = quoted_ports(translation, is_echo, old[8]);
    let mut new = [a, b, c, d, e, f, g, h, ports];
    let change = difference(&mut old, &mut new);
    frame
        .store(at, &new, INVALIDATE_HASH)
        .and_then(|()| frame.l4_csum_replace(ip.offset + ICMP_CHECKSUM, 0, change, 0))
        .map_err(|_| DropReason::Malformed)
}

/// What the first word behind the quoted IP header becomes: ports, or the same type and code as `before`.
#[inline(always)]
fn quoted_ports(translation: &Translation, is_echo: bool, before: u32) -> u32 {
    if is_echo {
        return before;
    }
    port_word(translation.destination_port, translation.source_port)
}

/// Writes the addresses of the IP header; returns by what they change a sum over them.
#[inline(always)]
fn addresses(
    frame: &TcContext,
    ip: &Ip,
    source: Address,
    destination: Address,
) -> Result<u64, DropReason> {
    // IPv4's are mapped to IPv6's, which changes nothing about the difference.
    let [a, b, c, d] = ip.source;
    let [e, f, g, h] = ip.destination;
    let mut old = [a, b, c, d, e, f, g, h];
    let [a, b, c, d] = source;
    let [e, f, g, h] = destination;
    let mut new = [a, b, c, d, e, f, g, h];
    let change = difference(&mut old, &mut new);
    let stored = if ip.is_ipv6 {
        let flags = INVALIDATE_HASH | SUM_ADDRESSES;
        frame.store(EthHdr::LEN + IPV6_SOURCE, &new, flags)
    } else {
        let both = [source[3], destination[3]];
        frame
            .l3_csum_replace(EthHdr::LEN + IPV4_CHECKSUM, 0, change, 0)
            .and_then(|()| frame.store(EthHdr::LEN + IPV4_SOURCE, &both, INVALIDATE_HASH))
    };
    const { assert!(Ipv4Hdr::LEN == IPV4_SOURCE + 8) };
    stored.map_err(|_| DropReason::Malformed)?;
    Ok(change)
}

/// What `new` instead of `old` adds to a sum (RFC 1624).
#[inline(always)]
fn difference<const N: usize>(old: &mut [u32; N], new: &mut [u32; N]) -> u64 {
    let size = (N * 4) as u32;
    // SAFETY: both are words of the given size, on the stack.
    let change = unsafe { bpf_csum_diff(old.as_mut_ptr(), size, new.as_mut_ptr(), size, 0) };
    u64::from(change as u32)
}

/// Two ports as they begin a transport header.
#[inline(always)]
pub fn port_word(source: u16, destination: u16) -> u32 {
    let ([a, b], [c, d]) = (source.to_be_bytes(), destination.to_be_bytes());
    u32::from_ne_bytes([a, b, c, d])
}
