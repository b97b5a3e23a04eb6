//! What objects refer to.

use keelson_api::{Kind, Object};

/// What an object refers to.
pub fn references(object: &Object) -> impl Iterator<Item = (Kind, &str)> {
    let guest = match object {
        Object::VirtualMachine(guest) => Some(guest),
        _ => None,
    };
    let group = match object {
        Object::SecurityGroup(group) => Some(group),
        _ => None,
    };
    let groups = group.into_iter().flat_map(|group| {
        let others = group.spec.references();
        // A group whose rules name itself does not stand in its own way.
        others
            .map(|(_, name)| name)
            .filter(|name| *name != group.metadata.name)
            .map(|name| (Kind::SecurityGroup, name))
    });
    let guests = guest.into_iter().flat_map(|guest| {
        let disks = guest
            .spec
            .disks
            .iter()
            .map(|disk| (Kind::Disk, disk.disk.as_str()));
        let interfaces = guest.spec.interfaces.iter().flat_map(|interface| {
            let groups = interface.security_groups.iter();
            groups
                .map(|group| (Kind::SecurityGroup, group.as_str()))
                .chain([(Kind::Network, interface.network.as_str())])
        });
        disks.chain(interfaces)
    });
    let in_network = match object {
        Object::Service(service) => Some((Kind::Network, service.spec.network.as_str())),
        Object::PortForward(forward) => Some((Kind::Network, forward.spec.network.as_str())),
        _ => None,
    };
    guests.chain(groups).chain(in_network)
}
