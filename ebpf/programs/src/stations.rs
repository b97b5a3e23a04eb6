//! The other guests of a network on this host: what is for them is sent straight to them, and
//! questions for their Ethernet addresses are answered in place (maps `STATIONS`, `NEIGHBOURS`).

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{NeighbourKey, PolicyEntry, StationKey, flag, from_ipv4};
use network_types::arp::ArpHdr;
use network_types::eth::EthHdr;

use crate::maps::{NEIGHBOURS, STATIONS};
use crate::{Passed, frame};

/// The interface of the guest with this MAC address in the same network on this host.
#[inline(always)]
pub fn find(policy: &PolicyEntry, mac: [u16; 3]) -> Option<u32> {
    if policy.network == 0 {
        return None;
    }
    let key = StationKey {
        network: policy.network,
        mac: frame::bytes(mac),
        reserved: [0; 2],
    };
    // SAFETY: reads one aligned number; an entry that was replaced meanwhile gives the index of
    // another interface, whose own policy decides.
    unsafe { STATIONS.get(key) }.copied()
}

/// Answers a question of the guest about another guest, if it is known where that one is: turns the
/// frame into the answer and sends it back. Otherwise the question goes on.
#[inline(always)]
pub fn answer_arp(packet: &TcContext, policy: &PolicyEntry, request: &ArpHdr) -> Passed {
    let target = u32::from_ne_bytes(request.tpa());
    if policy.network == 0 || policy.flags & flag::ISOLATED != 0 || target == policy.ipv4 {
        return Passed::On;
    }
    let key = NeighbourKey {
        network: policy.network,
        address: from_ipv4(target),
    };
    // SAFETY: reads a MAC address; an entry that was replaced meanwhile gives another's, whose
    // own policy decides about what is then sent to it.
    let Some(neighbour) = (unsafe { NEIGHBOURS.get(key) }) else {
        return Passed::On;
    };
    let mac = neighbour.mac;
    let mut answer = *request;
    answer.set_oper(2);
    answer.set_sha(mac);
    answer.set_spa(request.tpa());
    answer.set_tha(policy.mac);
    answer.set_tpa(request.spa());
    let addresses = [policy.mac, mac];
    if packet.store(0, &addresses, 0).is_err() || packet.store(EthHdr::LEN, &answer, 0).is_err() {
        return Passed::On;
    }
    Passed::To(frame::ifindex(packet))
}
