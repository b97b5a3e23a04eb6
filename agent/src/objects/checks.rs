//! What an object must be, given the host and the other objects. Each mistake is reported with its
//! field; nothing is changed.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use keelson_api::{
    Disk, DiskSpec, Host, Interface, Kind, Network, NetworkSpec, Object, SecurityGroup, Service,
    VirtualMachine,
};

use super::store::World;

/// Checks a disk against its image on this host, and against what it was before.
pub(super) fn disk(disk: &Disk, before: Option<&Disk>, report: &mut impl FnMut(&str, String)) {
    let spec = &disk.spec;
    if let Some(before) = before {
        unchanged(&before.spec, spec, report);
    }
    if let Some(base) = &spec.base {
        if let Some(path) = &base.path {
            image("spec.base.path", path, report);
        }
        if let Some(file) = &base.ca_file
            && let Err(error) = fs::File::open(file)
        {
            report("spec.base.caFile", format!("{}: {error}", file.display()));
        }
        if spec.read_only && base.path.is_some() && !spec.path.exists() {
            let message = "an overlay that guests can't write to shows its base; use that instead";
            report("spec.readOnly", message.into());
        }
    }
    if let Some(encryption) = &spec.encryption {
        key_file(&encryption.key_file, report);
    }
    // With a base, it is created where there is none.
    if spec.base.is_some() && !spec.path.exists() {
        match spec.path.parent() {
            Some(folder) if folder.is_dir() => {}
            _ => report(
                "spec.path",
                format!(
                    "{} can't be created: there is no such folder",
                    spec.path.display()
                ),
            ),
        }
        return;
    }
    image("spec.path", &spec.path, report);
}

/// Checks a disk of another host, whose files can't be looked at here.
pub(super) fn disk_elsewhere(
    disk: &Disk,
    before: Option<&Disk>,
    report: &mut impl FnMut(&str, String),
) {
    if let Some(before) = before {
        unchanged(&before.spec, &disk.spec, report);
    }
}

/// Checks that a disk that a guest refers to stays where it is: the guest was placed accordingly.
pub(super) fn place_unchanged(
    before: &Disk,
    disk: &Disk,
    world: &World,
    report: &mut impl FnMut(&str, String),
) {
    let moved = before.spec.host.is_some() && before.spec.host != disk.spec.host;
    if !moved && before.spec.shared == disk.spec.shared {
        return;
    }
    let field = if moved { "spec.host" } else { "spec.shared" };
    for stored in world.of_kind(Kind::VirtualMachine) {
        let Object::VirtualMachine(guest) = &stored.object else {
            continue;
        };
        if guest
            .spec
            .disks
            .iter()
            .any(|d| d.disk == disk.metadata.name)
        {
            let name = &guest.metadata.name;
            report(
                field,
                format!("can't be changed while VirtualMachine/{name} has the disk"),
            );
        }
    }
}

/// Checks that a guest's disks that aren't shared are all on one host, which is also the guest's.
pub(super) fn disks_on_one_host(
    guest: &VirtualMachine,
    after: &World,
    report: &mut impl FnMut(&str, String),
) {
    let mut place = guest
        .spec
        .host
        .clone()
        .map(|host| (host, "spec.host".to_owned()));
    for (index, attachment) in guest.spec.disks.iter().enumerate() {
        let Some(Object::Disk(disk)) = after.get::<Disk>(&attachment.disk) else {
            continue;
        };
        let Some(host) = disk.spec.host.filter(|_| !disk.spec.shared) else {
            continue;
        };
        match &place {
            Some((other, by)) if *other != host => report(
                &format!("spec.disks[{index}].disk"),
                format!(
                    "Disk/{} is on {host}, but {by} says {other}",
                    attachment.disk
                ),
            ),
            Some(_) => {}
            None => place = Some((host, format!("Disk/{}", attachment.disk))),
        }
    }
}

