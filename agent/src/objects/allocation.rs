//! Addresses of guests' interfaces and of services, and identifiers of networks: those that are taken, and the next free one.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use keelson_api::{Interface, MacAddress, Network, Object, VirtualMachine};
use sha2::{Digest, Sha256};

/// Who holds which address.
#[derive(Debug, Default)]
pub struct Allocation {
    /// By network and address: the holder, such as `VirtualMachine/web (eth0)` or `Service/web`.
    addresses: BTreeMap<(String, IpAddr), String>,
    macs: BTreeMap<MacAddress, String>,
    /// VXLAN network identifiers.
    vnis: BTreeMap<u32, String>,
}

impl Allocation {
    /// What the guests and services among `objects` hold.
    pub fn of<'a>(objects: impl Iterator<Item = &'a Object>) -> Self {
        let mut allocation = Self::default();
        for object in objects {
            if let Object::Service(service) = object {
                let ipv4 = service.spec.address.map(IpAddr::from);
                let ipv6 = service.spec.address_v6.map(IpAddr::from);
                for address in ipv4.into_iter().chain(ipv6) {
                    let place = (service.spec.network.clone(), address);
                    let holder = format!("Service/{}", service.metadata.name);
                    allocation.addresses.insert(place, holder);
                }
            }
            if let Object::Network(network) = object
                && let Some(vni) = network.spec.overlay.and_then(|overlay| overlay.vni)
            {
                let holder = format!("Network/{}", network.metadata.name);
                allocation.vnis.insert(vni, holder);
            }
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

    /// Gives a guest's interface or a service the address that it asks for, or the lowest free one; none
    /// where the network has no IPv4.
    ///
    /// # Errors
    /// What is wrong with the address, or that the network is full.
    pub fn take_address(
        &mut self,
        holder: String,
        wanted: Option<Ipv4Addr>,
        network: &Network,
    ) -> Result<Option<Ipv4Addr>, String> {
        let spec = &network.spec;
        let address = match (wanted, spec.subnet) {
            (None, None) => return Ok(None),
            (Some(address), _) => address,
            (None, Some(subnet)) => subnet
                .hosts()
                .find(|&address| {
                    spec.refuse_address(address).is_none() && self.is_free(network, address.into())
                })
                .ok_or_else(|| full(network))?,
        };
        if let Some(problem) = spec.refuse_address(address) {
            return Err(problem);
        }
        self.take(holder, network, address.into())?;
        Ok(Some(address))
    }

    /// As [`Self::take_address`], of IPv6.
    ///
    /// # Errors
    /// What is wrong with the address, or that the network is full.
    pub fn take_address_v6(
        &mut self,
        holder: String,
        wanted: Option<Ipv6Addr>,
        network: &Network,
    ) -> Result<Option<Ipv6Addr>, String> {
        let spec = &network.spec;
        let address = match (wanted, spec.subnet_v6) {
            (None, None) => return Ok(None),
            (Some(address), _) => address,
            (None, Some(subnet)) => subnet
                .hosts()
                .find(|&address| {
                    spec.refuse_address_v6(address).is_none()
                        && self.is_free(network, address.into())
                })
                .ok_or_else(|| full(network))?,
        };
        if let Some(problem) = spec.refuse_address_v6(address) {
            return Err(problem);
        }
        self.take(holder, network, address.into())?;
        Ok(Some(address))
    }

    /// Gives a network that spans hosts the VXLAN network identifier that it asks for, or the lowest free one.
    ///
    /// # Errors
    /// Who holds it already.
    pub fn take_vni(&mut self, network: &mut Network) -> Result<(), String> {
        let Some(overlay) = &mut network.spec.overlay else {
            return Ok(());
        };
        let free = || (1..=0x00ff_ffff).find(|vni| !self.vnis.contains_key(vni));
        let vni = overlay.vni.or_else(free).unwrap_or(1);
        if let Some(taken) = self.vnis.get(&vni) {
            return Err(format!(
                "{vni} is taken by {taken}; choose another or leave it out to get a free one"
            ));
        }
        if self.vnis.len() >= keelson_ebpf::MAX_OVERLAYS {
            return Err(format!(
                "{} networks span hosts, which is all that a host can know",
                keelson_ebpf::MAX_OVERLAYS
            ));
        }
        overlay.vni = Some(vni);
        let holder = format!("Network/{}", network.metadata.name);
        self.vnis.insert(vni, holder);
        Ok(())
    }

    fn is_free(&self, network: &Network, address: IpAddr) -> bool {
        let place = (network.metadata.name.clone(), address);
        !self.addresses.contains_key(&place)
    }

    fn take(&mut self, holder: String, network: &Network, address: IpAddr) -> Result<(), String> {
        let place = (network.metadata.name.clone(), address);
        if let Some(taken) = self.addresses.get(&place) {
            return Err(format!(
                "{address} is taken by {taken}; choose another or leave it out to get a free one"
            ));
        }
        self.addresses.insert(place, holder);
        Ok(())
    }

    /// Gives an interface the Ethernet address that it asks for, or one derived from its identity.
    ///
    /// # Errors
    /// Who holds the address already, be it all services.
    pub fn take_mac(
        &mut self,
        guest: &VirtualMachine,
        interface: &Interface,
    ) -> Result<MacAddress, String> {
        let mac = interface
            .mac
            .unwrap_or_else(|| derived_mac(guest, interface));
        if mac.0 == keelson_ebpf::SERVICE_MAC {
            return Err(format!("{mac} is the address of all services"));
        }
        if let Some(taken) = self.macs.get(&mac) {
            return Err(format!(
                "{mac} is taken by {taken}; choose another or leave it out to get one"
            ));
        }
        self.macs.insert(mac, holder(guest, interface));
        Ok(mac)
    }
}

fn full(network: &Network) -> String {
    format!("Network/{} has no free address", network.metadata.name)
}

/// A guest's interface as messages name it.
pub fn holder(guest: &VirtualMachine, interface: &Interface) -> String {
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
