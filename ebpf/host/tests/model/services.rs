//! Services in plain words: a new flow gets any of the backends that don't drain, and keeps it for as long as
//! the service has it; both ways its packets get other ends.

use std::collections::HashMap;
use std::net::IpAddr;

use keelson_ebpf::{DropReason, Service};

use super::FlowKey;
use super::packet::{self, Packet};
use super::rewrite::{put_addresses, put_ports, rewrite_addresses};

/// The Ethernet address that all services have.
pub const MAC: [u8; 6] = [0x02, 0x4b, 0x45, 0x45, 0x4c, 0x53];

type End = (IpAddr, u16);
/// Protocol, source and destination of packets that come so.
type Key = (u8, End, End);

/// What packets become.
#[derive(Clone, Copy)]
struct Ends {
    source: End,
    destination: End,
    mac: [u8; 6],
    hairpin: bool,
    /// The service's end, if the packet goes to a backend of it.
    service: Option<End>,
    /// The service was without the backend for a while, unnoticed by the flow: whether that one is its
    /// backend again, or it gets another, depends on where the backend stands now.
    lapsed: bool,
}

#[derive(Default)]
pub struct Services {
    list: Vec<Service>,
    /// From the client.
    forward: HashMap<Key, Ends>,
    /// To the client.
    reverse: HashMap<Key, Ends>,
    /// Fragments behind a first one, by way, addresses, identification and protocol.
    fragments: HashMap<(bool, IpAddr, IpAddr, [u8; 4], u8), Ends>,
}

impl Services {
    pub fn set(&mut self, services: &[Service]) {
        self.list = services.to_vec();
        let mut forward = std::mem::take(&mut self.forward);
        for ((protocol, ..), ends) in &mut forward {
            ends.lapsed |= !self.is_served(*protocol, ends);
        }
        self.forward = forward;
    }

    /// Makes `expected` what a packet to a service becomes; whether it goes back to its sender.
    pub fn forward(
        &mut self,
        packet: &Packet,
        frame: &[u8],
        after: &[u8],
        expected: &mut [u8],
        is_used: impl Fn(&FlowKey) -> bool,
    ) -> Result<bool, DropReason> {
        let fragment = fragment_key(true, packet);
        if packet.fragment.is_some_and(|fragment| fragment.offset != 0) {
            let ends = *self.fragments.get(&fragment).ok_or(DropReason::Fragment)?;
            rewrite_addresses(expected, ends.source.0, ends.destination.0);
            expected[..6].copy_from_slice(&ends.mac);
            return Ok(ends.hairpin);
        }
        let transport = packet.transport(frame)?;
        if transport.is_error {
            let key = quoted_key(packet, frame)?.ok_or(DropReason::NoService)?;
            let ends = *self.forward.get(&key).ok_or(DropReason::NoService)?;
            rewrite_error(packet, expected, ends.source.0, &ends);
            expected[..6].copy_from_slice(&ends.mac);
            return Ok(ends.hairpin);
        }
        if !matches!(packet.protocol, 6 | 17) {
            return Err(DropReason::NoService);
        }
        let source = (packet.source, transport.ports.0);
        let destination = (packet.destination, transport.ports.1);
        let key = (packet.protocol, source, destination);
        let known = self.forward.get(&key).copied();
        let goes_on = known.filter(|known| {
            let went = || {
                let chosen = packet::read(after).expect("it was a packet before");
                let ports = chosen.transport(after).expect("it was one before").ports;
                (chosen.destination, ports.1) == known.destination
            };
            // A connection that is asked for is a new one, unless a backend asks for it.
            let is_new = transport.syn && known.service.is_some();
            !is_new && self.is_served(packet.protocol, known) && (!known.lapsed || went())
        });
        let ends = match goes_on {
            Some(mut known) => {
                known.lapsed = false;
                self.forward.insert(key, known);
                known
            }
            None => self.create(key, after, is_used)?,
        };
        rewrite(packet, expected, &ends);
        expected[..6].copy_from_slice(&ends.mac);
        if packet.fragment.is_some_and(|fragment| fragment.more) {
            self.fragments.insert(fragment, ends);
        }
        Ok(ends.hairpin)
    }

    /// Makes `expected` what the answer of a service becomes.
    pub fn answer(
        &mut self,
        packet: &Packet,
        frame: &[u8],
        expected: &mut [u8],
    ) -> Result<(), DropReason> {
        let fragment = fragment_key(false, packet);
        expected[6..12].copy_from_slice(&MAC);
        if packet.fragment.is_some_and(|fragment| fragment.offset != 0) {
            let ends = self.fragments.get(&fragment).ok_or(DropReason::NoService)?;
            rewrite_addresses(expected, ends.source.0, ends.destination.0);
            return Ok(());
        }
        let transport = packet.transport(frame)?;
        if transport.is_error {
            let key = quoted_key(packet, frame)?.ok_or(DropReason::NoService)?;
            let ends = *self.reverse.get(&key).ok_or(DropReason::NoService)?;
            let is_backend = packet.source == key.1.0;
            let source = if is_backend {
                ends.source.0
            } else {
                packet.source
            };
            rewrite_error(packet, expected, source, &ends);
            return Ok(());
        }
        let source = (packet.source, transport.ports.0);
        let destination = (packet.destination, transport.ports.1);
        let key = (packet.protocol, source, destination);
        let ends = *self.reverse.get(&key).ok_or(DropReason::NoService)?;
        rewrite(packet, expected, &ends);
        if packet.fragment.is_some_and(|fragment| fragment.more) {
            self.fragments.insert(fragment, ends);
        }
        Ok(())
    }