/// Checks that there is a host which has enough for the guest if it has nothing else to run.
pub(super) fn fits_a_host(
    guest: &VirtualMachine,
    hosts: &[Host],
    report: &mut impl FnMut(&str, String),
) {
    let spec = &guest.spec;
    if let Some(name) = &spec.host
        && !hosts.iter().any(|host| host.metadata.name == *name)
    {
        report("spec.host", no_such_host(name));
        return;
    }
    let allowed = |host: &&Host| {
        let labels = &host.metadata.labels;
        let chosen = spec
            .host
            .as_ref()
            .is_none_or(|name| host.metadata.name == *name);
        chosen
            && spec
                .host_selector
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
    };
    let allowed: Vec<_> = hosts.iter().filter(allowed).collect();
    if allowed.is_empty() {
        let message =
            "no host that it may run on has all of these labels; see `keelson get hosts -o yaml`";
        report("spec.hostSelector", message.into());
        return;
    }
    let available = |host: &&Host| {
        let allocatable = host.status.allocatable?;
        Some(match spec.hugepages {
            None => allocatable.memory.bytes(),
            Some(keelson_api::HugepageSize::Size2Mi) => allocatable.hugepages_2mi << 21,
            Some(keelson_api::HugepageSize::Size1Gi) => allocatable.hugepages_1gi << 30,
        })
    };
    let most = allowed.iter().filter_map(available).max().unwrap_or(0);
    if spec.memory.bytes() > most {
        let what = if spec.hugepages.is_some() {
            "huge pages"
        } else {
            "memory"
        };
        let message = format!(
            "is {}; of the hosts that it may run on, none has more than {} MiB of {what} for guests",
            spec.memory,
            most >> 20
        );
        report("spec.memory", message);
    }
}

/// What to say of a host that there isn't.
pub(super) fn no_such_host(name: &str) -> String {
    format!("Host/{name} does not exist; `keelson get hosts` lists those whose agents have come up")
}

// What an overlay is made of is settled when it is created.
fn unchanged(before: &DiskSpec, spec: &DiskSpec, report: &mut impl FnMut(&str, String)) {
    let message = "can't be changed; delete the disk, and create another one at another path";
    let same_image = before.path == spec.path;
    let same_base = match (&before.base, &spec.base) {
        (Some(before), Some(base)) => before.is_same_image(base),
        (before, base) => before.is_none() || base.is_some(),
    };
    if same_image && !same_base {
        report("spec.base", message.into());
    }
    if same_image && before.is_overlay() != spec.is_overlay() {
        report("spec.format", message.into());
    }
    if same_image && before.encryption.is_some() != spec.encryption.is_some() {
        report("spec.encryption", message.into());
    }
    if same_image
        && let (Some(had), Some(has)) = (before.size, spec.size)
        && has < had
    {
        let message = format!("is {has} and was {had}; disks only grow");
        report("spec.size", message);
    }
}

fn image(field: &str, path: &Path, report: &mut impl FnMut(&str, String)) {
    match fs::metadata(path) {
        Err(error) => report(field, format!("{}: {error}", path.display())),
        Ok(metadata) if metadata.is_dir() => report(
            field,
            format!(
                "{} is a directory; give an image or a block device",
                path.display()
            ),
        ),
        Ok(metadata) if !metadata.is_file() && !metadata.file_type().is_block_device() => report(
            field,
            format!("{} is neither a file nor a block device", path.display()),
        ),
        Ok(metadata) if metadata.is_file() && metadata.len() < 512 => report(
            field,
            format!(
                "{} is {} bytes large; a disk has at least 512",
                path.display(),
                metadata.len()
            ),
        ),
        Ok(_) => {}
    }
}

