//! What uplinks and forwarded ports must be, given the host and the other objects.

use std::cell::OnceCell;

use keelson_api::{
    Interface, Kind, Network, Object, PortForward, PortRange, ServiceProtocol, Uplink,
    VirtualMachine,
};

use super::checks::missing;
use super::store::World;
use crate::error::Result;
use crate::host::HostPorts;

/// The ports that this host uses itself, read when first asked for; `None` where the objects may be for other hosts.
pub(super) type OwnPorts<'a> = Option<&'a OnceCell<Result<HostPorts>>>;

/// Checks a network's uplink against those of other networks, against forwards, and against what the host uses.
pub(super) fn network(
    network: &Network,
    after: &World,
    ports: OwnPorts<'_>,
    report: &mut impl FnMut(&str, String),
) {
    let name = &network.metadata.name;
    let Some(uplink) = &network.spec.uplink else {
        for forward in forwards(after).filter(|forward| forward.spec.network == *name) {
            let message = format!("is used by PortForward/{}", forward.metadata.name);
            report("spec.uplink", message);
        }
        return;
    };
    let range = uplink.source_nat.ports;
    for stored in after.of_kind(Kind::Network) {
        let Object::Network(other) = &stored.object else {
            continue;
        };
        if let Some(theirs) = &other.spec.uplink
            && other.metadata.name != *name
            && share_an_address(uplink, theirs)
            && theirs.source_nat.ports != range
        {
            let message = format!(
                "is {range}, but Network/{} has {} of the same address; give both the same",
                other.metadata.name, theirs.source_nat.ports
            );
            report("spec.uplink.sourceNat.ports", message);
        }
    }
    refuse_used(None, range, "spec.uplink.sourceNat.ports", ports, report);
}

/// Checks a forward against its guest, against other forwards, and against what the host uses.
pub(super) fn port_forward(
    forward: &PortForward,
    after: &World,
    ports: OwnPorts<'_>,
    report: &mut impl FnMut(&str, String),
) {
    let spec = &forward.spec;
    let Some(Object::Network(network)) = after.get::<Network>(&spec.network) else {
        report("spec.network", missing(Kind::Network, &spec.network));
        return;
    };
    let Some(uplink) = network.spec.uplink else {
        let message = format!("Network/{} has no spec.uplink; give it one", spec.network);
        report("spec.network", message);
        return;
    };
    let Some(Object::VirtualMachine(guest)) = after.get::<VirtualMachine>(&spec.guest) else {
        report("spec.guest", missing(Kind::VirtualMachine, &spec.guest));
        return;
    };
    let Some(interface) = interface_of(forward, &guest.spec.interfaces) else {
        let (field, what) = match &spec.interface {
            Some(name) => ("spec.interface", format!("no interface {name}")),
            None => ("spec.guest", "no interface".into()),
        };
        let message = format!("{} has {what} in Network/{}", spec.guest, spec.network);
        report(field, message);
        return;
    };
    let this = Placed {
        forward,
        uplink: &uplink,
        interface: &interface.name,
        host: guest.spec.host.as_deref(),
    };
    for other in forwards(after) {
        if other.metadata.name != forward.metadata.name {
            this.refuse_conflict(other, after, report);
        }
    }
    let (protocol, range) = (Some(spec.protocol), spec.ports);
    refuse_used(protocol, range, "spec.ports", ports, report);
}

/// The interface that a forward leads to, of its guest's.
pub fn interface_of<'a>(
    forward: &PortForward,
    interfaces: &'a [Interface],
) -> Option<&'a Interface> {
    let spec = &forward.spec;
    let is_meant = |interface: &&Interface| {
        let by_name = spec.interface.as_ref();
        interface.network == spec.network && by_name.is_none_or(|name| *name == interface.name)
    };
    interfaces.iter().find(is_meant)
}

/// A forward and where it leads.
struct Placed<'a> {
    forward: &'a PortForward,
    uplink: &'a Uplink,
    interface: &'a str,
    /// The host that the guest must run on.
    host: Option<&'a str>,
}

impl Placed<'_> {
    fn refuse_conflict(
        &self,
        other: &PortForward,
        after: &World,
        report: &mut impl FnMut(&str, String),
    ) {
        let (ours, theirs) = (&self.forward.spec, &other.spec);
        let Some(Object::Network(network)) = after.get::<Network>(&theirs.network) else {
            return;
        };
        let (Some(uplink), Some(Object::VirtualMachine(guest))) = (
            &network.spec.uplink,
            after.get::<VirtualMachine>(&theirs.guest),
        ) else {
            return;
        };
        if ours.protocol != theirs.protocol {
            return;
        }
        // Ports of different hosts don't meet, if it is sure that they stay different.
        let apart =
            matches!((self.host, guest.spec.host.as_deref()), (Some(one), Some(two)) if one != two);
        if !apart && share_an_address(self.uplink, uplink) && overlap(ours.ports, theirs.ports) {
            let message = format!(
                "{}/{} of {} is forwarded by PortForward/{}",
                theirs.ports, theirs.protocol, uplink.device, other.metadata.name
            );
            report("spec.ports", message);
        }
        let leads_to = interface_of(other, &guest.spec.interfaces);
        let same_interface = ours.guest == theirs.guest
            && leads_to.is_some_and(|interface| interface.name == self.interface);
        if same_interface && overlap(ours.targets(), theirs.targets()) {
            let message = format!(
                "PortForward/{} leads to {}/{} of {} already; a guest's port can have one forward",
                other.metadata.name,
                theirs.targets(),
                theirs.protocol,
                theirs.guest
            );
            report("spec.targetPort", message);
        }
    }
}

fn refuse_used(
    protocol: Option<ServiceProtocol>,
    range: PortRange,
    field: &str,
    ports: OwnPorts<'_>,
    report: &mut impl FnMut(&str, String),
) {
    match ports.map(|ports| ports.get_or_init(HostPorts::read)) {
        None => {}
        Some(Err(error)) => report(field, format!("can't be checked: {error}")),
        Some(Ok(ports)) => {
            if let Some(problem) = ports.refuse(protocol, range) {
                report(field, problem);
            }
        }
    }
}

fn forwards(after: &World) -> impl Iterator<Item = &PortForward> {
    let forwards = after.of_kind(Kind::PortForward);
    forwards.filter_map(|stored| match &stored.object {
        Object::PortForward(forward) => Some(forward),
        _ => None,
    })
}

/// Whether two uplinks may be the same address: what isn't given is the device's first.
fn share_an_address(one: &Uplink, other: &Uplink) -> bool {
    let may_be_same_v4 =
        one.address == other.address || one.address.is_none() != other.address.is_none();
    let may_be_same_v6 = one.address_v6 == other.address_v6
        || one.address_v6.is_none() != other.address_v6.is_none();
    one.device == other.device && (may_be_same_v4 || may_be_same_v6)
}

fn overlap(one: PortRange, other: PortRange) -> bool {
    one.first <= other.last && other.first <= one.last
}
