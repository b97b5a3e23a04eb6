//! Keelson's tc programs: what a guest may send, and what may reach it.
//!
//! `from_guest` runs at the ingress hook of a guest's TAP device (TCX or clsact), `to_guest` at its
//! egress hook. Both look the interface up in `POLICIES`, decide, and count. Whatever is not
//! expressly allowed is dropped, a packet of an interface without a policy first of all.
#![no_std]
#![no_main]

mod counters;
mod flows;
mod fragments;
mod frame;
mod from_guest;
mod maps;
mod rules;
mod to_guest;
mod transport;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{Direction, DropReason, PolicyEntry};

/// Decides about a packet that a guest sent.
#[classifier]
pub fn from_guest(packet: TcContext) -> i32 {
    enforce(&packet, Direction::FromGuest, from_guest::decide)
}

/// Decides about a packet on its way to a guest.
#[classifier]
pub fn to_guest(packet: TcContext) -> i32 {
    enforce(&packet, Direction::ToGuest, to_guest::decide)
}

/// Runs `decide` with the interface's policy and counts what it says.
///
/// A passed packet gets `TC_ACT_UNSPEC` (`TCX_NEXT`): programs that others attached behind these
/// still see it, and none of them can pass what was dropped here.
#[inline(always)]
fn enforce(
    packet: &TcContext,
    direction: Direction,
    decide: impl FnOnce(&TcContext, &PolicyEntry) -> Result<(), DropReason>,
) -> i32 {
    let ifindex = frame::ifindex(packet);
    // SAFETY: the host replaces entries as a whole and waits for running programs before it
    // changes the map again, so the entry stays what it is for as long as this program runs.
    let policy = unsafe { maps::POLICIES.get(ifindex) };
    let decision = match policy {
        Some(policy) => decide(packet, policy),
        None => Err(DropReason::NoPolicy),
    };
    counters::count(ifindex, direction, packet.len(), decision);
    if decision.is_ok() {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

/// The programs use no helper that the kernel keeps for GPL-compatible ones.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses endless loops: that this program loads proves that nothing panics.
    loop {}
}
