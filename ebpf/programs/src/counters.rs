//! Counts packets and bytes per interface, direction and outcome (map `COUNTERS`).

use core::hint::black_box;

use keelson_ebpf_common::{CounterKey, Direction, DropReason, REASON_SLOTS};

use crate::maps::COUNTERS;

/// Adds a packet of `length` bytes to the interface's counters, or to those of interface zero if it
/// has none.
#[inline(always)]
pub fn count(
    ifindex: u32,
    direction: Direction,
    length: u32,
    decision: Result<(), DropReason>,
) {
    let direction = direction as u32;
    let tallies = COUNTERS
        .get_ptr_mut(CounterKey { ifindex, direction })
        .or_else(|| {
            COUNTERS.get_ptr_mut(CounterKey {
                ifindex: 0,
                direction,
            })
        });
    let Some(tallies) = tallies else { return };
    // SAFETY: the map is per CPU and the tc hooks run with preemption off: no one else writes.
    let tallies = unsafe { &mut *tallies };
    let tally = match decision {
        Ok(()) => &mut tallies.passed,
        // The compiler knows that a reason is less than the number of slots and leaves out the
        // bounds check; the verifier no longer knows, once the reason was packed into other bits.
        // A mask of an opaque number convinces both, on every kernel.
        Err(reason) => match tallies
            .dropped
            .get_mut(black_box(reason.slot()) & (REASON_SLOTS - 1))
        {
            Some(tally) => tally,
            None => return,
        },
    };
    tally.packets += 1;
    tally.bytes += u64::from(length);
}