fn key_file(path: &Path, report: &mut impl FnMut(&str, String)) {
    let field = "spec.encryption.keyFile";
    match fs::metadata(path) {
        Err(error) => report(field, format!("{}: {error}", path.display())),
        Ok(metadata) if !metadata.is_file() => {
            report(field, format!("{} is no file", path.display()));
        }
        Ok(metadata) if !matches!(metadata.len(), 32 | 64) => report(
            field,
            format!(
                "{} has {} bytes; a key has 32 (AES-128) or 64 (AES-256), and no newline",
                path.display(),
                metadata.len()
            ),
        ),
        Ok(metadata) if metadata.mode() & 0o077 != 0 => report(
            field,
            format!(
                "{} can be read by others; give it the mode 600",
                path.display()
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
        if let (Some(ours), Some(theirs)) = (network.spec.subnet, other.spec.subnet)
            && (ours.contains(&theirs.network()) || theirs.contains(&ours.network()))
            && other.metadata.name != network.metadata.name
        {
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
            if interface.network == network.metadata.name {
                let addresses = (interface.address, interface.address_v6);
                still_fits(network, &stored.object, addresses, report);
                if let Some(problem) = refuse_slaac(&network.spec, interface) {
                    let name = &guest.metadata.name;
                    report(
                        "spec",
                        format!("{problem}, and VirtualMachine/{name} holds it"),
                    );
                }
            }
        }
    }
    for stored in after.of_kind(Kind::Service) {
        if let Object::Service(service) = &stored.object
            && service.spec.network == network.metadata.name
        {
            let addresses = (service.spec.address, service.spec.address_v6);
            still_fits(network, &stored.object, addresses, report);
        }
    }
}

/// Checks that addresses which `holder` has are still ones of the network.
fn still_fits(
    network: &Network,
    holder: &Object,
    (ipv4, ipv6): (Option<Ipv4Addr>, Option<Ipv6Addr>),
    report: &mut impl FnMut(&str, String),
) {
    let spec = &network.spec;
    let ipv4 = ipv4.and_then(|address| spec.refuse_address(address));
    let ipv6 = ipv6.and_then(|address| spec.refuse_address_v6(address));
    for problem in ipv4.into_iter().chain(ipv6) {
        let (kind, name) = (holder.kind(), &holder.metadata().name);
        report("spec", format!("{problem}, and {kind}/{name} holds it"));
    }
}

/// Why an interface's IPv6 address is not the one that the guest makes of its MAC address, where it does.
pub(super) fn refuse_slaac(network: &NetworkSpec, interface: &Interface) -> Option<String> {
    let made = network.slaac_address(interface.mac?)?;
    let address = interface.address_v6.filter(|address| *address != made)?;
    Some(format!(
        "{address} is not the address {made} that a guest makes of its MAC address in a network with \
         spec.slaac; leave it out"
    ))
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

/// Checks a service against the guests that it names, and against the other services.
pub(super) fn service(service: &Service, after: &World, report: &mut impl FnMut(&str, String)) {
    let spec = &service.spec;
    let in_network = |guest: &VirtualMachine| {
        let mut interfaces = guest.spec.interfaces.iter();
        interfaces.any(|interface| interface.network == spec.network)
    };
    let lists = [("guests", &spec.guests), ("draining", &spec.draining)];
    let named = lists.into_iter().flat_map(|(field, list)| {
        let list = list.iter().enumerate();
        list.map(move |(index, name)| (format!("spec.{field}[{index}]"), name))
    });
    for (field, name) in named {
        match after.get::<VirtualMachine>(name) {
            Some(Object::VirtualMachine(guest)) if in_network(&guest) => {}
            Some(_) => report(
                &field,
                format!("{name} has no interface in Network/{}", spec.network),
            ),
            None => report(&field, missing(Kind::VirtualMachine, name)),
        }
    }
    let guests = after.of_kind(Kind::VirtualMachine);
    let selected = guests.filter(|stored| match &stored.object {
        Object::VirtualMachine(guest) => {
            let metadata = &guest.metadata;
            spec.selects(&metadata.name, &metadata.labels) && in_network(guest)
        }
        _ => false,
    });
    let selected = selected.count();
    if selected > keelson_ebpf::MAX_BACKENDS {
        let message = format!(
            "selects {selected} guests; at most {} share a service",
            keelson_ebpf::MAX_BACKENDS
        );
        report("spec.selector", message);
    }
    // Of both versions of IP each port is one.
    let ports = after
        .of_kind(Kind::Service)
        .map(|stored| match &stored.object {
            Object::Service(service) => service.spec.ports.len() * 2,
            _ => 0,
        });
    let ports: usize = ports.sum();
    if ports > keelson_ebpf::MAX_SERVICES {
        let message = format!(
            "brings the services' ports to {}; a host has room for {}",
            ports / 2,
            keelson_ebpf::MAX_SERVICES / 2
        );
        report("spec.ports", message);
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
