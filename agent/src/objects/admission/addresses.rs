//! The addresses that guests and services are given.

use keelson_api::{Kind, Network, Object, Service, VirtualMachine};

use super::super::allocation::{Allocation, holder};
use super::super::checks;
use super::super::store::World;

/// How many addresses an object is to be given, those of IPv4 before all: not every network has IPv6.
pub fn wants_allocation(object: &Object) -> u8 {
    let wants = |ipv4: bool, ipv6: bool| u8::from(ipv4) * 2 + u8::from(ipv6);
    match object {
        Object::VirtualMachine(guest) => {
            let interfaces = &guest.spec.interfaces;
            wants(
                interfaces
                    .iter()
                    .any(|interface| interface.address.is_none()),
                interfaces
                    .iter()
                    .any(|interface| interface.address_v6.is_none()),
            )
        }
        Object::Service(service) => wants(
            service.spec.address.is_none(),
            service.spec.address_v6.is_none(),
        ),
        Object::Network(network) => wants(
            network
                .spec
                .overlay
                .is_some_and(|overlay| overlay.vni.is_none()),
            false,
        ),
        _ => 0,
    }
}

/// Gives each interface of a guest the addresses that it asks for, or free ones.
pub fn allocate(
    guest: &mut VirtualMachine,
    after: &World,
    allocation: &mut Allocation,
    report: &mut impl FnMut(&str, String),
) {
    for index in 0..guest.spec.interfaces.len() {
        let interface = guest.spec.interfaces[index].clone();
        let field = format!("spec.interfaces[{index}]");
        let Some(Object::Network(network)) = after.get::<Network>(&interface.network) else {
            report(
                &format!("{field}.network"),
                checks::missing(Kind::Network, &interface.network),
            );
            continue;
        };
        let named = holder(guest, &interface);
        match allocation.take_address(named.clone(), interface.address, &network) {
            Ok(address) => guest.spec.interfaces[index].address = address,
            Err(message) => report(&format!("{field}.address"), message),
        }
        match allocation.take_mac(guest, &interface) {
            Ok(mac) => guest.spec.interfaces[index].mac = Some(mac),
            Err(message) => report(&format!("{field}.mac"), message),
        }
        // With its MAC address, of which SLAAC makes this one.
        let interface = guest.spec.interfaces[index].clone();
        let slaac = interface
            .mac
            .and_then(|mac| network.spec.slaac_address(mac));
        let refused = checks::refuse_slaac(&network.spec, &interface);
        let wanted = interface.address_v6.or(slaac);
        let taken = match refused {
            Some(problem) => Err(problem),
            None => allocation.take_address_v6(named, wanted, &network),
        };
        match taken {
            Ok(address) => guest.spec.interfaces[index].address_v6 = address,
            Err(message) => report(&format!("{field}.addressV6"), message),
        }
    }
}

/// As [`allocate`], for a service.
pub fn allocate_service(
    service: &mut Service,
    after: &World,
    allocation: &mut Allocation,
    report: &mut impl FnMut(&str, String),
) {
    let name = &service.spec.network;
    let Some(Object::Network(network)) = after.get::<Network>(name) else {
        report("spec.network", checks::missing(Kind::Network, name));
        return;
    };
    let holder = format!("Service/{}", service.metadata.name);
    match allocation.take_address(holder.clone(), service.spec.address, &network) {
        Ok(address) => service.spec.address = address,
        Err(message) => report("spec.address", message),
    }
    match allocation.take_address_v6(holder, service.spec.address_v6, &network) {
        Ok(address) => service.spec.address_v6 = address,
        Err(message) => report("spec.addressV6", message),
    }
}
