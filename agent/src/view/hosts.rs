//! The other hosts: where their tunnels end, and whether they have their leases.

use std::collections::BTreeSet;
use std::net::IpAddr;

use keelson_api::{ConditionStatus, Host};

use super::{Affected, KnownGuest, View};

impl View {
    /// Whether a host's lease has ended, or there is no such host: none of its guests runs any more.
    pub fn is_lost(&self, host: &str) -> bool {
        !self.present.contains(host)
    }

    pub(super) fn set_host(&mut self, host: &Host) -> Affected {
        let mut conditions = host.status.conditions.iter();
        let ready = conditions.find(|condition| condition.kind == "Ready");
        // One that has yet to say anything is about to.
        let is_present = ready.is_none_or(|ready| ready.status == ConditionStatus::True);
        self.set_host_facts(&host.metadata.name, host.status.tunnel_address, is_present)
    }

    pub(super) fn set_host_facts(
        &mut self,
        host: &str,
        tunnel: Option<IpAddr>,
        is_present: bool,
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
        let changed = if is_present {
            self.present.insert(host.into())
        } else {
            self.present.remove(host)
        };
        let guests = self.placed.of(host);
        let guests = guests.filter_map(|guest| self.guests.get(guest));
        let mut networks = guests.flat_map(KnownGuest::networks);
        Affected {
            services: changed && networks.any(|network| self.serving.has(network)),
            remote,
            ..Affected::default()
        }
    }
}
