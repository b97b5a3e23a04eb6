//! Source NAT and forwarded ports in plain words: what guests send outside leaves with the uplink's address and a
//! port that nobody else has; what comes to such a port, or to a forwarded one, is its guest's, and nothing else is.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use keelson_ebpf::{DropReason, PortForward, SourceNat};

use super::packet::{self, Packet, Quoted};
use super::rewrite::{End, put, put_ports, rewrite_addresses, rewrite_quoted};

/// Protocol, and a guest's or an external end; of an echo the port is its identifier.
type Port = (Kind, End);

/// Sender, destination, identification and protocol.
pub type Datagram = (IpAddr, IpAddr, [u8; 4], u8);

/// A datagram whose fragments are to follow its first one, and the guest that they go to.
type Noted = (Datagram, IpAddr);

/// Protocols that have ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Tcp,
    Udp,
    Echo,
}

/// A guest's interface, as far as the uplink is concerned.
#[derive(Clone, Debug)]
pub struct Inside {
    /// The interface's name.
    pub interface: String,
    /// Its network.
    pub network: u32,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// An uplink.
pub struct Uplink {
    nat: SourceNat,
    pub(super) guests: Vec<Inside>,
    /// External port → the guest's.
    forwards: HashMap<Port, End>,
    /// A guest's port → the external one, of what guests sent.
    mappings: HashMap<Port, u16>,
    /// Fragments behind a first one → the guest.
    pub(super) fragments: HashMap<Datagram, IpAddr>,
}

/// What becomes of a packet that a guest sends.
pub enum Outcome {
    /// It goes on, translated or not.
    On(Vec<u8>),
    /// It is dropped, for this reason.
    Dropped(DropReason),
}

impl Uplink {
    pub fn new(nat: &SourceNat, guests: Vec<Inside>) -> Self {
        Self {
            nat: nat.clone(),
            guests,
            forwards: HashMap::new(),
            mappings: HashMap::new(),
            fragments: HashMap::new(),
        }
    }

    /// Other forwards: they take ports from whoever has them.
    pub fn set_forwards(&mut self, forwards: &[PortForward]) {
        let found = forwards.iter().filter_map(|forward| {
            let mut guests = self.guests.iter();
            let guest = guests.find(|guest| guest.interface == forward.interface)?;
            let is_ipv4 = forward.address.is_ipv4();
            let mut addresses = guest.addresses.iter();
            let address = addresses.find(|address| address.is_ipv4() == is_ipv4)?;
            let kind = match forward.protocol.number() {
                6 => Kind::Tcp,
                _ => Kind::Udp,
            };
            let external = (kind, (forward.address, forward.port));
            Some((external, (*address, forward.guest_port)))
        });
        self.forwards = found.collect();
        let (nat, forwards) = (&self.nat, &self.forwards);
        self.mappings.retain(|(kind, own), port| {
            external_of(nat, own.0)
                .is_none_or(|external| !forwards.contains_key(&(*kind, (external, *port))))
        });
    }

    /// What the uplink makes of a frame that leaves by it. Which port of several is read from `after`, what the
    /// programs made of it; and so is whether none was found, where half are taken.
    pub fn send(&mut self, frame: &[u8], after: Option<&[u8]>) -> Outcome {
        let on = || Outcome::On(frame.to_vec());
        let Some(source) = source(frame) else {
            return on();
        };
        if !self.is_translated(source) && !self.has_forward(source) {
            return Outcome::On(self.report(frame).unwrap_or_else(|| frame.to_vec()));
        }
        match self.send_of_guest(frame, source, after) {
            Ok(sent) => Outcome::On(sent),
            Err(reason) => Outcome::Dropped(reason),
        }
    }

    pub(super) fn send_of_guest(
        &mut self,
        frame: &[u8],
        source: IpAddr,
        after: Option<&[u8]>,
    ) -> Result<Vec<u8>, DropReason> {
        let packet = packet::read(frame)?;
        let external = self.external(source);
        let mut sent = frame.to_vec();
        if packet.fragment.is_some_and(|fragment| fragment.offset != 0) {
            rewrite_addresses(&mut sent, external, packet.destination);
            return Ok(sent);
        }
        let transport = packet.transport(frame)?;
        if transport.is_error {
            return self.send_error(frame, &packet, external);
        }
        let own = match (packet.protocol, transport.echo) {
            (6, _) => Some((Kind::Tcp, transport.ports.0)),
            (17, _) => Some((Kind::Udp, transport.ports.0)),
            (_, Some((identifier, true))) => Some((Kind::Echo, identifier)),
            _ => None,
        };
        let Some((kind, port)) = own else {
            return self.untranslatable(frame, source);
        };
        let own = (kind, (source, port));
        let external_port = match self.port_of(own) {
            Some(port) => port,
            None if !self.is_translated(source) => return Ok(sent),
            None if !transport.can_open => return Err(DropReason::NotTranslatable),
            None => self.give_port(own, external, after)?,
        };
        rewrite_addresses(&mut sent, external, packet.destination);
        if kind == Kind::Echo {
            put(&mut sent, packet.offset + 4, &external_port.to_be_bytes());
        } else {
            put_ports(&mut sent, packet.offset, external_port, transport.ports.1);
        }
        Ok(sent)
    }

