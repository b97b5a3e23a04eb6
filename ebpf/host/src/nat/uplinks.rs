//! The interfaces that lead outside, and the programs at their hooks (map `UPLINKS`).

use std::collections::BTreeMap;

use keelson_ebpf_common::{UplinkEntry, map_name};

use super::Nat;
use crate::datapath::Datapath;
use crate::error::DatapathError;
use crate::hook::{self, HookMode, Target, UPLINK_HOOKS};
use crate::interface;
use crate::object::Object;
use crate::rule_tables::ignore_missing;

/// Uplinks that are there, by name.
pub type Present = BTreeMap<String, u32>;

/// Refuses uplinks whose frames the programs can't read.
pub fn check(wanted: &Nat) -> Result<(), DatapathError> {
    for name in wanted.uplinks() {
        if interface::index(&name).is_ok() && !interface::is_ethernet(&name) {
            return Err(DatapathError::InvalidNat {
                what: format!("uplink {name}"),
                problem: "is no Ethernet device; give one, or a VLAN or bond of such".into(),
            });
        }
    }
    Ok(())
}

impl Datapath {
    /// Records the wanted uplinks that are there, before anything refers to them.
    pub(super) fn note_uplinks(&mut self, wanted: &Nat) -> Result<Present, DatapathError> {
        let mut present = Present::new();
        let noted = entries(&self.object)?;
        for name in wanted.uplinks() {
            let Ok(ifindex) = interface::index(&name) else {
                continue;
            };
            let before = noted.get(&ifindex);
            let mode = before.map_or(self.mode, |before| HookMode::from_byte(before.hook));
            let entry = UplinkEntry {
                hook: mode.to_byte(),
                reserved: [0; 3],
                name: interface::to_bytes(&name),
            };
            if before != Some(&entry) {
                self.object
                    .uplinks
                    .insert(ifindex, entry, 0)
                    .map_err(DatapathError::map("write", map_name::UPLINKS))?;
            }
            present.insert(name, ifindex);
        }
        Ok(present)
    }

    /// Attaches the programs to the uplinks that are there, and forgets those that nobody wants. One that
    /// is gone and wanted is remembered, and so are its ports.
    pub(super) fn settle_uplinks(&mut self, present: &Present) -> Result<(), DatapathError> {
        let wanted = self.nat.as_ref().map(Nat::uplinks).unwrap_or_default();
        for (ifindex, entry) in entries(&self.object)? {
            let name = interface::from_bytes(&entry.name);
            match present.get(&name) {
                Some(now) if *now == ifindex => self.ensure_uplink(ifindex, &name, &entry)?,
                None if wanted.contains(&name) => {}
                _ => self.forget_uplink(ifindex, &entry)?,
            }
        }
        Ok(())
    }

    /// Replaces the programs of uplinks in place.
    pub(crate) fn adopt_uplinks(&mut self) -> Result<(), DatapathError> {
        for (ifindex, entry) in entries(&self.object)? {
            let name = interface::from_bytes(&entry.name);
            if interface::name(ifindex).as_ref() == Some(&name) {
                self.ensure_uplink(ifindex, &name, &entry)?;
            }
        }
        Ok(())
    }

    fn ensure_uplink(
        &mut self,
        ifindex: u32,
        name: &str,
        entry: &UplinkEntry,
    ) -> Result<(), DatapathError> {
        hook::ensure_anew(&mut self.object, &self.root, target(name, ifindex, entry))
    }

    fn forget_uplink(&mut self, ifindex: u32, entry: &UplinkEntry) -> Result<(), DatapathError> {
        let name = interface::from_bytes(&entry.name);
        hook::forget(&self.root, target(&name, ifindex, entry))?;
        ignore_missing(self.object.uplinks.remove(&ifindex))
            .map_err(DatapathError::map("write", map_name::UPLINKS))
    }
}

fn target<'a>(name: &'a str, ifindex: u32, entry: &UplinkEntry) -> Target<'a> {
    Target {
        name,
        ifindex,
        mode: HookMode::from_byte(entry.hook),
        hooks: &UPLINK_HOOKS,
    }
}

pub fn entries(object: &Object) -> Result<BTreeMap<u32, UplinkEntry>, DatapathError> {
    object
        .uplinks
        .iter()
        .collect::<Result<_, _>>()
        .map_err(DatapathError::map("read", map_name::UPLINKS))
}
