//! What was translated at uplinks.

use std::net::IpAddr;

use keelson_ebpf_common::{Direction, Tally, map_name, passed_index};

use super::uplinks;
use crate::address::from_map;
use crate::counters::total;
use crate::datapath::Datapath;
use crate::error::DatapathError;
use crate::interface;

/// An external address, and what was translated for guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalUse {
    /// The uplink's name.
    pub uplink: String,
    /// The address.
    pub address: IpAddr,
    /// What guests sent by it.
    pub to_uplink: Tally,
    /// What came by it for guests.
    pub from_uplink: Tally,
}

impl Datapath {
    /// What was translated at each external address since there were guests or forwards for it.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel doesn't let a map be read.
    pub fn external_use(&self) -> Result<Vec<ExternalUse>, DatapathError> {
        let uplinks = uplinks::entries(&self.object)?;
        let mut uses = Vec::new();
        for (index, pool) in self.held_pools()? {
            let tally = |direction| {
                let tallies = self
                    .object
                    .translated
                    .get(&passed_index(index, direction), 0);
                let tallies = tallies.map_err(DatapathError::map("read", map_name::TRANSLATED))?;
                Ok(total(tallies.iter()))
            };
            let name = uplinks.get(&pool.ifindex);
            uses.push(ExternalUse {
                uplink: name.map_or_else(String::new, |entry| interface::from_bytes(&entry.name)),
                address: from_map(pool.address),
                to_uplink: tally(Direction::FromGuest)?,
                from_uplink: tally(Direction::ToGuest)?,
            });
        }
        Ok(uses)
    }
}