    /// What a guest reports about a packet that it got, to whoever sent that.
    fn send_error(
        &self,
        frame: &[u8],
        packet: &Packet,
        external: IpAddr,
    ) -> Result<Vec<u8>, DropReason> {
        let quoted = packet.quoted(frame)?;
        let about_it = quoted.filter(|quoted| {
            quoted.destination.0 == packet.source && quoted.source.0 == packet.destination
        });
        let known = about_it.and_then(|quoted| Some((self.port_quoted(&quoted)?, quoted)));
        let Some((port, quoted)) = known else {
            return self.untranslatable(frame, packet.source);
        };
        let mut sent = frame.to_vec();
        rewrite_addresses(&mut sent, external, packet.destination);
        rewrite_quoted(packet, &mut sent, &quoted, (None, Some((external, port))));
        Ok(sent)
    }

    /// Without source NAT, what isn't forwarded goes on as it is.
    fn untranslatable(&self, frame: &[u8], source: IpAddr) -> Result<Vec<u8>, DropReason> {
        if self.is_translated(source) {
            Err(DropReason::NotTranslatable)
        } else {
            Ok(frame.to_vec())
        }
    }

    /// What the host says about a packet that it could not pass on to a guest: whoever sent that knows the
    /// external end only.
    fn report(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let packet = packet::read(frame).ok()?;
        if packet.fragment.is_some_and(|fragment| fragment.offset != 0) {
            return None;
        }
        if !packet.transport(frame).ok()?.is_error {
            return None;
        }
        let quoted = packet.quoted(frame).ok()??;
        if quoted.source.0 != packet.destination {
            return None;
        }
        let port = self.port_quoted(&quoted)?;
        let external = self.external(quoted.destination.0);
        let mut sent = frame.to_vec();
        rewrite_quoted(&packet, &mut sent, &quoted, (None, Some((external, port))));
        Some(sent)
    }

    /// What the uplink makes of a frame that comes by it.
    pub fn receive(&mut self, frame: &[u8]) -> Vec<u8> {
        let Some((received, noted)) = self.back(frame) else {
            return frame.to_vec();
        };
        self.fragments.extend(noted);
        received
    }

    /// What a frame to an external port becomes, and which fragments are to follow it.
    pub(super) fn back(&self, frame: &[u8]) -> Option<(Vec<u8>, Option<Noted>)> {
        source(frame)?;
        let packet = packet::read(frame).ok()?;
        let external = packet.destination;
        let is_external = self.nat.ipv4.map(IpAddr::from) == Some(external)
            || self.nat.ipv6.map(IpAddr::from) == Some(external);
        if !is_external {
            return None;
        }
        let mut received = frame.to_vec();
        let protocol = if external.is_ipv4() {
            packet.protocol
        } else {
            0
        };
        let datagram = (packet.source, external, packet.identification, protocol);
        if packet.fragment.is_some_and(|fragment| fragment.offset != 0) {
            let guest = *self.fragments.get(&datagram)?;
            rewrite_addresses(&mut received, packet.source, guest);
            return Some((received, None));
        }
        let transport = packet.transport(frame).ok()?;
        if transport.is_error {
            let quoted = packet.quoted(frame).ok()??;
            let kind = kind_of(&quoted)?;
            let port = quoted.echo.unwrap_or(quoted.source.1);
            let own = self.owner(kind, (quoted.source.0, port))?;
            if quoted.source.0 != external {
                return None;
            }
            rewrite_addresses(&mut received, packet.source, own.0);
            rewrite_quoted(&packet, &mut received, &quoted, (Some(own), None));
            return Some((received, None));
        }
        let (kind, port) = match (packet.protocol, transport.echo) {
            (6, _) => (Kind::Tcp, transport.ports.1),
            (17, _) => (Kind::Udp, transport.ports.1),
            (_, Some((identifier, false))) => (Kind::Echo, identifier),
            _ => return None,
        };
        let own = self.owner(kind, (external, port))?;
        rewrite_addresses(&mut received, packet.source, own.0);
        if kind == Kind::Echo {
            put(&mut received, packet.offset + 4, &own.1.to_be_bytes());
        } else {
            put_ports(&mut received, packet.offset, transport.ports.0, own.1);
        }
        let is_followed = packet.fragment.is_some_and(|fragment| fragment.more);
        Some((received, is_followed.then_some((datagram, own.0))))
    }

