//! The policy in plain words: what the programs must say about any frame, written without regard to
//! how they do it. Its time stands still.
#![allow(dead_code, reason = "each test file uses a part")]

mod addresses;
mod flows;
pub mod hairpin;
mod neighbours;
mod packet;
mod rewrite;
mod rules;
mod services;
pub mod sums;
pub mod uplink;

use std::collections::HashMap;
use std::net::IpAddr;

use flows::{Flow, FlowKey, FragmentKey, Fragments};
use keelson_ebpf::{Direction, DropReason, InterfacePolicy, Service};
use packet::Packet;

type Verdict = Result<(), DropReason>;
/// The counter of the rule that let a packet pass; `None` if none is named or no rule was asked.
pub type Allowed = Option<u64>;

/// One interface.
pub struct Model {
    policy: InterfacePolicy,
    /// Other guests of the network on this host, by MAC address.
    stations: Vec<[u8; 6]>,
    flows: HashMap<FlowKey, Flow>,
    /// Fragmented packets whose first fragment passed → where that one ends.
    fragments: HashMap<FragmentKey, Fragments>,
    services: services::Services,
    allowed_by: Allowed,
}

impl Model {
    pub fn new(policy: &InterfacePolicy, stations: Vec<[u8; 6]>) -> Self {
        Self {
            policy: policy.clone(),
            stations,
            flows: HashMap::new(),
            fragments: HashMap::new(),
            services: services::Services::default(),
            allowed_by: None,
        }
    }

    /// Other rules: flows are asked about when their next packet comes.
    pub fn update(&mut self, policy: &InterfacePolicy) {
        self.policy = policy.clone();
        for flow in self.flows.values_mut() {
            flow.is_judged = false;
        }
    }

    /// Other services: a flow whose backend is gone gets another with its next packet.
    pub fn set_services(&mut self, services: &[Service]) {
        self.services.set(services);
    }

    /// Which rule let the last frame pass.
    pub fn allowed_by(&self) -> Allowed {
        self.allowed_by
    }

    /// What becomes of a frame, and what it becomes. Which backend a new flow of a service gets is read
    /// from `after`, what the programs made of the frame.
    pub fn judge(
        &mut self,
        direction: Direction,
        frame: &[u8],
        after: &[u8],
    ) -> (Verdict, Vec<u8>) {
        self.allowed_by = None;
        let mut expected = frame.to_vec();
        let verdict = self.judge_frame(direction, frame, after, &mut expected);
        (verdict, expected)
    }

    fn judge_frame(
        &mut self,
        direction: Direction,
        frame: &[u8],
        after: &[u8],
        expected: &mut [u8],
    ) -> Verdict {
        let source: [u8; 6] = frame[6..12].try_into().expect("six bytes");
        let destination: [u8; 6] = frame[..6].try_into().expect("six bytes");
        let from_guest = direction == Direction::FromGuest;
        if from_guest && source != self.policy.mac.0 {
            return Err(DropReason::SpoofedMac);
        }
        let is_group = destination[0] & 1 == 1;
        if !from_guest && !is_group && destination != self.policy.mac.0 {
            return Err(DropReason::WrongDestination);
        }
        if !from_guest && self.policy.isolated && self.stations.contains(&source) {
            return Err(DropReason::Isolated);
        }
        match u16::from_be_bytes([frame[12], frame[13]]) {
            0x0806 => self.judge_arp(from_guest, frame),
            0x0800 | 0x86dd if from_guest && destination == services::MAC => {
                self.judge_to_service(frame, after, expected)
            }
            0x0800 | 0x86dd => {
                if from_guest && frame.len() > usize::from(self.policy.mtu) + 14 {
                    return Err(DropReason::Oversized);
                }
                let packet = packet::read(frame)?;
                if from_guest && self.is_dhcp(&packet, frame) {
                    return Ok(());
                }
                self.check_addresses(direction, &packet)?;
                if packet.is_housekeeping() {
                    return self.judge_housekeeping(from_guest, &packet, frame);
                }
                if from_guest {
                    if self.policy.isolated && self.stations.contains(&destination) {
                        return Err(DropReason::Isolated);
                    }
                } else if is_ipv6_group(packet.destination) {
                    return Err(DropReason::WrongDestination);
                }
                let translated = self.judge_ip(direction, &packet, frame)?;
                if translated && !from_guest {
                    self.services.answer(&packet, frame, expected)?;
                }
                Ok(())
            }
            0x8100 | 0x88a8 | 0x9100 => Err(DropReason::Vlan),
            _ => Err(DropReason::UnknownProtocol),
        }
    }