    fn service(&self, protocol: u8, end: End) -> Option<&Service> {
        let mut services = self.list.iter();
        services.find(|service| {
            service.protocol.number() == protocol && (service.address, service.port) == end
        })
    }

    fn is_served(&self, protocol: u8, ends: &Ends) -> bool {
        let Some(service) = ends.service else {
            return true;
        };
        self.service(protocol, service).is_some_and(|service| {
            let mut backends = service.backends.iter().chain(&service.draining);
            backends.any(|backend| (backend.address, backend.port) == ends.destination)
        })
    }

    /// A new flow, whose backend the programs chose.
    fn create(
        &mut self,
        key: Key,
        after: &[u8],
        is_used: impl Fn(&FlowKey) -> bool,
    ) -> Result<Ends, DropReason> {
        let (protocol, client, service_end) = key;
        let service = self.service(protocol, service_end);
        let service = service.ok_or(DropReason::NoService)?;
        if service.backends.is_empty() {
            return Err(DropReason::NoBackend);
        }
        let chosen = packet::read(after).expect("it was a packet before");
        let ports = chosen.transport(after).expect("it was one before").ports;
        let mut backends = service.backends.iter();
        let backend = backends
            .find(|backend| (backend.address, backend.port) == (chosen.destination, ports.1))
            .expect("a new flow gets one of the backends");
        let backend_end = (backend.address, backend.port);
        let hairpin = backend.address == client.0;
        let source = if hairpin { service_end.0 } else { client.0 };
        assert_eq!(chosen.source, source);
        let answers = |port: u16| (protocol, backend_end, (source, port));
        let is_free = |port: u16| {
            let table = if hairpin {
                &self.forward
            } else {
                &self.reverse
            };
            match table.get(&answers(port)) {
                Some(other) => (other.source, other.destination.1) == (service_end, client.1),
                None => !is_used(&(protocol, client.0, port, backend.address, backend.port)),
            }
        };
        // Its own port, if no other flow's answers come to that.
        if is_free(client.1) {
            assert_eq!(ports.0, client.1);
        } else {
            assert!(ports.0 >= 0xc000 && is_free(ports.0), "port {}", ports.0);
        }
        let ends = Ends {
            source: (source, ports.0),
            destination: backend_end,
            mac: backend.mac.0,
            hairpin,
            service: Some(service_end),
            lapsed: false,
        };
        let back = Ends {
            source: service_end,
            destination: client,
            service: None,
            ..ends
        };
        let table = if hairpin {
            &mut self.forward
        } else {
            &mut self.reverse
        };
        table.insert((protocol, backend_end, (source, ports.0)), back);
        self.forward.insert(key, ends);
        Ok(ends)
    }
}

fn fragment_key(forward: bool, packet: &Packet) -> (bool, IpAddr, IpAddr, [u8; 4], u8) {
    let is_ipv4 = packet.source.is_ipv4();
    let protocol = if is_ipv4 { packet.protocol } else { 0 };
    (
        forward,
        packet.source,
        packet.destination,
        packet.identification,
        protocol,
    )
}

/// The ends of packets that go the way of an ICMP error, in the flow that it is about.
fn quoted_key(packet: &Packet, frame: &[u8]) -> Result<Option<Key>, DropReason> {
    let quoted = packet.quoted(frame)?;
    let quoted = quoted.filter(|quoted| matches!(quoted.protocol, 6 | 17));
    Ok(quoted.map(|quoted| (quoted.protocol, quoted.destination, quoted.source)))
}

fn rewrite(packet: &Packet, frame: &mut [u8], ends: &Ends) {
    rewrite_addresses(frame, ends.source.0, ends.destination.0);
    put_ports(frame, packet.offset, ends.source.1, ends.destination.1);
}

/// The packet that an error quotes went the other way.
fn rewrite_error(packet: &Packet, frame: &mut [u8], source: IpAddr, ends: &Ends) {
    rewrite_addresses(frame, source, ends.destination.0);
    let quoted = packet.offset + 8;
    let header = if source.is_ipv4() { 20 } else { 40 };
    put_addresses(frame, quoted, ends.destination.0, ends.source.0);
    put_ports(frame, quoted + header, ends.destination.1, ends.source.1);
}
