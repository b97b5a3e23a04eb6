//! Keelson's tc programs: what a guest may send, and what may reach it.
//!
//! `from_guest` runs at the ingress hook of a guest's TAP device (TCX or clsact), `to_guest` at its
//! egress hook. Both look the interface up in `POLICIES` and let packets of established flows pass; about all others
//! `judge_from_guest` and `judge_to_guest` decide. Whatever is not expressly allowed is dropped and counted, a packet
//! of an interface without a policy first of all.
//!
//! What belongs to a service, other programs go on with: `service_from_guest` and then `from_client`
//! with what goes to it, `service_to_guest` with what answers. `service_from_host` and
//! `service_to_host` do the same for the host, at the hooks of a network's bridge.
//!
//! `to_uplink` and `from_uplink` run at the egress and ingress hooks of the devices by which guests reach
//! the outside, and translate addresses. What may be for a guest of another host `to_peer` goes on with, and
//! `from_tunnel` is at the ingress hook of the device by which other hosts are reached.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod atomic;
mod backends;
mod capture;
mod clock;
mod counters;
mod established;
mod events;
mod flows;
mod fragments;
mod frame;
mod from_client;
mod from_guest;
mod hairpin;
mod host_side;
mod ip;
mod limits;
mod mappings;
mod maps;
mod neighbour_discovery;
mod questions;
mod rules;
mod services;
mod stations;
mod to_guest;
mod translate;
mod transport;
mod tunnel;
mod uplink;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{Direction, DropReason, NOT_DROPPED, PolicyEntry, stage};

use crate::mappings::Refused;

/// `BPF_F_INGRESS` of `bpf_redirect`.
const BACK: u64 = 1;

/// Where a packet that passed goes.
pub enum Passed {
    /// On its way through the host.
    On,
    /// Out of the interface with this index.
    To(u32),
    /// To the host's agent, and nowhere else.
    ToAgent,
    /// Into the interface with this index, as if it came from there.
    Back(u32),
}

/// Lets a packet that a guest sent pass if it is of an established flow; `judge_from_guest` decides about all others.
#[classifier]
pub fn from_guest(packet: TcContext) -> i32 {
    pass_established(&packet, Direction::FromGuest, stage::JUDGE_FROM_GUEST)
}

/// Lets a packet on its way to a guest pass if it is of an established flow; `judge_to_guest` decides about all
/// others.
#[classifier]
pub fn to_guest(packet: TcContext) -> i32 {
    pass_established(&packet, Direction::ToGuest, stage::JUDGE_TO_GUEST)
}

/// Decides about a packet that a guest sent.
#[classifier]
pub fn judge_from_guest(packet: TcContext) -> i32 {
    enforce(&packet, Direction::FromGuest, from_guest::decide)
}

/// Decides about a packet on its way to a guest.
#[classifier]
pub fn judge_to_guest(packet: TcContext) -> i32 {
    enforce(&packet, Direction::ToGuest, to_guest::decide)
}

/// Translates a packet that a guest sends to a service.
#[classifier]
pub fn service_from_guest(packet: TcContext) -> i32 {
    go_on(&packet, Direction::FromGuest, from_client::translate)
}

/// Decides about a packet that a guest sent to a service, translated.
#[classifier]
pub fn from_client(packet: TcContext) -> i32 {
    go_on(&packet, Direction::FromGuest, from_client::decide)
}

/// Translates a packet of a service that may reach its client.
#[classifier]
pub fn service_to_guest(packet: TcContext) -> i32 {
    go_on(&packet, Direction::ToGuest, from_client::answer)
}

/// Translates a packet that leaves a network's bridge for a service.
#[classifier]
pub fn service_from_host(packet: TcContext) -> i32 {
    // SAFETY: as of policies, see `enforce`.
    let gateway = unsafe { maps::GATEWAYS.get(frame::ifindex(&packet)) };
    match gateway.map(|gateway| host_side::from_host(&packet, gateway)) {
        None => TC_ACT_UNSPEC,
        Some(Ok(passed)) => pass(passed),
        Some(Err(reason)) => {
            counters::count_dropped(0, Direction::ToGuest, packet.len(), reason);
            let bridge = frame::ifindex(&packet);
            events::report_dropped(&packet, bridge, Direction::ToGuest, reason);
            TC_ACT_SHOT
        }
    }
}

/// Translates a packet that a backend answers the host with. What may be for a guest's port of an uplink's
/// address, `turn_back` goes on with.
#[classifier]
pub fn service_to_host(packet: TcContext) -> i32 {
    // SAFETY: as of policies, see `enforce`.
    let gateway = unsafe { maps::GATEWAYS.get(frame::ifindex(&packet)) };
    let Some(gateway) = gateway else {
        return TC_ACT_UNSPEC;
    };
    // What can't be read is no service's, and for the host to refuse.
    host_side::to_host(&packet, gateway).map_or(TC_ACT_UNSPEC, pass)
}

/// Translates a packet that leaves by an uplink.
#[classifier]
pub fn to_uplink(packet: TcContext) -> i32 {
    let length = packet.len();
    match uplink::to_uplink(&packet) {
        Ok(None) => {}
        Ok(Some(translated)) => {
            counters::count_translated(translated.pool, Direction::FromGuest, length);
        }
        Err(refused) => return refuse(&packet, &refused),
    }
    TC_ACT_UNSPEC
}

/// Gives the port that a guest sends from an external one.
#[classifier]
pub fn claim_port(packet: TcContext) -> i32 {
    match mappings::claim(&packet) {
        None => TC_ACT_SHOT,
        Some(refused) => refuse(&packet, &refused),
    }
}

