//! The policy in plain words: what the programs must say about any frame, written without regard to
//! how they do it. Its time stands still.

mod packet;
mod services;
pub mod sums;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};

use keelson_ebpf::{Direction, DropReason, EgressPolicy, InterfacePolicy, Rule, Service};
use packet::{Packet, Transport};

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

/// Protocol, the guest's address and port, the peer's address and port. Of an echo the ports are its
/// identifier and who asks.
type FlowKey = (u8, IpAddr, u16, IpAddr, u16);
type FragmentKey = (bool, IpAddr, IpAddr, [u8; 4], u8);

/// Where the first fragment ends, and whether what goes to the guest is translated.
struct Fragments {
    first_end: u32,
    translated: bool,
}

#[allow(clippy::struct_excessive_bools)] // Facts that are independent of each other.
struct Flow {
    opener: Direction,
    answered: bool,
    finished: [bool; 2],
    reset: bool,
    /// As the rules saw the packet that opened it.
    rule_port: u16,
    /// Whether the present rules were asked about it.
    is_judged: bool,
    /// Whether the guest opened it through a service.
    translated: bool,
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

    /// Whether there is such a flow that the present rules allow; one that they don't is no more.
    fn has_flow(&mut self, key: &FlowKey) -> bool {
        let Some(flow) = self.flows.get(key) else {
            return false;
        };
        let allowed = flow.is_judged || self.rules_allow(flow.opener, key.3, key.0, flow.rule_port);
        if allowed {
            self.flows
                .entry(*key)
                .and_modify(|flow| flow.is_judged = true);
        } else {
            self.flows.remove(key);
        }
        allowed
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

    fn judge_arp(&self, from_guest: bool, frame: &[u8]) -> Verdict {
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

    fn own_ipv6(&self) -> Vec<Ipv6Addr> {
        let ipv6 = self.policy.ipv6.into_iter();
        ipv6.flat_map(|ipv6| [ipv6, self.policy.mac.link_local()])
            .collect()
    }

    fn check_addresses(&self, direction: Direction, packet: &Packet) -> Verdict {
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

    /// Neighbour discovery and what belongs to it: no rule is asked.
    fn judge_housekeeping(&self, from_guest: bool, packet: &Packet, frame: &[u8]) -> Verdict {
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

    /// Whether what goes to the guest is to be translated.
    fn judge_ip(
        &mut self,
        direction: Direction,
        packet: &Packet,
        frame: &[u8],
    ) -> Result<bool, DropReason> {
        let ends = match direction {
            Direction::FromGuest => (packet.source, packet.destination),
            Direction::ToGuest => (packet.destination, packet.source),
        };
        self.judge_between(direction, packet, frame, ends, false)
    }

    fn judge_between(
        &mut self,
        direction: Direction,
        packet: &Packet,
        frame: &[u8],
        (own, peer): (IpAddr, IpAddr),
        translated: bool,
    ) -> Result<bool, DropReason> {
        let key = fragment_key(direction, packet, own, peer);
        match packet.fragment {
            Some(fragment) if fragment.offset != 0 => match self.fragments.get(&key) {
                Some(first) if fragment.offset >= first.first_end => Ok(first.translated),
                _ => Err(DropReason::Fragment),
            },
            _ => {
                let translated =
                    self.judge_first(direction, packet, frame, (own, peer), translated)?;
                self.note_fragment(direction, packet, own, peer, translated);
                Ok(translated)
            }
        }
    }

    fn note_fragment(
        &mut self,
        direction: Direction,
        packet: &Packet,
        own: IpAddr,
        peer: IpAddr,
        translated: bool,
    ) {
        if let Some(fragment) = packet.fragment.filter(|fragment| fragment.more) {
            let key = fragment_key(direction, packet, own, peer);
            let first = Fragments {
                first_end: fragment.length,
                translated,
            };
            self.fragments.insert(key, first);
        }
    }

    /// A whole packet or a first fragment. Whether what goes to the guest is to be translated.
    fn judge_first(
        &mut self,
        direction: Direction,
        packet: &Packet,
        frame: &[u8],
        (own, peer): (IpAddr, IpAddr),
        translated: bool,
    ) -> Result<bool, DropReason> {
        let transport = packet.transport(frame)?;
        let protocol = packet.protocol;
        let is_plain = direction == Direction::FromGuest && frame[..6] != services::MAC;
        if is_plain && !translated {
            refuse_servers(packet, &transport)?;
        }
        if transport.is_error {
            if let Some(flow) = self.related(direction, packet, frame, own, peer)? {
                return Ok(flow);
            }
        } else if let Some(key) = flow_key(direction, protocol, own, peer, &transport) {
            if self.has_flow(&key)
                && let Some(flow) = self.flows.get_mut(&key)
                && flow.continues(direction, &transport)
            {
                if direction == Direction::FromGuest && flow.translated != translated {
                    return Err(DropReason::PortInUse);
                }
                flow.advance(direction, &transport);
                return Ok(flow.translated);
            }
            self.ask_rules(direction, peer, protocol, transport.rule_port)?;
            if transport.can_open {
                let flow = Flow {
                    opener: direction,
                    answered: false,
                    finished: [false; 2],
                    reset: false,
                    rule_port: match transport.echo {
                        Some(_) => transport.rule_port & 0xff00,
                        None => transport.rule_port,
                    },
                    is_judged: true,
                    translated,
                };
                self.flows.insert(key, flow);
            }
            return Ok(translated);
        }
        self.ask_rules(direction, peer, protocol, transport.rule_port)?;
        Ok(translated)
    }

    /// Whether the flow that an ICMP error is about is translated, if there is one.
    fn related(
        &mut self,
        direction: Direction,
        packet: &Packet,
        frame: &[u8],
        own: IpAddr,
        peer: IpAddr,
    ) -> Result<Option<bool>, DropReason> {
        let Some(quoted) = packet.quoted(frame)? else {
            return Ok(None);
        };
        let (own_end, peer_end) = match direction {
            Direction::FromGuest => (quoted.destination, quoted.source),
            Direction::ToGuest => (quoted.source, quoted.destination),
        };
        let key = match quoted.echo {
            Some(identifier) => {
                let asker = u16::from(direction == Direction::FromGuest) + 1;
                (quoted.protocol, own_end.0, identifier, peer_end.0, asker)
            }
            None => (
                quoted.protocol,
                own_end.0,
                own_end.1,
                peer_end.0,
                peer_end.1,
            ),
        };
        let to_sender = direction == Direction::ToGuest || peer_end.0 == peer;
        if to_sender && own_end.0 == own && self.has_flow(&key) {
            return Ok(self.flows.get(&key).map(|flow| flow.translated));
        }
        Ok(None)
    }

    /// Judges a packet by the rules, and notes which one let it pass: of those that do, the one whose
    /// counter is named first.
    fn ask_rules(
        &mut self,
        direction: Direction,
        peer: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Verdict {
        let Some(rules) = self.rules(direction) else {
            return Ok(());
        };
        let allowing: Vec<u64> = rules
            .iter()
            .filter(|rule| rule.allows(peer, protocol, port))
            .map(|rule| rule.counter)
            .collect();
        let named = rules.iter().map(|rule| rule.counter);
        let first = named.into_iter().find(|counter| allowing.contains(counter));
        let first = first.ok_or(DropReason::NotAllowed)?;
        self.allowed_by = (first != 0).then_some(first);
        Ok(())
    }

    fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match (direction, &self.policy.egress) {
            (Direction::ToGuest, _) => Some(&self.policy.ingress),
            (Direction::FromGuest, EgressPolicy::Only(rules)) => Some(rules),
            (Direction::FromGuest, EgressPolicy::AllowAll) => None,
        }
    }

    fn rules_allow(&self, direction: Direction, peer: IpAddr, protocol: u8, port: u16) -> bool {
        let Some(rules) = self.rules(direction) else {
            return true;
        };
        rules.iter().any(|rule| rule.allows(peer, protocol, port))
    }
}

impl Flow {
    /// Whether a packet goes on with the flow.
    fn continues(&self, direction: Direction, transport: &Transport) -> bool {
        if !transport.syn {
            return true;
        }
        let is_closing = self.reset || self.finished != [false; 2];
        let same_syn_again = self.opener == direction && !is_closing;
        let simultaneous = self.opener != direction && !self.answered && !is_closing;
        same_syn_again || simultaneous
    }

    /// Moves the flow on.
    fn advance(&mut self, direction: Direction, transport: &Transport) {
        let is_closing = self.reset || self.finished != [false; 2];
        if transport.rst {
            self.reset = true;
            return;
        }
        if self.opener != direction && !is_closing {
            self.answered = true;
        }
        if transport.fin && !self.reset {
            self.finished[direction as usize] = true;
        }
    }
}

fn fragment_key(direction: Direction, packet: &Packet, own: IpAddr, peer: IpAddr) -> FragmentKey {
    let from_guest = direction == Direction::FromGuest;
    let protocol = if own.is_ipv4() { packet.protocol } else { 0 };
    (from_guest, own, peer, packet.identification, protocol)
}

fn flow_key(
    direction: Direction,
    protocol: u8,
    own: IpAddr,
    peer: IpAddr,
    transport: &Transport,
) -> Option<FlowKey> {
    let guest_sent = direction == Direction::FromGuest;
    if let Some((identifier, asks)) = transport.echo {
        let asker = if asks == guest_sent { 1 } else { 2 };
        return Some((protocol, own, identifier, peer, asker));
    }
    if matches!(protocol, 1 | 58) {
        return None;
    }
    let (source, destination) = transport.ports;
    let (guest_port, peer_port) = if guest_sent {
        (source, destination)
    } else {
        (destination, source)
    };
    Some((protocol, own, guest_port, peer, peer_port))
}

/// What only DHCP servers and routers send.
fn refuse_servers(packet: &Packet, transport: &Transport) -> Verdict {
    let is_ipv4 = packet.source.is_ipv4();
    let dhcp = if is_ipv4 { (67, 68) } else { (547, 546) };
    match packet.protocol {
        17 if transport.ports == dhcp => Err(DropReason::DhcpServer),
        1 if matches!(transport.rule_port >> 8, 5 | 9) => Err(DropReason::RouterAdvertisement),
        _ => Ok(()),
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
