//! What an object must be, given the host and the other objects. Each mistake is reported with its
//! field; nothing is changed.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use keelson_api::{Disk, Kind, Network, Object, SecurityGroup};

use super::store::World;

/// Checks a disk against its image on this host.
pub(super) fn disk(disk: &Disk, report: &mut impl FnMut(&str, String)) {
    let path = &disk.spec.path;
    match fs::metadata(path) {
        Err(error) => report("spec.path", format!("{}: {error}", path.display())),
        Ok(metadata) if metadata.is_dir() => report(
            "spec.path",
            format!(
                "{} is a directory; give a raw image or a block device",
                path.display()
            ),
        ),
        Ok(metadata) if !metadata.is_file() && !metadata.file_type().is_block_device() => report(
            "spec.path",
            format!("{} is neither a file nor a block device", path.display()),
        ),
        Ok(metadata) if metadata.is_file() && metadata.len() < 512 => report(
            "spec.path",
            format!(
                "{} is {} bytes large; a disk has at least 512",
                path.display(),
                metadata.len()
            ),
        ),
        Ok(_) => {}
    }
}

/// Checks a network against the other networks and the addresses that guests hold in it.
pub(super) fn network(network: &Network, after: &World, report: &mut impl FnMut(&str, String)) {
    for stored in after.of_kind(Kind::Network) {
        let Object::Network(other) = &stored.object else {
            continue;
        };
        let (ours, theirs) = (network.spec.subnet, other.spec.subnet);
        if let (Some(ours), Some(theirs)) = (network.spec.subnet_v6, other.spec.subnet_v6)
            && (ours.contains(&theirs.network()) || theirs.contains(&ours.network()))
            && other.metadata.name != network.metadata.name
        {
            report(
                "spec.subnetV6",
                format!(
                    "{ours} overlaps {theirs} of Network/{}",
                    other.metadata.name
                ),
            );
        }
        let overlap = ours.contains(&theirs.network()) || theirs.contains(&ours.network());
        if overlap && other.metadata.name != network.metadata.name {
            report(
                "spec.subnet",
                format!(
                    "{ours} overlaps {theirs} of Network/{}",
                    other.metadata.name
                ),
            );
        }
    }
    for stored in after.of_kind(Kind::VirtualMachine) {
        let Object::VirtualMachine(guest) = &stored.object else {
            continue;
        };
        for interface in &guest.spec.interfaces {
            if interface.network != network.metadata.name {
                continue;
            }
            let spec = &network.spec;
            let ipv4 = interface.address.and_then(|a| spec.refuse_address(a));
            let ipv6 = interface.address_v6.and_then(|a| spec.refuse_address_v6(a));
            for problem in ipv4.into_iter().chain(ipv6) {
                report(
                    "spec",
                    format!(
                        "{problem}, and VirtualMachine/{} holds it",
                        guest.metadata.name
                    ),
                );
            }
        }
    }
}

/// Checks that the groups that a group's rules name exist.
pub(super) fn security_group(
    group: &SecurityGroup,
    after: &World,
    report: &mut impl FnMut(&str, String),
) {
    for (field, name) in group.spec.references() {
        if after.get::<SecurityGroup>(name).is_none() {
            report(&field, missing(Kind::SecurityGroup, name));
        }
    }
}

/// Checks that a file that the host must have is there.
pub(super) fn file(field: &str, path: &Path, report: &mut impl FnMut(&str, String)) {
    match fs::metadata(path) {
        Err(error) => report(field, format!("{}: {error}", path.display())),
        Ok(metadata) if !metadata.is_file() => {
            report(field, format!("{} is not a file", path.display()));
        }
        Ok(_) => {}
    }
}

/// What to say of a reference to nothing.
pub(super) fn missing(kind: Kind, name: &str) -> String {
    format!("{kind}/{name} does not exist; apply it first or in the same manifest")
}