/// Drops what a guest sent to an uplink; its interface's counters say so.
#[inline(always)]
fn refuse(packet: &TcContext, refused: &Refused) -> i32 {
    let direction = Direction::FromGuest;
    let Refused { reason, ifindex } = *refused;
    counters::count_dropped(ifindex, direction, packet.len(), reason);
    events::report_dropped(packet, ifindex, direction, reason);
    TC_ACT_SHOT
}

/// Sends a guest's packet to the uplink's address to the guest whose port it is for.
#[classifier]
pub fn turn_back(packet: TcContext) -> i32 {
    match hairpin::turn(&packet) {
        Ok(None) => TC_ACT_UNSPEC,
        Ok(Some(passed)) => pass(passed),
        Err(refused) => refuse(&packet, &refused),
    }
}

/// Translates a packet that comes from an uplink.
#[classifier]
pub fn from_uplink(packet: TcContext) -> i32 {
    let length = packet.len();
    if let Some(translated) = uplink::from_uplink(&packet) {
        counters::count_translated(translated.pool, Direction::ToGuest, length);
    }
    TC_ACT_UNSPEC
}

/// Sends a packet that may leave a guest to the host that has its destination, if another one has.
#[classifier]
pub fn to_peer(packet: TcContext) -> i32 {
    go_on(&packet, Direction::FromGuest, tunnel::send)
}

/// Delivers a packet from another host to a guest of this one, and nowhere else.
#[classifier]
pub fn from_tunnel(packet: TcContext) -> i32 {
    match tunnel::receive(&packet) {
        Ok(passed) => pass(passed),
        Err(reason) => {
            let (ifindex, direction) = (frame::ifindex(&packet), Direction::ToGuest);
            counters::count_dropped(ifindex, direction, packet.len(), reason);
            events::report_dropped(&packet, ifindex, direction, reason);
            TC_ACT_SHOT
        }
    }
}

/// Lets a packet of an established flow pass, or else goes on with another program: the verifier goes through all
/// ways through this one once more for each way that leads out of here.
#[inline(always)]
fn pass_established(packet: &TcContext, direction: Direction, stage: u32) -> i32 {
    let Some(policy) = policy(packet) else {
        return without_policy(packet, direction);
    };
    if let Some(passed) = established::pass(packet, policy, direction) {
        counters::count_passed(policy.slot, direction, packet.len());
        return pass(passed);
    }
    let reason = services::go_on(packet, stage);
    counters::count_dropped(frame::ifindex(packet), direction, packet.len(), reason);
    TC_ACT_SHOT
}

/// Runs `decide` with the interface's policy, counts what it says, and does it.
///
/// A packet that goes on gets `TC_ACT_UNSPEC` (`TCX_NEXT`): programs that others attached behind
/// these still see it, and none of them can pass what was dropped here.
#[inline(always)]
fn enforce(
    packet: &TcContext,
    direction: Direction,
    decide: impl FnOnce(&TcContext, &PolicyEntry) -> Result<Passed, DropReason>,
) -> i32 {
    go_on(packet, direction, |packet, policy| {
        capture::begin(packet, policy);
        decide(packet, policy)
    })
}

/// As [`enforce`], about a packet that another program was given first.
#[inline(always)]
fn go_on(
    packet: &TcContext,
    direction: Direction,
    decide: impl FnOnce(&TcContext, &PolicyEntry) -> Result<Passed, DropReason>,
) -> i32 {
    let Some(policy) = policy(packet) else {
        return without_policy(packet, direction);
    };
    let ifindex = frame::ifindex(packet);
    let length = packet.len();
    let decided = decide(packet, policy).and_then(|passed| {
        limits::charge(packet, policy, direction)?;
        if matches!(passed, Passed::ToAgent) {
            questions::ask(packet, policy)?;
        }
        Ok(passed)
    });
    match decided {
        Ok(passed) => {
            counters::count_passed(policy.slot, direction, length);
            capture::end(packet, policy, direction, length, NOT_DROPPED);
            pass(passed)
        }
        Err(reason) => {
            counters::count_dropped(ifindex, direction, length, reason);
            events::report_dropped(packet, ifindex, direction, reason);
            capture::end(packet, policy, direction, length, reason as u8);
            TC_ACT_SHOT
        }
    }
}

/// What is enforced at the interface.
#[inline(always)]
fn policy(packet: &TcContext) -> Option<&'static PolicyEntry> {
    // SAFETY: the host replaces entries as a whole and waits for running programs before it
    // changes the map again, so the entry stays what it is for as long as this program runs.
    unsafe { maps::POLICIES.get(frame::ifindex(packet)) }
}

/// Nothing passes.
#[inline(always)]
fn without_policy(packet: &TcContext, direction: Direction) -> i32 {
    let reason = DropReason::NoPolicy;
    counters::count_dropped(frame::ifindex(packet), direction, packet.len(), reason);
    TC_ACT_SHOT
}

#[inline(always)]
fn pass(passed: Passed) -> i32 {
    match passed {
        Passed::On => TC_ACT_UNSPEC,
        Passed::ToAgent => TC_ACT_SHOT,
        // SAFETY: the helper takes two numbers; an index that is gone drops the packet.
        Passed::To(ifindex) => unsafe { bpf_redirect(ifindex, 0) as i32 },
        // SAFETY: as above.
        Passed::Back(ifindex) => unsafe { bpf_redirect(ifindex, BACK) as i32 },
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
