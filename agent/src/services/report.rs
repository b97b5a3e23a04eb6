//! What is said of a service in its status: each host says how its own guests are, and one of them, which has no
//! others beside it or places the fleet's guests, says the rest.

use jiff::Timestamp;
use keelson_api::{BackendStatus, ConditionStatus, Health, Service, set_condition};

use super::backends::{Candidate, Place};
use super::probe::Finding;
use super::reconciler::Backends;
use crate::error::Result;

/// What a host has to say of a service.
pub struct Report<'a> {
    /// Its name, where there are several.
    pub host: Option<String>,
    /// Whether it speaks for guests that no host has, and for the service as a whole.
    pub speaks: bool,
    /// The guests that the service is for.
    pub backends: Backends,
    /// Whether the service is in force here.
    pub done: &'a Result<()>,
}

impl Report<'_> {
    /// Makes the status say so; what other hosts say of their guests stays.
    pub fn apply(&self, service: &mut Service) {
        let before = std::mem::take(&mut service.status.backends);
        let statuses = self.backends.iter().filter_map(|found| {
            let mut before = before.iter();
            let before = before.find(|backend| backend.guest == found.0.guest);
            if self.may_say(&found.0) {
                Some(self.status(found, before))
            } else {
                before.cloned()
            }
        });
        let mut statuses: Vec<_> = statuses.collect();
        if !self.speaks {
            // A guest that this host does not know of yet may be another's.
            let unknown = before.into_iter().filter(|backend| {
                let mut known = self.backends.iter();
                let is_known = known.any(|(candidate, _)| candidate.guest == backend.guest);
                !is_known && backend.host != self.host
            });
            statuses.extend(unknown);
            statuses.sort_by(|one, other| one.guest.cmp(&other.guest));
        }
        service.status.backends = statuses;
        if self.speaks {
            self.set_ready(service);
        }
    }

    fn may_say(&self, candidate: &Candidate) -> bool {
        match candidate.place {
            Place::Here => true,
            Place::On(_) => false,
            Place::OnLost(_) | Place::Nowhere => self.speaks,
        }
    }

    fn status(
        &self,
        (candidate, found): &(Candidate, Finding),
        before: Option<&BackendStatus>,
    ) -> BackendStatus {
        let since = before
            .filter(|before| before.health == found.health)
            .map_or_else(Timestamp::now, |before| before.since);
        BackendStatus {
            guest: candidate.guest.clone(),
            interface: candidate.interface.clone(),
            address: candidate.main_address(),
            host: self.host.clone(),
            health: found.health,
            message: found.message.clone(),
            since,
        }
    }

    fn set_ready(&self, service: &mut Service) {
        let backends = &service.status.backends;
        let is_healthy = |backend: &&BackendStatus| backend.health == Health::Healthy;
        let serving = backends.iter().filter(is_healthy).count();
        let all = self.backends.len();
        let (status, reason, message) = match self.done {
            Err(error) => (ConditionStatus::False, error.reason(), error.to_string()),
            Ok(()) if all == 0 => (
                ConditionStatus::False,
                "NoGuests",
                format!(
                    "no guest with an interface in {} is selected",
                    service.spec.network
                ),
            ),
            Ok(()) if serving == 0 => (
                ConditionStatus::False,
                "NoneHealthy",
                format!("none of {all} guests serves"),
            ),
            Ok(()) => (
                ConditionStatus::True,
                "Serving",
                format!("{serving} of {all} guests serve"),
            ),
        };
        let conditions = &mut service.status.conditions;
        set_condition(conditions, "Ready", status, reason, &message);
    }
}
