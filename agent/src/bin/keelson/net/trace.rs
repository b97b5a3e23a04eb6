//! `keelson net trace`

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use keelson_api::{
    EgressRule, IngressRule, Interface, Kind, Network, Object, PortForward, Protocol, RuleParts,
    SecurityGroup, Service, VirtualMachine,
};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::line;

use super::trace_service::{self, ToService};
use super::trace_uplink;

/// Say which rule decides about a new connection, and why.
///
/// Of a service, whom a connection may go to, and what the rules of each say about it.
///
/// Reads the objects, not the packets: what they say is in force a moment after they changed. Answers
/// to what is allowed need no rule. Exit code 1 if it is dropped.
#[derive(Args)]
pub struct Trace {
    /// Who sends: a guest, a guest's interface as GUEST/INTERFACE, or an address.
    from: String,
    /// To whom: as FROM, or a service by its name or address.
    to: String,
    /// The destination port; the type with ICMP [default there: an echo request].
    port: Option<u16>,
    /// The protocol.
    #[arg(short, long, value_enum, default_value_t = TraceProtocol::Tcp)]
    protocol: TraceProtocol,
    /// Between the IPv6 addresses of guests instead of their IPv4 addresses.
    #[arg(short = '6', long)]
    ipv6: bool,
}

/// Protocols that can be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TraceProtocol {
    Tcp,
    Udp,
    Icmp,
}

/// The objects that decide.
struct Objects {
    guests: Vec<VirtualMachine>,
    groups: Vec<SecurityGroup>,
    networks: Vec<Network>,
    services: Vec<Service>,
    forwards: Vec<PortForward>,
}

/// One end: an address, and the interface that has it, if that is a guest's.
struct End<'a> {
    address: IpAddr,
    interface: Option<(&'a VirtualMachine, &'a Interface)>,
}

/// What is asked.
struct Question {
    protocol: Protocol,
    /// The port, or the ICMP type.
    number: u16,
}

impl Trace {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let objects = Objects::read(client).await?;
        let from = objects.end(&self.from, self.ipv6)?;
        let service = trace_service::find(&objects.services, &self.to, self.ipv6);
        // A guest of the same name comes first.
        let service = service.filter(|_| !objects.is_guest(&self.to));
        let to = match service {
            Some((_, address)) => End {
                address,
                interface: None,
            },
            None => objects.end(&self.to, self.ipv6)?,
        };
        let question = self.question(&from, &to)?;
        line(&format!(
            "{} from {} to {}",
            question,
            from.describe(),
            to.describe()
        ))?;
        let allowed = match service {
            Some((service, address)) => {
                objects.decide_service(&from, service, address, &question)?
            }
            None => objects.decide_forwarded(&from, &to, &question)?,
        };
        if allowed {
            line("passes")
        } else {
            Err(Failure::Other(anyhow!("it is dropped")))
        }
    }

    fn question(&self, from: &End<'_>, to: &End<'_>) -> Result<Question, Failure> {
        let other = |message: &str| Failure::Other(anyhow!(message.to_owned()));
        if from.address.is_ipv4() != to.address.is_ipv4() {
            let message = format!(
                "{} and {} are of different versions of IP",
                from.address, to.address
            );
            return Err(other(&message));
        }
        let (protocol, default) = match (self.protocol, to.address) {
            (TraceProtocol::Tcp, _) => (Protocol::Tcp, None),
            (TraceProtocol::Udp, _) => (Protocol::Udp, None),
            (TraceProtocol::Icmp, IpAddr::V4(_)) => (Protocol::Icmp, Some(8)),
            (TraceProtocol::Icmp, IpAddr::V6(_)) => (Protocol::Icmpv6, Some(128)),
        };
        let number = self
            .port
            .or(default)
            .ok_or_else(|| other("give the destination port"))?;
        if default.is_some() && number > 255 {
            return Err(other("an ICMP type is at most 255"));
        }
        Ok(Question { protocol, number })
    }
}

