//! Lets later fragments follow a first fragment that passed (map `FRAGMENTS`).
//!
//! Only a first fragment has ports, so it alone is judged by the rules; the others pass if they come
//! after it, in time. One that would rewrite a part of the first is refused (RFC 3128, RFC 5722).

use keelson_ebpf_common::{
    Direction, DropReason, FragmentKey, FragmentState, PolicyEntry, timeout,
};

use crate::clock;
use crate::flows::Ends;
use crate::ip::Ip;
use crate::maps::FRAGMENTS;

#[inline(always)]
fn key(ends: &Ends, ip: &Ip, direction: Direction) -> FragmentKey {
    FragmentKey {
        peer: ends.peer,
        identification: ip.identification,
        protocol: if ip.is_ipv6 { 0 } else { ip.protocol },
        direction: direction as u8,
        local: ends.local,
        reserved: 0,
    }
}

/// A fragment that is not the first: passes after a first one that did. Whether that was translated.
#[inline(always)]
pub fn follow(
    policy: &PolicyEntry,
    ends: &Ends,
    ip: &Ip,
    direction: Direction,
) -> Result<bool, DropReason> {
    let Some(fragments) = FRAGMENTS.get(policy.slot) else {
        return Err(DropReason::Fragment);
    };
    // SAFETY: reads aligned numbers; an entry that was evicted meanwhile gives others, which at
    // worst let a fragment pass that can't be reassembled.
    let first = unsafe { fragments.get(key(ends, ip, direction)) };
    let now = clock::now();
    match first {
        Some(first)
            if now.wrapping_sub(first.first_seen_ns) < timeout::FRAGMENTS
                && ip.fragment_offset >= first.first_end =>
        {
            Ok(first.translated != 0)
        }
        _ => Err(DropReason::Fragment),
    }
}

/// Notes that a packet passed, if it is a first fragment.
#[inline(always)]
pub fn note(policy: &PolicyEntry, ends: &Ends, ip: &Ip, direction: Direction, translated: bool) {
    if !ip.more_fragments {
        return;
    }
    let Some(fragments) = FRAGMENTS.get(policy.slot) else {
        return;
    };
    let state = FragmentState {
        first_seen_ns: clock::now(),
        first_end: ip.fragment_length,
        translated: translated.into(),
    };
    // Without memory for it the other fragments are dropped, which is the safe outcome.
    let _ = fragments.insert(key(ends, ip, direction), state, 0);
}
