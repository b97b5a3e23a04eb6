//! Counts packets and bytes per interface, direction and outcome (maps `PASSED`, `DROPPED`), and per
//! rule (map `ALLOWED`) and service (map `SERVED`).

use core::hint::black_box;

use keelson_ebpf_common::{
    CounterKey, Direction, DropReason, NO_ADDRESS, REASON_SLOTS, RuleKey, ServedKey, UNCOUNTED,
    passed_index, served,
};

use crate::maps::{ALLOWED, DROPPED, PASSED, SERVED, TRANSLATED, TUNNELLED};

/// Adds a packet of `length` bytes that goes on.
#[inline(always)]
pub fn count_passed(slot: u32, direction: Direction, length: u32) {
    let Some(tally) = PASSED.get_ptr_mut(passed_index(slot, direction)) else {
        return;
    };
    // SAFETY: the map is per CPU and the tc hooks run with preemption off: no one else writes.
    let tally = unsafe { &mut *tally };
    tally.packets += 1;
    tally.bytes += u64::from(length);
}

/// Adds a packet of `length` bytes that was translated at an uplink.
#[inline(always)]
pub fn count_translated(pool: u32, direction: Direction, length: u32) {
    let Some(tally) = TRANSLATED.get_ptr_mut(passed_index(pool, direction)) else {
        return;
    };
    // SAFETY: see `count_passed`.
    let tally = unsafe { &mut *tally };
    tally.packets += 1;
    tally.bytes += u64::from(length);
}

/// Adds a packet of `length` bytes to or from another host.
#[inline(always)]
pub fn count_tunnelled(direction: Direction, length: u32) {
    let Some(tally) = TUNNELLED.get_ptr_mut(direction as u32) else {
        return;
    };
    // SAFETY: see `count_passed`.
    let tally = unsafe { &mut *tally };
    tally.packets += 1;
    tally.bytes += u64::from(length);
}

/// Adds a packet of `length` bytes between a service's client and a backend, or to those of others if this
/// one has no counters.
#[inline(always)]
pub fn count_served(key: &mut ServedKey, is_answer: bool, length: u32) {
    let mut served = SERVED.get_ptr_mut(&*key);
    if served.is_none() {
        key.backend = NO_ADDRESS;
        key.kind = served::OTHERS;
        served = SERVED.get_ptr_mut(&*key);
    }
    let Some(served) = served else { return };
    // SAFETY: see `count_passed`.
    let served = unsafe { &mut *served };
    let tally = if is_answer {
        &mut served.from_backend
    } else {
        &mut served.to_backend
    };
    tally.packets += 1;
    tally.bytes += u64::from(length);
}

/// Adds a packet of `length` bytes that a rule with this counter allowed: no packet of a flow that
/// exists, so that this costs once for each flow.
#[inline(always)]
pub fn count_allowed(slot: u32, direction: Direction, counter: u64, length: u32) {
    if counter == UNCOUNTED {
        return;
    }
    let direction = direction as u32;
    let Some(tally) = ALLOWED.get_ptr_mut(RuleKey {
        slot,
        direction,
        counter,
    }) else {
        return;
    };
    // SAFETY: see `count_passed`.
    let tally = unsafe { &mut *tally };
    tally.packets += 1;
    tally.bytes += u64::from(length);
}

/// Adds a packet of `length` bytes that is dropped, to interface zero if this one has no counters.
#[inline(always)]
pub fn count_dropped(ifindex: u32, direction: Direction, length: u32, reason: DropReason) {
    let direction = direction as u32;
    let tallies = DROPPED
        .get_ptr_mut(CounterKey { ifindex, direction })
        .or_else(|| {
            DROPPED.get_ptr_mut(CounterKey {
                ifindex: 0,
                direction,
            })
        });
    let Some(tallies) = tallies else { return };
    // SAFETY: see `count_passed`.
    let tallies = unsafe { &mut *tallies };
    // The compiler knows that a reason is less than the number of slots and leaves out the bounds
    // check; the verifier no longer knows, once the reason was packed into other bits. A mask of an
    // opaque number convinces both, on every kernel.
    let slot = black_box(reason.slot()) & (REASON_SLOTS - 1);
    let Some(tally) = tallies.dropped.get_mut(slot) else {
        return;
    };
    tally.packets += 1;
    tally.bytes += u64::from(length);
}
