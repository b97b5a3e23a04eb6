//! The tunnel between hosts (VXLAN, RFC 7348): what is for a guest of another host leaves (`to_peer`) by one device of
//! the kernel's, which takes the other host's address and the network's identifier from the packet's
//! tunnel key (maps `TUNNEL`, `REMOTE_STATIONS`). What comes by it is delivered to guests of this host
//! (`from_tunnel`) if its sender is a guest of the host that it came from; `to_guest` decides then.
//!
//! Maps: `OVERLAYS`, `TUNNELLED`; those of `stations`.

use aya_ebpf::bindings::{BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key};
use aya_ebpf::helpers::generated::{bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key};
use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{Address, Direction, DropReason, PolicyEntry, RemoteStation, from_ipv4};

use crate::maps::{OVERLAYS, TUNNEL};
use crate::{Passed, counters, frame, ip, stations};

/// A `bpf_tunnel_key` in words: the network's identifier, the other host's address, class, hops and flags,
/// the flow label, and this host's address.
type Key = [u32; 11];
const _: () = assert!(size_of::<Key>() == size_of::<bpf_tunnel_key>());
const VNI: usize = 0;
const REMOTE: usize = 1;
const HOPS: usize = 5;
const LOCAL: usize = 7;

/// Hops that a packet between hosts may take (RFC 1700).
const HOP_LIMIT: u8 = 64;

/// Sends a packet that may leave a guest to the host that has its destination, if another one has.
#[inline(always)]
pub fn send(packet: &TcContext, policy: &PolicyEntry) -> Result<Passed, DropReason> {
    let head = frame::head(packet)?;
    match stations::find_remote(policy.network, head.destination) {
        Some(station) => send_to(packet, station),
        None => Ok(Passed::On),
    }
}

#[inline(always)]
fn send_to(packet: &TcContext, station: &RemoteStation) -> Result<Passed, DropReason> {
    let tunnel = TUNNEL.get(0).ok_or(DropReason::NoTunnel)?;
    if tunnel.ifindex == 0 {
        return Err(DropReason::NoTunnel);
    }
    let mut key: Key = [0; 11];
    key[VNI] = station.vni;
    key[HOPS] = u32::from_ne_bytes([0, HOP_LIMIT, 0, 0]);
    let flags = if ip::is_mapped(station.host) {
        // The kernel wants IPv4 addresses as numbers.
        key[REMOTE] = u32::from_be(station.host[3]);
        key[LOCAL] = u32::from_be(tunnel.address[3]);
        BPF_F_ZERO_CSUM_TX
    } else {
        for word in 0..4 {
            key[REMOTE + word] = station.host[word];
            key[LOCAL + word] = tunnel.address[word];
        }
        BPF_F_TUNINFO_IPV6
    };
    // SAFETY: the helper reads the key, which has the size that it is told.
    let set = unsafe {
        bpf_skb_set_tunnel_key(
            packet.skb.skb,
            key.as_mut_ptr().cast(),
            size_of::<Key>() as u32,
            flags.into(),
        )
    };
    if set != 0 {
        return Err(DropReason::NoTunnel);
    }
    counters::count_tunnelled(Direction::FromGuest, packet.len());
    Ok(Passed::To(tunnel.ifindex))
}

/// Whether hosts reach each other by this UDP port.
#[inline(always)]
pub fn is_port(port: u16) -> bool {
    TUNNEL
        .get(0)
        .is_some_and(|tunnel| tunnel.ifindex != 0 && tunnel.port == port)
}

/// Decides where a packet from another host goes.
#[inline(always)]
pub fn receive(packet: &TcContext) -> Result<Passed, DropReason> {
    let (vni, host) = sender(packet)?;
    let head = frame::head(packet)?;
    // SAFETY: reads one aligned number.
    let network = unsafe { OVERLAYS.get(vni) }.copied();
    let network = network.ok_or(DropReason::UnknownPeer)?;
    let station = stations::find_remote(network, head.source).ok_or(DropReason::UnknownPeer)?;
    if !ip::same(station.host, host) {
        return Err(DropReason::UnknownPeer);
    }
    let to = stations::find_in(network, head.destination).ok_or(DropReason::WrongDestination)?;
    // Marks are the host's own: none of them may come from elsewhere.
    // SAFETY: the kernel gives the program a valid context, in which it may write the mark.
    unsafe { (*packet.skb.skb).mark = 0 };
    counters::count_tunnelled(Direction::ToGuest, packet.len());
    Ok(Passed::To(to))
}

/// The network's identifier and the host that a packet came from.
#[inline(always)]
fn sender(packet: &TcContext) -> Result<(u32, Address), DropReason> {
    let mut key: Key = [0; 11];
    if get_key(packet, &mut key, 0) {
        return Ok((key[VNI], from_ipv4(key[REMOTE].to_be())));
    }
    if !get_key(packet, &mut key, BPF_F_TUNINFO_IPV6) {
        return Err(DropReason::UnknownPeer);
    }
    let host = [
        key[REMOTE],
        key[REMOTE + 1],
        key[REMOTE + 2],
        key[REMOTE + 3],
    ];
    Ok((key[VNI], host))
}

#[inline(always)]
fn get_key(packet: &TcContext, key: &mut Key, flags: u32) -> bool {
    // SAFETY: the helper writes the key, which has the size that it is told.
    unsafe {
        bpf_skb_get_tunnel_key(
            packet.skb.skb,
            key.as_mut_ptr().cast(),
            size_of::<Key>() as u32,
            flags.into(),
        ) == 0
    }
}