/// The hosts of two guests of one network, if these are different ones.
fn hosts<'a>(from: &End<'a>, to: &End<'a>) -> Option<[&'a str; 2]> {
    let ((one, one_interface), (other, other_interface)) = (from.interface?, to.interface?);
    let one = one.status.placement.as_ref()?.host.as_str();
    let other = other.status.placement.as_ref()?.host.as_str();
    (one_interface.network == other_interface.network && one != other).then_some([one, other])
}

impl Objects {
    async fn read(client: &mut Client) -> Result<Self, Failure> {
        let mut objects = Self {
            guests: Vec::new(),
            groups: Vec::new(),
            networks: Vec::new(),
            services: Vec::new(),
            forwards: Vec::new(),
        };
        for kind in [
            Kind::VirtualMachine,
            Kind::SecurityGroup,
            Kind::Network,
            Kind::Service,
            Kind::PortForward,
        ] {
            for object in client.list(kind).await? {
                match object {
                    Object::VirtualMachine(guest) => objects.guests.push(guest),
                    Object::SecurityGroup(group) => objects.groups.push(group),
                    Object::Network(network) => objects.networks.push(network),
                    Object::Service(service) => objects.services.push(service),
                    Object::PortForward(forward) => objects.forwards.push(forward),
                    Object::Host(_) | Object::Disk(_) => {}
                }
            }
        }
        Ok(objects)
    }

    fn is_guest(&self, name: &str) -> bool {
        self.guests.iter().any(|guest| guest.metadata.name == name)
    }

    /// Says what decides about a connection to a service: whom it may go to, and what each of these and
    /// the sender have to say. Whether it passes to all of them.
    fn decide_service(
        &self,
        from: &End<'_>,
        service: &Service,
        address: IpAddr,
        question: &Question,
    ) -> Result<bool, Failure> {
        let to = ToService::new(service, address, question.protocol, question.number);
        let to = match to.and_then(|to| to.serving().map(|serving| (to, serving))) {
            Err(problem) => {
                line(&format!("service: {problem}"))?;
                return Ok(false);
            }
            Ok(to) => to,
        };
        let (to, serving) = to;
        line(&format!("service: {}", to.describe()))?;
        let question = Question {
            protocol: question.protocol,
            number: to.target(),
        };
        let mut allowed = true;
        for guest in &self.guests {
            let mut interfaces = guest.spec.interfaces.iter();
            let interface = interfaces.find(|i| i.network == service.spec.network);
            let Some(interface) = interface.filter(|_| serving.contains(&&*guest.metadata.name))
            else {
                continue;
            };
            let own = if address.is_ipv6() {
                interface.address_v6.map(IpAddr::from)
            } else {
                interface.address.map(IpAddr::from)
            };
            let Some(own) = own else { continue };
            if own == from.address {
                line(&format!(
                    "{} to itself: its rules see the service's address, {address}",
                    named(guest, interface)
                ))?;
            }
            let backend = End {
                address: own,
                interface: Some((guest, interface)),
            };
            allowed &= self.decide(from, &backend, &question)?;
        }
        Ok(allowed)
    }

    /// Says what decides about a connection, where it leads by way of an uplink, and whether it passes.
    fn decide_forwarded(
        &self,
        from: &End<'_>,
        to: &End<'_>,
        question: &Question,
    ) -> Result<bool, Failure> {
        let outside = from.interface.is_none() && to.interface.is_none();
        let asked = (question.protocol, question.number);
        let found = trace_uplink::find(&self.forwards, &self.guests, to.address, asked);
        let found = found.filter(|forwarded| {
            let turns = |(guest, own)| forwarded.turns_to(&self.networks, guest, own);
            outside || from.interface.is_some_and(turns)
        });
        let Some(forwarded) = found else {
            let sender = from.interface.filter(|_| to.interface.is_none());
            let outward = sender.and_then(|(_, own)| trace_uplink::outward(&self.networks, own));
            if let Some(outward) = outward {
                line(&format!("uplink: {outward}"))?;
            }
            return self.decide(from, to, question);
        };
        line(&format!("uplink: {}", forwarded.description))?;
        let ipv6 = forwarded.interface.address_v6.map(IpAddr::from);
        let ipv4 = forwarded.interface.address.map(IpAddr::from);
        let own = if to.address.is_ipv6() { ipv6 } else { ipv4 };
        let target = End {
            address: own.unwrap_or(to.address),
            interface: Some((forwarded.guest, forwarded.interface)),
        };
        let inside = Question {
            protocol: question.protocol,
            number: forwarded.port,
        };
        if outside {
            return self.decide(from, &target, &inside);
        }
        // The rules of both see the uplink's address.
        let caller = End {
            address: to.address,
            interface: None,
        };
        let leaves = self.decide(from, to, question)?;
        Ok(self.decide(&caller, &target, &inside)? && leaves)
    }

