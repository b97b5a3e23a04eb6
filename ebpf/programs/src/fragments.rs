//! Lets later fragments follow a first fragment that passed (map `FRAGMENTS`).
//!
//! Only a first fragment has ports, so it alone is judged by the rules; the others pass if they come
//! after it, in time. One that would rewrite the TCP flags of the first is refused (RFC 3128).

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use keelson_ebpf_common::{Direction, DropReason, FragmentKey, PolicyEntry, timeout};

use crate::frame::Ipv4;
use crate::maps::FRAGMENTS;
use crate::transport::protocol;

#[inline(always)]
fn key(policy: &PolicyEntry, ip: &Ipv4, direction: Direction) -> FragmentKey {
    FragmentKey {
        interface_id: policy.interface_id,
        source: ip.header.src_addr,
        destination: ip.header.dst_addr,
        identification: ip.header.id,
        protocol: ip.header.proto,
        direction: direction as u8,
    }
}

/// A fragment that is not the first: passes after a first one that did.
#[inline(always)]
pub fn follow(policy: &PolicyEntry, ip: &Ipv4, direction: Direction) -> Result<(), DropReason> {
    if ip.fragment_offset == 1 && ip.header.proto == protocol::TCP {
        return Err(DropReason::Fragment);
    }
    // SAFETY: reads one aligned number; an entry that was evicted meanwhile gives another one,
    // which at worst lets a fragment pass that can't be reassembled.
    let first_seen = unsafe { FRAGMENTS.get(key(policy, ip, direction)) };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    match first_seen {
        Some(&first_seen) if now.wrapping_sub(first_seen) < timeout::FRAGMENTS => Ok(()),
        _ => Err(DropReason::Fragment),
    }
}

/// Notes that a packet passed, if it is a first fragment.
#[inline(always)]
pub fn note(policy: &PolicyEntry, ip: &Ipv4, direction: Direction) {
    if ip.more_fragments {
        // SAFETY: the helper has no preconditions.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        // Without memory for it the other fragments are dropped, which is the safe outcome.
        let _ = FRAGMENTS.insert(key(policy, ip, direction), now, 0);
    }
}
