//! Changes of a map's words that other CPUs change at the same time. Uses no maps.

use core::arch::asm;

/// Puts `new` where `before` is; returns what was there.
#[inline(always)]
pub unsafe fn compare_exchange(at: *mut u64, before: u64, new: u64) -> u64 {
    let found;
    // SAFETY: the caller has a word of a map's value. Rust has no atomics for this target; the
    // instruction is there since Linux 5.12.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({at} + 0, r0, {new})",
            at = in(reg) at,
            new = in(reg) new,
            inout("r0") before => found,
        );
    }
    found
}

/// Adds to what is there.
#[inline(always)]
pub unsafe fn fetch_add(at: *mut u64, more: u64) {
    // SAFETY: see `compare_exchange`.
    unsafe {
        asm!("lock *(u64 *)({at} + 0) += {more}", at = in(reg) at, more = in(reg) more);
    }
}
