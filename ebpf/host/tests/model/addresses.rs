//! Which addresses a guest may send from, and be reached at.

use std::net::{IpAddr, Ipv6Addr};

use keelson_ebpf::{Direction, DropReason};

use super::packet::Packet;
use super::{Model, Verdict, is_housekeeping_type, is_mapped};

impl Model {
    pub(super) fn own_ipv6(&self) -> Vec<Ipv6Addr> {
        let ipv6 = self.policy.ipv6.into_iter();
        ipv6.flat_map(|ipv6| [ipv6, self.policy.mac.link_local()])
            .collect()
    }

    pub(super) fn check_addresses(&self, direction: Direction, packet: &Packet) -> Verdict {
        match (direction, packet.source, packet.destination) {
            (Direction::FromGuest, IpAddr::V4(source), _) => {
                if Some(source) == self.policy.ipv4 {
                    Ok(())
                } else {
                    Err(DropReason::SpoofedIpv4)
                }
            }
            (Direction::ToGuest, IpAddr::V4(source), IpAddr::V4(destination)) => {
                if Some(destination) != self.policy.ipv4 {
                    Err(DropReason::WrongDestination)
                } else if source == destination {
                    Err(DropReason::SpoofedIpv4)
                } else {
                    Ok(())
                }
            }
            (Direction::FromGuest, IpAddr::V6(source), destination) => {
                let own = self.own_ipv6();
                let may_be_none = packet.icmpv6_type.is_some_and(is_housekeeping_type);
                let is_none = source.is_unspecified() && may_be_none;
                let has_ipv6 = !own.is_empty() && !is_mapped(destination);
                if has_ipv6 && (own.contains(&source) || is_none) {
                    Ok(())
                } else {
                    Err(DropReason::SpoofedIpv6)
                }
            }
            (Direction::ToGuest, IpAddr::V6(source), IpAddr::V6(destination)) => {
                let own = self.own_ipv6();
                if own.is_empty() {
                    Err(DropReason::WrongDestination)
                } else if own.contains(&source) || is_mapped(packet.source) || source.is_multicast()
                {
                    Err(DropReason::SpoofedIpv6)
                } else if own.contains(&destination) || destination.is_multicast() {
                    Ok(())
                } else {
                    Err(DropReason::WrongDestination)
                }
            }
            _ => unreachable!("one packet has addresses of one family"),
        }
    }
}