    /// A question for a DHCP server, which the agent is, from the guest or of one without an address.
    fn is_dhcp(&self, packet: &Packet, frame: &[u8]) -> bool {
        let (client, server) = match packet.source {
            IpAddr::V4(source) => {
                let may_ask = source.is_unspecified() || Some(source) == self.policy.ipv4;
                if self.policy.ipv4.is_none() || !may_ask {
                    return false;
                }
                (68, 67)
            }
            IpAddr::V6(source) => {
                if !self.own_ipv6().contains(&source) || is_mapped(packet.destination) {
                    return false;
                }
                (546, 547)
            }
        };
        let [a, b, c, d, ..]: [u8; 8] = match packet.payload(frame).get(..8) {
            Some(header) => header.try_into().expect("eight bytes"),
            None => return false,
        };
        self.policy.answers.dhcp
            && packet.protocol == 17
            && packet.fragment.is_none()
            && u16::from_be_bytes([a, b]) == client
            && u16::from_be_bytes([c, d]) == server
    }

    /// A packet to a service: judged as one to the backend that it goes to.
    fn judge_to_service(&mut self, frame: &[u8], after: &[u8], expected: &mut [u8]) -> Verdict {
        if frame.len() > usize::from(self.policy.mtu) + 14 {
            return Err(DropReason::Oversized);
        }
        let packet = packet::read(frame)?;
        match (packet.source, packet.destination) {
            (IpAddr::V4(source), _) if Some(source) != self.policy.ipv4 => {
                return Err(DropReason::SpoofedIpv4);
            }
            (IpAddr::V6(source), destination)
                if Some(source) != self.policy.ipv6 || is_mapped(destination) =>
            {
                return Err(DropReason::SpoofedIpv6);
            }
            _ => {}
        }
        let flows = &self.flows;
        let is_used = |key: &FlowKey| {
            flows.get(key).is_some_and(|flow| {
                let is_closed = flow.reset || flow.finished == [true; 2];
                !flow.translated && !is_closed
            })
        };
        let hairpin = self
            .services
            .forward(&packet, frame, after, expected, is_used)?;
        if hairpin {
            expected[6..12].copy_from_slice(&services::MAC);
        }
        let translated = packet::read(expected)?;
        let destination: [u8; 6] = expected[..6].try_into().expect("six bytes");
        if !hairpin && self.policy.isolated && self.stations.contains(&destination) {
            return Err(DropReason::Isolated);
        }
        if hairpin {
            return self.judge_hairpin(&packet, &translated, frame, expected);
        }
        let (own, peer) = (translated.source, translated.destination);
        self.judge_between(
            Direction::FromGuest,
            &translated,
            expected,
            (own, peer),
            true,
        )
        .map(drop)
    }

    /// The guest to itself: for its rules a flow with the service's address.
    fn judge_hairpin(
        &mut self,
        packet: &Packet,
        translated: &Packet,
        frame: &[u8],
        expected: &[u8],
    ) -> Verdict {
        let (own, peer) = (translated.destination, translated.source);
        let is_later = packet.fragment.is_some_and(|fragment| fragment.offset != 0);
        let is_error = !is_later && packet.transport(frame)?.is_error;
        if is_error {
            translated.transport(expected)?;
            self.note_fragment(Direction::FromGuest, translated, own, peer, false);
            return Ok(());
        }
        let frame = if is_later { expected } else { frame };
        self.judge_between(Direction::FromGuest, translated, frame, (own, peer), false)
            .map(drop)
    }
}

pub fn is_housekeeping_type(icmpv6_type: u8) -> bool {
    matches!(icmpv6_type, 130..=137 | 143)
}

fn is_mapped(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(ipv6) if ipv6.to_ipv4_mapped().is_some())
}

fn is_ipv6_group(address: IpAddr) -> bool {
    address.is_ipv6() && address.is_multicast()
}