    /// Says what decides about a connection between two ends, and whether it passes.
    fn decide(&self, from: &End<'_>, to: &End<'_>, question: &Question) -> Result<bool, Failure> {
        let mut allowed = true;
        if let Some(problem) = self.apart(from, to) {
            line(&format!("network: {problem}: dropped"))?;
            allowed = false;
        } else if let Some([one, other]) = hosts(from, to) {
            line(&format!(
                "hosts: by the tunnel from Host/{one} to Host/{other}"
            ))?;
        }
        if from.interface.is_none() && to.interface.is_none() {
            line("neither end is a guest's: no rule is asked")?;
        }
        if let Some((guest, interface)) = from.interface {
            let (verdict, reason) = self.egress(interface, to, question);
            line(&format!("egress of {}: {reason}", named(guest, interface)))?;
            allowed &= verdict;
        }
        if let Some((guest, interface)) = to.interface {
            let (verdict, reason) = self.ingress(interface, from, question);
            line(&format!("ingress of {}: {reason}", named(guest, interface)))?;
            allowed &= verdict;
        }
        Ok(allowed)
    }

    /// Reads an end as the user wrote it.
    fn end(&self, text: &str, ipv6: bool) -> Result<End<'_>, Failure> {
        let interfaces = self.guests.iter().flat_map(|guest| {
            let interfaces = guest.spec.interfaces.iter();
            interfaces.map(move |interface| (guest, interface))
        });
        if let Ok(address) = text.parse::<IpAddr>() {
            let mut holders = interfaces.filter(|(_, interface)| has(interface, address));
            return Ok(End {
                address,
                interface: holders.next(),
            });
        }
        let (name, interface_name) = match text.split_once('/') {
            Some((name, interface)) => (name, Some(interface)),
            None => (text, None),
        };
        let mut named = interfaces.filter(|(guest, interface)| {
            guest.metadata.name == name
                && interface_name.is_none_or(|wanted| interface.name == wanted)
        });
        let (guest, interface) = named.next().ok_or_else(|| {
            Failure::Other(anyhow!(
                "{text:?} is neither an address nor a guest with such an interface"
            ))
        })?;
        let address = if ipv6 {
            interface.address_v6.map(IpAddr::from)
        } else {
            interface.address.map(IpAddr::from)
        };
        let family = if ipv6 { "IPv6" } else { "IPv4" };
        let address =
            address.ok_or_else(|| Failure::Other(anyhow!("{text} has no {family} address")))?;
        Ok(End {
            address,
            interface: Some((guest, interface)),
        })
    }

    /// Why the two do not reach each other whatever the rules say.
    fn apart(&self, from: &End<'_>, to: &End<'_>) -> Option<String> {
        let ((_, one), (_, other)) = (from.interface?, to.interface?);
        let network = |name: &str| self.networks.iter().find(|n| n.metadata.name == name);
        if one.network != other.network {
            return None;
        }
        let (name, network) = (&one.network, network(&one.network)?);
        if network.spec.isolated {
            return Some(format!("Network/{name} keeps its guests apart"));
        }
        let [one, other] = hosts(from, to).filter(|_| network.spec.overlay.is_none())?;
        Some(format!(
            "Network/{name} has no spec.overlay, and the guests are on Host/{one} and Host/{other}"
        ))
    }

    fn groups_of<'a>(
        &'a self,
        interface: &'a Interface,
    ) -> impl Iterator<Item = &'a SecurityGroup> {
        let names = interface.security_groups.iter();
        names.filter_map(|name| {
            let mut groups = self.groups.iter();
            groups.find(|group| group.metadata.name == *name)
        })
    }

    fn egress(&self, interface: &Interface, to: &End<'_>, question: &Question) -> (bool, String) {
        let mut restricted = Vec::new();
        for group in self.groups_of(interface) {
            let Some(rules) = &group.spec.egress else {
                continue;
            };
            restricted.push(group.metadata.name.as_str());
            let mut rules = rules.iter().map(EgressRule::parts).enumerate();
            if let Some((index, _)) = rules.find(|(_, rule)| self.matches(*rule, to, question)) {
                let name = &group.metadata.name;
                return (
                    true,
                    format!("allowed by SecurityGroup/{name} spec.egress[{index}]"),
                );
            }
        }
        if restricted.is_empty() {
            return (
                true,
                "allowed, since none of its groups has egress rules".into(),
            );
        }
        let names = restricted.join(", ");
        (
            false,
            format!("dropped, since no egress rule of its groups allows it ({names})"),
        )
    }

    fn ingress(
        &self,
        interface: &Interface,
        from: &End<'_>,
        question: &Question,
    ) -> (bool, String) {
        for group in self.groups_of(interface) {
            let mut rules = group
                .spec
                .ingress
                .iter()
                .map(IngressRule::parts)
                .enumerate();
            if let Some((index, _)) = rules.find(|(_, rule)| self.matches(*rule, from, question)) {
                let name = &group.metadata.name;
                return (
                    true,
                    format!("allowed by SecurityGroup/{name} spec.ingress[{index}]"),
                );
            }
        }
        let names = interface.security_groups.join(", ");
        let reason = if names.is_empty() {
            "dropped, since it is in no security group".to_owned()
        } else {
            format!("dropped, since no ingress rule of its groups allows it ({names})")
        };
        (false, reason)
    }

    fn matches(&self, rule: RuleParts<'_>, peer: &End<'_>, question: &Question) -> bool {
        let protocol = rule.protocol == Protocol::Any || rule.protocol == question.protocol;
        let port = rule.ports.is_empty()
            || rule
                .ports
                .iter()
                .any(|range| (range.first..=range.last).contains(&question.number));
        let icmp_type = rule.icmp_types.is_empty()
            || rule.icmp_types.iter().any(|icmp| {
                // Without a code the question is about code 0, as an echo request has it.
                u16::from(icmp.number) == question.number && icmp.code.is_none_or(|code| code == 0)
            });
        protocol && port && icmp_type && self.is_peer(rule, peer.address)
    }

    fn is_peer(&self, rule: RuleParts<'_>, address: IpAddr) -> bool {
        if rule.networks.is_empty() && rule.groups.is_empty() {
            return true;
        }
        let named: BTreeSet<&str> = rule.groups.iter().map(String::as_str).collect();
        let is_member = |interface: &Interface| {
            let mut groups = interface.security_groups.iter();
            groups.any(|group| named.contains(group.as_str()))
        };
        rule.networks
            .iter()
            .any(|network| network.contains(&address))
            || self
                .guests
                .iter()
                .flat_map(|guest| &guest.spec.interfaces)
                .any(|interface| has(interface, address) && is_member(interface))
    }
}

impl End<'_> {
    fn describe(&self) -> String {
        match self.interface {
            Some((guest, interface)) => {
                format!("{} ({})", named(guest, interface), self.address)
            }
            None => self.address.to_string(),
        }
    }
}

impl std::fmt::Display for Question {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.protocol {
            Protocol::Tcp => write!(formatter, "tcp port {}", self.number),
            Protocol::Udp => write!(formatter, "udp port {}", self.number),
            _ => write!(formatter, "icmp type {}", self.number),
        }
    }
}

fn has(interface: &Interface, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ipv4) => interface.address == Some(ipv4),
        IpAddr::V6(ipv6) => interface.address_v6 == Some(ipv6),
    }
}

fn named(guest: &VirtualMachine, interface: &Interface) -> String {
    format!("{}/{}", guest.metadata.name, interface.name)
}