    /// External ports that guests have now, by protocol and address.
    pub fn taken(&self, kind: Kind, external: IpAddr) -> BTreeSet<u16> {
        let mappings = self.mappings.iter();
        let mapped = mappings.filter(|((of, own), _)| {
            *of == kind && external_of(&self.nat, own.0) == Some(external)
        });
        let mapped = mapped.map(|(_, port)| *port);
        let forwards = self.forwards.keys();
        let forwarded = forwards.filter(|(of, end)| *of == kind && end.0 == external);
        mapped.chain(forwarded.map(|(_, end)| end.1)).collect()
    }

    /// A port for what has none yet: the same number if it is in the range and free, else any free one of the
    /// range. Where half are taken, none may be found.
    fn give_port(
        &mut self,
        own: Port,
        external: IpAddr,
        after: Option<&[u8]>,
    ) -> Result<u16, DropReason> {
        let (kind, (_, wanted)) = own;
        let taken = self.taken(kind, external);
        let range = self.nat.ports.clone();
        let free = range.clone().filter(|port| !taken.contains(port)).count();
        let keeps_number = range.contains(&wanted) && !taken.contains(&wanted);
        let Some(after) = after else {
            let half = range.clone().count() / 2;
            assert!(
                !keeps_number && free <= half,
                "{own:?} got no port, but {free} are free: {taken:?}"
            );
            return Err(DropReason::PortsExhausted);
        };
        let packet = packet::read(after).expect("it was a packet before");
        let transport = packet.transport(after).expect("it was one before");
        let port = match transport.echo {
            Some((identifier, _)) => identifier,
            None => transport.ports.0,
        };
        assert!(range.contains(&port), "{port} is in the range");
        assert!(!taken.contains(&port), "{port} is nobody else's: {taken:?}");
        assert!(!keeps_number || port == wanted, "{port} for {wanted}");
        self.mappings.insert(own, port);
        Ok(port)
    }

    fn nat_of(&self, own: IpAddr) -> Option<&Inside> {
        self.guests
            .iter()
            .find(|guest| guest.addresses.contains(&own))
    }

    /// Whether what the guest with an address sends is translated.
    pub(super) fn is_translated(&self, own: IpAddr) -> bool {
        let guest = self.nat_of(own);
        guest.is_some_and(|guest| guest.network == self.nat.network)
            && external_of(&self.nat, own).is_some()
    }

    pub(super) fn has_forward(&self, own: IpAddr) -> bool {
        self.forwards.values().any(|end| end.0 == own)
    }

    pub(super) fn external(&self, own: IpAddr) -> IpAddr {
        external_of(&self.nat, own).expect("guests have addresses of its versions only")
    }

    /// The external port of a guest's port: the one that is forwarded to it, else its own.
    fn port_of(&self, own: Port) -> Option<u16> {
        let mut forwards = self.forwards.iter();
        let forward = forwards.find(|((kind, _), end)| (*kind, **end) == own);
        let forwarded = forward.map(|((_, end), _)| end.1);
        forwarded.or_else(|| self.mappings.get(&own).copied())
    }

    /// As [`Self::port_of`], of where a quoted packet went. No echo is asked of a guest from outside.
    fn port_quoted(&self, quoted: &Quoted) -> Option<u16> {
        let kind = kind_of(quoted).filter(|kind| *kind != Kind::Echo)?;
        self.port_of((kind, quoted.destination))
    }

    /// Whose an external port is.
    fn owner(&self, kind: Kind, external: End) -> Option<End> {
        if let Some(own) = self.forwards.get(&(kind, external)) {
            return Some(*own);
        }
        let mut mappings = self.mappings.iter();
        let found = mappings.find(|((of, own), port)| {
            *of == kind && **port == external.1 && external_of(&self.nat, own.0) == Some(external.0)
        });
        found.map(|((_, own), _)| *own)
    }
}

/// The uplink's address of the same version.
fn external_of(nat: &SourceNat, own: IpAddr) -> Option<IpAddr> {
    match own {
        IpAddr::V4(_) => nat.ipv4.map(IpAddr::from),
        IpAddr::V6(_) => nat.ipv6.map(IpAddr::from),
    }
}

fn kind_of(quoted: &Quoted) -> Option<Kind> {
    match (quoted.protocol, quoted.echo) {
        (6, _) => Some(Kind::Tcp),
        (17, _) => Some(Kind::Udp),
        (_, Some(_)) => Some(Kind::Echo),
        _ => None,
    }
}

/// The source address of an IP frame, whatever else is in it.
pub(super) fn source(frame: &[u8]) -> Option<IpAddr> {
    match frame[12..14] {
        [0x08, 0x00] => Some(<[u8; 4]>::try_from(frame.get(26..30)?).ok()?.into()),
        [0x86, 0xdd] => Some(<[u8; 16]>::try_from(frame.get(22..38)?).ok()?.into()),
        _ => None,
    }
}
