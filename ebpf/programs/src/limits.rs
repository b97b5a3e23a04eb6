//! Lets no more pass than an interface's limits (maps `LIMITS`, `BUCKETS`); see
//! `keelson_ebpf_common::Limit` for how.
//!
//! CPUs share a bucket: what is charged is never lost, so that the average is exact. They look before
//! they charge, so that each of them may let one packet more into a burst.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    BYTE_COST_BITS, Bucket, Direction, DropReason, HORIZON, PolicyEntry, TICKS_PER_NS, flag,
    passed_index,
};

use crate::atomic::{compare_exchange, fetch_add};
use crate::maps::{BUCKETS, LIMITS};

/// How often a charge is tried again that another CPU came before.
const TRIES: u32 = 4;

/// Charges a packet that would go on, or refuses it.
#[inline(always)]
pub fn charge(
    packet: &TcContext,
    policy: &PolicyEntry,
    direction: Direction,
) -> Result<(), DropReason> {
    let limited = match direction {
        Direction::FromGuest => flag::LIMITED_FROM_GUEST,
        Direction::ToGuest => flag::LIMITED_TO_GUEST,
    };
    if policy.flags & limited == 0 {
        return Ok(());
    }
    let index = passed_index(policy.slot, direction);
    let (Some(limit), Some(bucket)) = (LIMITS.get(index), BUCKETS.get_ptr_mut(index)) else {
        return Ok(());
    };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() }.wrapping_mul(TICKS_PER_NS);
    // SAFETY: two fields of a map's value, which stays readable and writable while the program runs;
    // all access to them is by aligned words, and all changes are atomic.
    let (bytes_paid, packets_paid) = unsafe { paid(bucket) };
    if ahead(bytes_paid, now) > limit.burst || ahead(packets_paid, now) > limit.burst {
        return Err(DropReason::RateLimited);
    }
    if limit.byte_cost != 0 {
        let cost = u64::from(packet.len()).wrapping_mul(limit.byte_cost) >> BYTE_COST_BITS;
        add(bytes_paid, now, cost);
    }
    if limit.packet_cost != 0 {
        add(
            packets_paid,
            now,
            segments(packet).wrapping_mul(limit.packet_cost),
        );
    }
    Ok(())
}

#[inline(always)]
unsafe fn paid(bucket: *mut Bucket) -> (*mut u64, *mut u64) {
    // SAFETY: the caller has a valid bucket.
    unsafe {
        (
            &raw mut (*bucket).bytes_paid,
            &raw mut (*bucket).packets_paid,
        )
    }
}

/// Packets on the wire: those that the kernel will cut a large one into.
#[inline(always)]
fn segments(packet: &TcContext) -> u64 {
    // SAFETY: the kernel gives the program a valid context.
    let segments = unsafe { (*packet.skb.skb).gso_segs };
    u64::from(segments.max(1))
}

/// How far ahead of now a time is; zero if it has passed.
#[inline(always)]
fn ahead(paid: *mut u64, now: u64) -> u64 {
    // SAFETY: see `charge`; others change it meanwhile.
    let ahead = unsafe { paid.read_volatile() }.wrapping_sub(now);
    if ahead > HORIZON { 0 } else { ahead }
}

#[inline(always)]
fn add(paid: *mut u64, now: u64, cost: u64) {
    for _ in 0..TRIES {
        // SAFETY: see `charge`.
        let before = unsafe { paid.read_volatile() };
        let ahead = before.wrapping_sub(now);
        let from = if ahead > HORIZON { now } else { before };
        // SAFETY: see `charge`.
        if unsafe { compare_exchange(paid, before, from.wrapping_add(cost)) } == before {
            return;
        }
    }
    // Others charge at this moment, so that it is ahead of now: nothing but the cost is to be added.
    // SAFETY: see `charge`.
    unsafe { fetch_add(paid, cost) };
}
