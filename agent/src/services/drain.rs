//! Guests that are to serve no longer though nothing is wrong with them: they get nothing new, and the flows that they
//! have go on for a while. Each host measures that time by itself, from when it saw that it begins: an agent that
//! starts begins it anew.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use keelson_api::{Health, Service};
use tokio::time::Instant;

use super::backends::{Candidate, Place};
use super::probe::Finding;
use crate::host::network_number;

/// What is in force, and who drains.
#[derive(Debug, Default)]
pub struct Drain {
    /// The addresses of backends, by network and address of the service.
    held: BTreeMap<(u32, IpAddr), BTreeSet<IpAddr>>,
    /// Until when the flows of a guest go on: by service and guest.
    until: BTreeMap<(String, String), Instant>,
}

impl Drain {
    /// Notes what is in force on this host.
    pub fn note(&mut self, in_force: &[keelson_ebpf::Service]) {
        self.held.clear();
        for service in in_force {
            let held = self.held.entry((service.network, service.address));
            let backends = service.backends.iter().chain(&service.draining);
            held.or_default()
                .extend(backends.map(|backend| backend.address));
        }
    }

    /// The addresses of a service's backends on this host.
    pub fn held(&self, service: &Service) -> BTreeSet<IpAddr> {
        let spec = &service.spec;
        let network = network_number(&spec.network);
        let ipv4 = spec.address.map(IpAddr::from);
        let ipv6 = spec.address_v6.map(IpAddr::from);
        let held = ipv4
            .into_iter()
            .chain(ipv6)
            .filter_map(|address| self.held.get(&(network, address)));
        held.flatten().copied().collect()
    }

    /// What is to be said of a guest that drains or has drained; `None` of one that does neither.
    pub fn judge(&mut self, service: &Service, candidate: &Candidate) -> Option<Finding> {
        let key = (service.metadata.name.clone(), candidate.guest.clone());
        let why = reason(service, candidate);
        let is_held = candidate.is_among(&self.held(service));
        let (Some(why), true) = (why, is_held) else {
            self.until.remove(&key);
            return why.map(|why| over(candidate, why));
        };
        let limit = service.spec.drain_timeout;
        let now = Instant::now();
        // A shorter time that the object has meanwhile holds at once.
        let latest = now + limit.duration();
        let until = self.until.entry(key).or_insert(latest);
        *until = latest.min(*until);
        if *until <= now {
            return Some(over(candidate, why));
        }
        Some(Finding {
            health: Health::Draining,
            message: format!("{why}; it gets nothing new, and what it has is cut after {limit}"),
        })
    }

    /// Forgets those that are backends of nothing any more, given all that are.
    pub fn retain(&mut self, known: &BTreeSet<(String, String)>) {
        self.until.retain(|key, _| known.contains(key));
    }

    /// Until the next one's time is over; for ever where none drains.
    pub async fn next(&self) {
        // What could not be cut is tried again, but not without end in between.
        let soon = Instant::now() + Duration::from_millis(10);
        match self.until.values().min() {
            Some(until) => tokio::time::sleep_until((*until).max(soon)).await,
            None => std::future::pending().await,
        }
    }
}

/// Why a guest that runs, as far as is known, is to serve no longer.
fn reason(service: &Service, candidate: &Candidate) -> Option<&'static str> {
    if !matches!(candidate.place, Place::Here | Place::On(_)) {
        return None;
    }
    if candidate.stops {
        return Some("the guest is about to stop");
    }
    if !candidate.runs {
        return None;
    }
    if !candidate.selected {
        return Some("the service is not for it any more");
    }
    let is_named = service.spec.draining.contains(&candidate.guest);
    is_named.then_some("spec.draining names it")
}

fn over(candidate: &Candidate, why: &str) -> Finding {
    Finding {
        health: if candidate.stops {
            Health::Stopped
        } else {
            Health::Drained
        },
        message: why.into(),
    }
}
