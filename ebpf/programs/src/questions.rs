//! What a guest asks about its configuration goes to the host's agent, not to the bridge (maps
//! `QUESTIONS`, `QUESTION_TIMES`): DHCP, DHCPv6 and router solicitations. A few a second, so that no guest
//! keeps the agent busy. What the agent answers is known by its mark.

use core::hint::black_box;

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes};
use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    ANSWER_MARK, DropReason, PolicyEntry, QUESTION_BURST_NS, QUESTION_INTERVAL_NS, QUESTION_LIMIT,
    Question, flag,
};
use network_types::eth::EthHdr;
use network_types::udp::UdpHdr;

use crate::frame;
use crate::ip::{Ip, protocol};
use crate::maps::{QUESTION_TIMES, QUESTIONS};
use crate::transport::icmpv6_type;

/// A client's port and a server's, of UDP over IPv4 and IPv6 (RFC 2131, 4.1; RFC 8415, 7.2).
const DHCP: [u16; 2] = [68, 67];
const DHCPV6: [u16; 2] = [546, 547];

/// Whether a packet of a guest is for a DHCP server, and the agent is one.
#[inline(always)]
pub fn is_dhcp(policy: &PolicyEntry, ip: &Ip) -> bool {
    if policy.flags & flag::ANSWERS_DHCP == 0
        || ip.protocol != protocol::UDP
        || ip.is_fragment
        || ip.length < UdpHdr::LEN as u32
    {
        return false;
    }
    let [a, b, c, d] = ip.first[0].to_ne_bytes();
    let ports = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])];
    let dhcp = if ip.is_ipv6 { DHCPV6 } else { DHCP };
    ports[0] == dhcp[0] && ports[1] == dhcp[1]
}

/// Whether a message of neighbour discovery asks for a router, and the agent speaks for one.
#[inline(always)]
pub fn is_solicitation(policy: &PolicyEntry, ip: &Ip) -> bool {
    let [icmpv6_type, ..] = ip.first[0].to_ne_bytes();
    policy.flags & flag::ANSWERS_SOLICITATIONS != 0
        && icmpv6_type == icmpv6_type::ROUTER_SOLICITATION
}

/// Whether the agent sent a packet.
#[inline(always)]
pub fn is_answer(packet: &TcContext) -> bool {
    // SAFETY: the kernel gives the program a valid context.
    unsafe { (*packet.skb.skb).mark == ANSWER_MARK }
}

/// Gives the agent a copy of a frame; the frame itself goes nowhere.
#[inline(always)]
pub fn ask(packet: &TcContext, policy: &PolicyEntry) -> Result<(), DropReason> {
    // The verifier must see both bounds on the very number that the helper gets.
    let length = black_box(packet.len());
    if length > QUESTION_LIMIT as u32 {
        return Err(DropReason::Oversized);
    }
    if length < EthHdr::LEN as u32 {
        return Err(DropReason::Malformed);
    }
    charge(policy)?;
    // Without room for it, others ask too much.
    let mut entry = QUESTIONS
        .reserve::<Question>(0)
        .ok_or(DropReason::RateLimited)?;
    let question = entry.as_mut_ptr();
    // SAFETY: the entry has room for a question, which is written in place; its data has room for
    // `length` bytes.
    let is_copied = unsafe {
        (*question).ifindex = frame::ifindex(packet);
        (*question).length = length;
        let data = (&raw mut (*question).data).cast();
        bpf_skb_load_bytes(packet.skb.skb.cast(), 0, data, length) == 0
    };
    if is_copied {
        entry.submit(0);
        Ok(())
    } else {
        entry.discard(0);
        Err(DropReason::Malformed)
    }
}

/// Counts a question (GCRA, as for limits). CPUs that count at the same moment may count one.
#[inline(always)]
fn charge(policy: &PolicyEntry) -> Result<(), DropReason> {
    let Some(paid) = QUESTION_TIMES.get_ptr_mut(policy.slot) else {
        return Err(DropReason::NoPolicy);
    };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: an aligned word of a map's value, which stays readable and writable while the program runs.
    let until = unsafe { paid.read_volatile() }.max(now);
    if until - now > QUESTION_BURST_NS {
        return Err(DropReason::RateLimited);
    }
    // SAFETY: as above.
    unsafe { paid.write_volatile(until + QUESTION_INTERVAL_NS) };
    Ok(())
}
