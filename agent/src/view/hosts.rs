//! The other hosts: where their tunnels end, and whether they have their leases.

use std::collections::BTreeSet;
use std::net::IpAddr;

use keelson_api::{ConditionStatus, Host};

use super::{Affected, KnownGuest, View};

impl View {
    /// Whether a host's lease has ended: none of its guests runs any more.
    pub fn is_lost(&self, host: &str) -> bool {
        self.lost.contains(host)
    }

    pub(super) fn set_host(&mut self, host: &Host) -> Affected {
        let mut conditions = host.status.conditions.iter();
        let ready = conditions.find(|condition| condition.kind == "Ready");
        // One that has yet to say anything is about to.
        let is_lost = ready.is_some_and(|ready| ready.status != ConditionStatus::True);
        self.set_host_facts(&host.metadata.name, host.status.tunnel_address, is_lost)
    }

    pub(super) fn set_host_facts(
        &mut self,
        host: &str,
        tunnel: Option<IpAddr>,
        is_lost: bool,
    ) -> Affected {
        let before = match tunnel {
            Some(address) => self.tunnels.insert(host.into(), address),
            None => self.tunnels.remove(host),
        };
        let remote = if before == tunnel {
            BTreeSet::new()
        } else {
            self.placed.of(host).cloned().collect()
        };
        let was_lost = if is_lost {
            !self.lost.insert(host.into())
        } else {
            self.lost.remove(host)
        };
        let mut guests = self.placed.of(host);
        let guests = guests.by_ref().filter_map(|guest| self.guests.get(guest));
        let mut networks = guests.flat_map(KnownGuest::networks);
        Affected {
            services: was_lost != is_lost && networks.any(|network| self.serving.has(network)),
            remote,
            ..Affected::default()
        }
    }
}
