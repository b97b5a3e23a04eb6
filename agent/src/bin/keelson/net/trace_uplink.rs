//! What `keelson net trace` says of uplinks: what packets to the outside become, and where forwards lead.

use std::net::IpAddr;

use keelson_api::{Interface, Network, PortForward, Protocol, ServiceProtocol, VirtualMachine};

/// Where a forwarded port leads.
pub struct Forwarded<'a> {
    /// The guest.
    pub guest: &'a VirtualMachine,
    /// Its interface.
    pub interface: &'a Interface,
    /// Its port.
    pub port: u16,
    /// What is decided, for people.
    pub description: String,
}

impl Forwarded<'_> {
    /// Whether a guest reaches it from inside, by the uplink's address.
    pub fn turns_to(
        &self,
        networks: &[Network],
        guest: &VirtualMachine,
        interface: &Interface,
    ) -> bool {
        let mut networks = networks.iter();
        let network = networks.find(|network| network.metadata.name == interface.network);
        let isolated = network.is_none_or(|network| network.spec.isolated);
        let is_itself = guest.metadata.name == self.guest.metadata.name;
        interface.network == self.interface.network && (is_itself || !isolated)
    }
}

/// The forward that has the port of an address, if one is in force.
pub fn find<'a>(
    forwards: &[PortForward],
    guests: &'a [VirtualMachine],
    address: IpAddr,
    (protocol, port): (Protocol, u16),
) -> Option<Forwarded<'a>> {
    forwards.iter().find_map(|forward| {
        let spec = &forward.spec;
        let is_meant = match spec.protocol {
            ServiceProtocol::Tcp => protocol == Protocol::Tcp,
            ServiceProtocol::Udp => protocol == Protocol::Udp,
        };
        let mut addresses = forward.status.addresses.iter();
        let mut pairs = spec.pairs();
        let (_, target) = pairs.find(|(external, _)| *external == port)?;
        if !is_meant || !addresses.any(|at| at.ip() == address) {
            return None;
        }
        let guest = guests
            .iter()
            .find(|guest| guest.metadata.name == spec.guest)?;
        let mut interfaces = guest.spec.interfaces.iter();
        let interface = interfaces.find(|interface| {
            let name = spec.interface.as_ref();
            interface.network == spec.network && name.is_none_or(|name| *name == interface.name)
        })?;
        let name = &forward.metadata.name;
        let description = format!(
            "PortForward/{name} {port}/{}: leads to port {target} of {}/{}",
            spec.protocol, spec.guest, interface.name
        );
        Some(Forwarded {
            guest,
            interface,
            port: target,
            description,
        })
    })
}

/// What becomes of what an interface sends outside, for people; nothing where the host routes it as it is.
pub fn outward(networks: &[Network], interface: &Interface) -> Option<String> {
    let mut networks = networks.iter();
    let network = networks.find(|network| network.metadata.name == interface.network)?;
    let uplink = network.spec.uplink.as_ref()?;
    let mut conditions = network.status.conditions.iter();
    let ready = conditions.find(|condition| condition.kind == "UplinkReady");
    let message = ready.map_or("not looked at yet", |ready| ready.message.as_str());
    Some(format!(
        "Network/{} by {}: {message}",
        network.metadata.name, uplink.device
    ))
}
