//! ARP, neighbour discovery and what belongs to it: no rule is asked.

use std::net::Ipv6Addr;

use keelson_ebpf::DropReason;

use super::packet::Packet;
use super::{Model, Verdict};

impl Model {
    pub(super) fn judge_arp(&self, from_guest: bool, frame: &[u8]) -> Verdict {
        let arp = frame.get(14..42).ok_or(DropReason::Malformed)?;
        if arp[..6] != [0, 1, 8, 0, 6, 4] || !matches!(arp[6..8], [0, 1 | 2]) {
            return Err(DropReason::Malformed);
        }
        let own = self.policy.ipv4.map(|ipv4| ipv4.octets());
        let (sender, target) = (&arp[14..18], &arp[24..28]);
        if from_guest {
            let is_probe = *sender == [0; 4] && arp[7] == 1;
            let is_own = own.is_some_and(|own| *sender == own);
            if arp[8..14] != self.policy.mac.0 || !(is_probe || is_own) {
                return Err(DropReason::SpoofedArp);
            }
        } else if own.is_none_or(|own| *target != own && target != sender) {
            return Err(DropReason::WrongDestination);
        }
        Ok(())
    }

    /// Neighbour discovery and what belongs to it: no rule is asked.
    pub(super) fn judge_housekeeping(
        &self,
        from_guest: bool,
        packet: &Packet,
        frame: &[u8],
    ) -> Verdict {
        let message = packet.payload(frame);
        let (icmpv6_type, code) = (message[0], message[1]);
        match (icmpv6_type, from_guest) {
            (130 | 134 | 137, true) => return Err(DropReason::RouterAdvertisement),
            (131 | 132 | 143, true) | (130, false) => return Ok(()),
            (131 | 132 | 133 | 143, false) => return Err(DropReason::WrongDestination),
            _ => {}
        }
        if packet.hop_limit != 255 || code != 0 || packet.fragment.is_some() {
            return Err(DropReason::Malformed);
        }
        if matches!(icmpv6_type, 134 | 137) {
            return Ok(());
        }
        if icmpv6_type == 133 {
            return self.judge_options(&message[8..]);
        }
        let target: [u8; 16] = match message.get(8..24) {
            Some(target) => target.try_into().expect("sixteen bytes"),
            None => return Err(DropReason::Malformed),
        };
        let is_own = self.own_ipv6().contains(&Ipv6Addr::from(target));
        match (from_guest, icmpv6_type) {
            (false, 135) if !is_own => Err(DropReason::WrongDestination),
            (false, 136) if is_own => Err(DropReason::SpoofedNeighbour),
            (false, _) => Ok(()),
            (true, _) => {
                let must_be_own = icmpv6_type == 136 || packet.source.is_unspecified();
                if must_be_own && !is_own {
                    return Err(DropReason::SpoofedNeighbour);
                }
                self.judge_options(&message[24..])
            }
        }
    }

    /// At most three options; link-layer addresses must be the guest's own.
    fn judge_options(&self, mut options: &[u8]) -> Verdict {
        for _ in 0..3 {
            if options.is_empty() {
                return Ok(());
            }
            let first: [u8; 8] = match options.get(..8) {
                Some(first) => first.try_into().expect("eight bytes"),
                // The frame may go on behind the packet, whose end is checked below.
                None => return Err(DropReason::Malformed),
            };
            let length = usize::from(first[1]) * 8;
            if length == 0 || options.len() < length {
                return Err(DropReason::Malformed);
            }
            if matches!(first[0], 1 | 2) && first[2..] != self.policy.mac.0 {
                return Err(DropReason::SpoofedNeighbour);
            }
            options = &options[length..];
        }
        if options.is_empty() {
            Ok(())
        } else {
            Err(DropReason::Malformed)
        }
    }
}
