//! What an object has of its predecessor, and how it differs from that.

use jiff::Timestamp;
use keelson_api::{
    DiskStatus, HostStatus, NetworkStatus, Object, PortForwardStatus, SecurityGroupStatus,
    ServiceStatus, VirtualMachine, VirtualMachineStatus,
};

use super::super::store::World;
use super::{Action, Applied};

/// Takes over what an earlier version of the object has and a manifest does not say.
pub fn inherit(world: &World, mut object: Object, errors: &mut Vec<String>) -> Object {
    let key = (object.kind(), object.metadata().name.clone());
    let Some(known) = world.objects.get(&key).map(|stored| &stored.object) else {
        let metadata = object.metadata_mut();
        metadata.uid = uuid::Uuid::new_v4().to_string();
        metadata.generation = 1;
        metadata.creation_timestamp = Some(Timestamp::now());
        metadata.deletion_timestamp = None;
        metadata.resource_version = String::new();
        clear_status(&mut object);
        return object;
    };
    if known.metadata().deletion_timestamp.is_some() {
        errors.push(format!(
            "{}/{}: is being deleted; apply it again later",
            key.0, key.1
        ));
    }
    let labels = object.metadata().labels.clone();
    let annotations = object.metadata().annotations.clone();
    *object.metadata_mut() = known.metadata().clone();
    object.metadata_mut().labels = labels;
    object.metadata_mut().annotations = annotations;
    object.take_status(known);
    match (&mut object, known) {
        (Object::VirtualMachine(guest), Object::VirtualMachine(known)) => {
            inherit_allocations(guest, known);
        }
        (Object::Service(service), Object::Service(known)) => {
            let (spec, known) = (&mut service.spec, &known.spec);
            if spec.network == known.network {
                spec.address = spec.address.or(known.address);
                spec.address_v6 = spec.address_v6.or(known.address_v6);
            }
        }
        (Object::Network(network), Object::Network(known)) => {
            if let (Some(overlay), Some(known)) = (&mut network.spec.overlay, known.spec.overlay) {
                overlay.vni = overlay.vni.or(known.vni);
            }
        }
        // A disk that says nothing stays where it is.
        (Object::Disk(disk), Object::Disk(known)) if !disk.spec.shared => {
            disk.spec.host = disk.spec.host.take().or_else(|| known.spec.host.clone());
        }
        _ => {}
    }
    object
}

/// Compares with the earlier version and counts the generation.
pub fn finish(world: &World, mut object: Object) -> Applied {
    let key = (object.kind(), object.metadata().name.clone());
    let Some(known) = world.objects.get(&key).map(|stored| &stored.object) else {
        return Applied {
            action: Action::Created,
            object,
        };
    };
    let same_spec = object.same_spec(known);
    let same = same_spec && object.metadata() == known.metadata();
    if !same_spec {
        object.metadata_mut().generation += 1;
    }
    Applied {
        action: if same {
            Action::Unchanged
        } else {
            Action::Configured
        },
        object,
    }
}

fn clear_status(object: &mut Object) {
    match object {
        Object::Host(host) => host.status = HostStatus::default(),
        Object::Disk(disk) => disk.status = DiskStatus::default(),
        Object::Network(network) => network.status = NetworkStatus::default(),
        Object::PortForward(forward) => forward.status = PortForwardStatus::default(),
        Object::SecurityGroup(group) => group.status = SecurityGroupStatus::default(),
        Object::Service(service) => service.status = ServiceStatus::default(),
        Object::VirtualMachine(guest) => guest.status = VirtualMachineStatus::default(),
    }
}

/// An interface that asks for no address keeps the one that it was given.
fn inherit_allocations(guest: &mut VirtualMachine, known: &VirtualMachine) {
    for interface in &mut guest.spec.interfaces {
        let before =
            known.spec.interfaces.iter().find(|before| {
                before.name == interface.name && before.network == interface.network
            });
        if let Some(before) = before {
            interface.address = interface.address.or(before.address);
            interface.address_v6 = interface.address_v6.or(before.address_v6);
            interface.mac = interface.mac.or(before.mac);
        }
    }
}
