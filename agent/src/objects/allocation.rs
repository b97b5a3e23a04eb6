//! Addresses of guests' interfaces: those that are taken, and the next free one.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use keelson_api::{Interface, MacAddress, Network, Object, VirtualMachine};
use sha2::{Digest, Sha256};

use super::checks::refuse_slaac;

/// Who holds which address.
#[derive(Debug, Default)]
pub struct Allocation {
    /// By network and address: the holder, as `VirtualMachine/name interface name`.
    addresses: BTreeMap<(String, IpAddr), String>,
    macs: BTreeMap<MacAddress, String>,
}

impl Allocation {
    /// What the guests among `objects` hold.
    pub fn of<'a>(objects: impl Iterator<Item = &'a Object>) -> Self {
        let mut allocation = Self::default();
        for object in objects {
            let Object::VirtualMachine(guest) = object else {
                continue;
            };
            for interface in &guest.spec.interfaces {
                let holder = holder(guest, interface);
                let ipv4 = interface.address.map(IpAddr::from);
                let ipv6 = interface.address_v6.map(IpAddr::from);
                for address in ipv4.into_iter().chain(ipv6) {
                    let place = (interface.network.clone(), address);
                    allocation.addresses.insert(place, holder.clone());
                }
                if let Some(mac) = interface.mac {
                    allocation.macs.insert(mac, holder);
                }
            }
        }
        allocation
    }

    /// Gives an interface the address that it asks for, or the lowest free one; none where the network has
    /// no IPv4.
    ///
    /// # Errors
    /// What is wrong with the address, or that the network is full.
    pub fn take_address(
        &mut self,
        guest: &VirtualMachine,
        interface: &Interface,
        network: &Network,
    ) -> Result<Option<Ipv4Addr>, String> {
        let spec = &network.spec;
        let address = match (interface.address, spec.subnet) {
            (None, None) => return Ok(None),
            (Some(address), _) => address,
            (None, Some(subnet)) => subnet
                .hosts()
                .find(|&address| {
                    spec.refuse_address(address).is_none()
                        && self.is_free(interface, address.into())
                })
                .ok_or_else(|| format!("Network/{} has no free address", interface.network))?,
        };
        if let Some(problem) = spec.refuse_address(address) {
            return Err(problem);
        }
        self.take(guest, interface, address.into())?;
        Ok(Some(address))
    }

    /// Gives an interface, whose MAC address is known, the IPv6 address that it asks for, the one that it
    /// makes by SLAAC, or the lowest free one; none where the network has no IPv6.
    ///
    /// # Errors
    /// What is wrong with the address, or that the network is full.
    pub fn take_address_v6(
        &mut self,
        guest: &VirtualMachine,
        interface: &Interface,
        network: &Network,
    ) -> Result<Option<Ipv6Addr>, String> {
        let spec = &network.spec;
        let slaac = interface.mac.and_then(|mac| spec.slaac_address(mac));
        let address = match (interface.address_v6.or(slaac), spec.subnet_v6) {
            (None, None) => return Ok(None),
            (Some(address), _) => address,
            (None, Some(subnet)) => subnet
                .hosts()
                .find(|&address| {
                    spec.refuse_address_v6(address).is_none()
                        && self.is_free(interface, address.into())
                })
                .ok_or_else(|| format!("Network/{} has no free address", interface.network))?,
        };
        let refused = spec.refuse_address_v6(address);
        if let Some(problem) = refused.or_else(|| refuse_slaac(spec, interface)) {
            return Err(problem);
        }
        self.take(guest, interface, address.into())?;
        Ok(Some(address))
    }

    fn is_free(&self, interface: &Interface, address: IpAddr) -> bool {
        let place = (interface.network.clone(), address);
        !self.addresses.contains_key(&place)
    }

    fn take(
        &mut self,
        guest: &VirtualMachine,
        interface: &Interface,
        address: IpAddr,
    ) -> Result<(), String> {
        let place = (interface.network.clone(), address);
        if let Some(taken) = self.addresses.get(&place) {
            return Err(format!(
                "{address} is taken by {taken}; choose another or leave it out to get a free one"
            ));
        }
        self.addresses.insert(place, holder(guest, interface));
        Ok(())
    }

    /// Gives an interface the Ethernet address that it asks for, or one derived from its identity.
    ///
    /// # Errors
    /// Who holds the address already.
    pub fn take_mac(
        &mut self,
        guest: &VirtualMachine,
        interface: &Interface,
    ) -> Result<MacAddress, String> {
        let mac = interface
            .mac
            .unwrap_or_else(|| derived_mac(guest, interface));
        if let Some(taken) = self.macs.get(&mac) {
            return Err(format!(
                "{mac} is taken by {taken}; choose another or leave it out to get one"
            ));
        }
        self.macs.insert(mac, holder(guest, interface));
        Ok(mac)
    }
}

fn holder(guest: &VirtualMachine, interface: &Interface) -> String {
    format!(
        "VirtualMachine/{} ({})",
        guest.metadata.name, interface.name
    )
}

/// A locally administered address (IEEE 802c) that two interfaces share by one chance in 2^40.
fn derived_mac(guest: &VirtualMachine, interface: &Interface) -> MacAddress {
    let hash = Sha256::digest(format!("{}/{}", guest.metadata.uid, interface.name));
    MacAddress([0x02, hash[0], hash[1], hash[2], hash[3], hash[4]])
}
