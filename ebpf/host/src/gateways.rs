//! Bridges of networks, by which the host and all behind it reach services, and guests the ports that guests have of an
//! uplink's address (map `GATEWAYS`).

use std::collections::BTreeMap;

use keelson_ebpf_common::{GatewayEntry, map_name};

use crate::datapath::Datapath;
use crate::error::DatapathError;
use crate::hook::{self, GATEWAY_HOOKS, HookMode, Target};
use crate::object::Object;
use crate::rule_tables::ignore_missing;
use crate::{grace_period, interface};

impl Datapath {
    /// Makes these bridges, by their names with the numbers of their networks, the ones by which
    /// services are reached from the host, and forwards from guests; hooks that are missing are attached, those of others removed.
    ///
    /// # Errors
    /// [`DatapathError::InterfaceMissing`], [`DatapathError::Hook`], [`DatapathError::Full`].
    pub fn set_gateways(&mut self, gateways: &[(String, u32)]) -> Result<(), DatapathError> {
        let mut wanted = BTreeMap::new();
        for (name, network) in gateways {
            wanted.insert(interface::index(name)?, (name.as_str(), *network));
        }
        for (ifindex, entry) in entries(&self.object)? {
            if !wanted.contains_key(&ifindex) {
                self.forget_gateway(ifindex, &entry)?;
            }
        }
        for (ifindex, (name, network)) in wanted {
            self.ensure_gateway(ifindex, name, network)?;
        }
        Ok(())
    }

    /// Replaces the programs of bridges in place; forgets bridges that are gone.
    pub(crate) fn adopt_gateways(&mut self) -> Result<(), DatapathError> {
        for (ifindex, entry) in entries(&self.object)? {
            let name = interface::from_bytes(&entry.name);
            if interface::name(ifindex).as_ref() == Some(&name) {
                self.ensure_gateway(ifindex, &name, entry.network)?;
            } else {
                self.forget_gateway(ifindex, &entry)?;
            }
        }
        Ok(())
    }

    fn ensure_gateway(
        &mut self,
        ifindex: u32,
        name: &str,
        network: u32,
    ) -> Result<(), DatapathError> {
        let before = entries(&self.object)?.remove(&ifindex);
        let mode = before.map_or(self.mode, |before| HookMode::from_byte(before.hook));
        let entry = GatewayEntry {
            network,
            hook: mode.to_byte(),
            reserved: [0; 3],
            name: interface::to_bytes(name),
        };
        if before != Some(entry) {
            self.object
                .gateways
                .insert(ifindex, entry, 0)
                .map_err(DatapathError::map("write", map_name::GATEWAYS))?;
            grace_period::wait();
        }
        hook::ensure_anew(&mut self.object, &self.root, target(name, ifindex, mode))
    }

    fn forget_gateway(&mut self, ifindex: u32, entry: &GatewayEntry) -> Result<(), DatapathError> {
        match interface::name(ifindex) {
            Some(name) => {
                let mode = HookMode::from_byte(entry.hook);
                hook::detach(&self.root, target(&name, ifindex, mode))?;
            }
            None => hook::remove_links(&self.root, ifindex)?,
        }
        ignore_missing(self.object.gateways.remove(&ifindex))
            .map_err(DatapathError::map("write", map_name::GATEWAYS))
    }
}

fn target(name: &str, ifindex: u32, mode: HookMode) -> Target<'_> {
    Target {
        name,
        ifindex,
        mode,
        hooks: &GATEWAY_HOOKS,
    }
}

pub fn entries(object: &Object) -> Result<BTreeMap<u32, GatewayEntry>, DatapathError> {
    object
        .gateways
        .iter()
        .collect::<Result<_, _>>()
        .map_err(DatapathError::map("read", map_name::GATEWAYS))
}
