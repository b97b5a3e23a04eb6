//! Flows and fragments: what passes without that a rule is asked, and what opens a flow.

use std::net::IpAddr;

use keelson_ebpf::{Direction, DropReason};

use super::packet::{Packet, Transport};
use super::{Model, Verdict, services};

/// Protocol, the guest's address and port, the peer's address and port. Of an echo the ports are its
/// identifier and who asks.
pub type FlowKey = (u8, IpAddr, u16, IpAddr, u16);
pub type FragmentKey = (bool, IpAddr, IpAddr, [u8; 4], u8);

/// Where the first fragment ends, and whether what goes to the guest is translated.
pub struct Fragments {
    pub(super) first_end: u32,
    pub(super) translated: bool,
}

#[allow(clippy::struct_excessive_bools)] // Facts that are independent of each other.
pub struct Flow {
    pub(super) opener: Direction,
    pub(super) answered: bool,
    pub(super) finished: [bool; 2],
    pub(super) reset: bool,
    /// As the rules saw the packet that opened it.
    pub(super) rule_port: u16,
    /// Whether the present rules were asked about it.
    pub(super) is_judged: bool,
    /// Whether the guest opened it through a service.
    pub(super) translated: bool,
}

impl Model {
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

    /// Whether what goes to the guest is to be translated.
    pub(super) fn judge_ip(
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

    pub(super) fn judge_between(
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

    pub(super) fn note_fragment(
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
