//! Whether an object fits to the hosts that there are, and to this one.

use keelson_api::{Disk, Host, Kind, Object, PlacementState, SecurityGroup, VirtualMachine};

use super::super::checks;
use super::super::store::World;
use super::Admission;

impl Admission<'_> {
    /// Whether what is on the host `host` can be looked at here.
    pub(super) fn is_here(&self, host: Option<&str>) -> bool {
        self.fleet.is_exclusive() || host == Some(self.fleet.host())
    }

    /// A disk that isn't shared is on one host: this one, unless it says another one.
    pub(super) fn place_disk(
        &self,
        disk: &mut Disk,
        after: &World,
        report: &mut impl FnMut(&str, String),
    ) {
        if self.fleet.is_exclusive() || disk.spec.shared {
            return;
        }
        let host = disk
            .spec
            .host
            .get_or_insert_with(|| self.fleet.host().to_owned());
        if after.get::<Host>(host).is_none() {
            let message = checks::no_such_host(host);
            report("spec.host", message);
        }
    }

    /// Whether there is a host that the guest can be placed on, as far as that does not change from day
    /// to day.
    pub(super) fn check_placement(
        &self,
        guest: &VirtualMachine,
        before: Option<&VirtualMachine>,
        after: &World,
        report: &mut impl FnMut(&str, String),
    ) {
        let spec = &guest.spec;
        if self.fleet.is_exclusive() {
            if spec
                .host
                .as_deref()
                .is_some_and(|host| host != self.fleet.host())
            {
                let message = format!(
                    "is another host than this one, {}, to which the state store belongs",
                    self.fleet.host()
                );
                report("spec.host", message);
            }
            return;
        }
        checks::disks_on_one_host(guest, after, report);
        let placement = before.and_then(|before| before.status.placement.as_ref());
        if let (Some(placement), Some(host)) = (placement, &spec.host)
            && placement.host != *host
            && matches!(
                placement.state,
                PlacementState::Held | PlacementState::Leased
            )
        {
            let message = format!(
                "is {host}, but it runs on {}; stop it first",
                placement.host
            );
            report("spec.host", message);
        }
        let hosts: Vec<Host> = after
            .of_kind(Kind::Host)
            .filter_map(|stored| match &stored.object {
                Object::Host(host) => Some(host.clone()),
                _ => None,
            })
            .collect();
        checks::fits_a_host(guest, &hosts, report);
    }

    /// Whether all is there that the guest refers to, as far as it can be looked at here.
    pub(super) fn check_guest(
        &self,
        guest: &VirtualMachine,
        after: &World,
        report: &mut impl FnMut(&str, String),
    ) {
        if self.is_here(guest.spec.host.as_deref()) {
            if guest.spec.memory.bytes() > self.inventory.memory_bytes {
                report(
                    "spec.memory",
                    format!(
                        "is {}; this host has {}",
                        guest.spec.memory,
                        self.inventory.memory()
                    ),
                );
            }
            checks::file("spec.kernel.image", &guest.spec.kernel.image, report);
            if let Some(initrd) = &guest.spec.kernel.initrd {
                checks::file("spec.kernel.initrd", initrd, report);
            }
        }
        for (index, disk) in guest.spec.disks.iter().enumerate() {
            if after.get::<Disk>(&disk.disk).is_none() {
                let field = format!("spec.disks[{index}].disk");
                report(&field, checks::missing(Kind::Disk, &disk.disk));
            }
        }
        for (index, interface) in guest.spec.interfaces.iter().enumerate() {
            for (position, group) in interface.security_groups.iter().enumerate() {
                if after.get::<SecurityGroup>(group).is_none() {
                    let field = format!("spec.interfaces[{index}].securityGroups[{position}]");
                    report(&field, checks::missing(Kind::SecurityGroup, group));
                }
            }
        }
    }
}
