//! The check of each object of a manifest against what there will be, in which it is given its addresses.

use keelson_api::{Disk, Object, VirtualMachine};

use super::super::allocation::Allocation;
use super::super::store::World;
use super::super::uplink_checks::OwnPorts;
use super::super::{checks, uplink_checks};
use super::Admission;
use super::addresses::{allocate, allocate_service};

/// What an object is checked against.
#[derive(Debug)]
pub struct Review<'a> {
    /// This host.
    pub admission: &'a Admission<'a>,
    /// What there is.
    pub before: &'a World,
    /// What there will be if the manifest is admitted.
    pub after: &'a World,
    /// The ports that the host uses itself, where that is known.
    pub ports: OwnPorts<'a>,
    /// Who has which address, with those that are given in this review.
    pub allocation: Allocation,
}

impl Review<'_> {
    /// Checks an object, and gives it what it asks for.
    pub fn check(&mut self, object: &mut Object, report: &mut impl FnMut(&str, String)) {
        let (after, ports) = (self.after, self.ports);
        match object {
            Object::Disk(disk) => self.check_disk(disk, report),
            Object::Host(_) => {}
            Object::Network(network) => {
                checks::network(network, after, report);
                uplink_checks::network(network, after, ports, report);
                if let Err(message) = self.allocation.take_vni(network) {
                    report("spec.overlay.vni", message);
                }
            }
            Object::PortForward(forward) => {
                uplink_checks::port_forward(forward, after, ports, report);
            }
            Object::SecurityGroup(group) => checks::security_group(group, after, report),
            Object::Service(service) => {
                checks::service(service, after, report);
                allocate_service(service, after, &mut self.allocation, report);
            }
            Object::VirtualMachine(guest) => {
                let known = match self.before.get::<VirtualMachine>(&guest.metadata.name) {
                    Some(Object::VirtualMachine(known)) => Some(known),
                    _ => None,
                };
                self.admission.check_guest(guest, after, report);
                self.admission
                    .check_placement(guest, known.as_ref(), after, report);
                allocate(guest, after, &mut self.allocation, report);
            }
        }
    }

    fn check_disk(&self, disk: &mut Disk, report: &mut impl FnMut(&str, String)) {
        let known = match self.before.get::<Disk>(&disk.metadata.name) {
            Some(Object::Disk(known)) => Some(known),
            _ => None,
        };
        self.admission.place_disk(disk, self.after, report);
        if let Some(known) = &known {
            checks::place_unchanged(known, disk, self.before, report);
        }
        if disk.spec.shared || self.admission.is_here(disk.spec.host.as_deref()) {
            checks::disk(disk, known.as_ref(), report);
        } else {
            checks::disk_elsewhere(disk, known.as_ref(), report);
        }
    }
}
