//! Fleets of all shapes: what is placed keeps to every rule, and what waits fits nowhere.

use keelson_api::{
    API_VERSION, DiskSpec, Host, HostResources, HostStatus, MemorySize, ObjectMeta, PlacementState,
    VirtualMachine,
};
use proptest::prelude::*;
use serde_json::json;

use super::{Decision, Resources, View};

fn host(name: &str, cpus: u32, mib: u64, zone: u8, cordoned: bool) -> Host {
    let resources = HostResources {
        cpus,
        memory: MemorySize::from_mib(mib).unwrap(),
        hugepages_2mi: 0,
        hugepages_1gi: 0,
        disk: MemorySize::from_mib(0).unwrap(),
    };
    Host {
        api_version: API_VERSION.into(),
        kind: "Host".into(),
        metadata: ObjectMeta {
            labels: [("zone".to_owned(), zone.to_string())].into(),
            ..ObjectMeta::named(name)
        },
        spec: keelson_api::HostSpec {
            unschedulable: cordoned,
            drain: false,
            no_live_migration: false,
        },
        status: HostStatus {
            allocatable: Some(resources),
            ..HostStatus::default()
        },
    }
}

/// A guest as a manifest gives it.
pub(in crate::fleet) fn guest(name: &str, more: &serde_json::Value) -> VirtualMachine {
    let mut spec = json!({ "cpus": 1, "memory": "64Mi", "kernel": { "image": "/k" } });
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    let document = json!({
        "apiVersion": API_VERSION, "kind": "VirtualMachine",
        "metadata": { "name": name, "generation": 1 },
        "spec": spec,
    });
    serde_json::from_value(document).unwrap()
}

pub(in crate::fleet) fn disk(shared: bool, host: Option<&str>) -> DiskSpec {
    serde_json::from_value(json!({ "path": "/d", "shared": shared, "host": host })).unwrap()
}

/// Decides for each guest until nothing more comes of it.
fn settle(view: &mut View, revision: &mut i64) {
    loop {
        let names: Vec<_> = view.guest_names().cloned().collect();
        let mut changed = false;
        for name in names {
            let decision = view.decide(&name);
            let before = view.guest(&name).unwrap().0.clone();
            let after = decision.carry_out(&before);
            if after != before {
                *revision += 1;
                view.set_guest(after, *revision);
                changed |= matches!(decision, Decision::Place { .. });
            }
        }
        if !changed {
            return;
        }
    }
}

#[derive(Clone, Debug)]
struct GuestShape {
    cpus: u8,
    mib: u64,
    zone: Option<u8>,
    apart: bool,
    pinned: Option<usize>,
    local_to: Option<usize>,
    failover: bool,
    state: usize,
}

fn guest_shape(hosts: usize) -> impl Strategy<Value = GuestShape> {
    let which = || prop::option::weighted(0.2, 0..hosts);
    let zone = prop::option::weighted(0.3, 0..2_u8);
    let flags = (prop::bool::weighted(0.3), any::<bool>(), 0..3_usize);
    (1..8_u8, 32..900_u64, zone, which(), which(), flags).prop_map(
        |(cpus, mib, zone, pinned, local_to, (apart, failover, state))| GuestShape {
            cpus,
            mib,
            zone,
            apart,
            pinned,
            local_to,
            failover,
            state,
        },
    )
}

impl GuestShape {
    fn guest(&self, name: &str) -> VirtualMachine {
        let mut more = json!({ "cpus": self.cpus, "memory": format!("{}Mi", self.mib) });
        if let Some(zone) = self.zone {
            more["hostSelector"] = json!({ "zone": zone.to_string() });
        }
        if self.apart {
            more["antiAffinity"] = json!({ "app": "db" });
        }
        if let Some(host) = self.pinned {
            more["host"] = json!(format!("h{host}"));
        }
        if self.failover {
            more["failover"] = json!("Restart");
        }
        more["disks"] = json!([{ "name": "a", "disk": name }]);
        let mut guest = guest(name, &more);
        if self.apart {
            guest.metadata.labels.insert("app".into(), "db".into());
        }
        guest
    }
}

/// Whether all that is placed keeps to the rules.
fn check(view: &View, shapes: &[GuestShape], hosts: &[(u32, u64, u8, bool)]) {
    for (at, (cpus, mib, zone, _)) in hosts.iter().enumerate() {
        let name = format!("h{at}");
        let mut used = Resources::default();
        let mut apart = 0;
        for guest in view.guests_on(&name) {
            let shape = &shapes[guest.trim_start_matches('g').parse::<usize>().unwrap()];
            used = used.plus(Resources::of_guest(&view.guest(guest).unwrap().0.spec));
            apart += usize::from(shape.apart);
            assert!(
                shape.zone.is_none_or(|wanted| wanted == *zone),
                "{guest} on {name}"
            );
            assert!(
                shape.pinned.is_none_or(|wanted| wanted == at),
                "{guest} on {name}"
            );
            assert!(
                shape.local_to.is_none_or(|wanted| wanted == at),
                "{guest} on {name}"
            );
        }
        assert_eq!(used, view.used(&name), "the sum of {name}");
        assert!(
            used.cpus <= u64::from(*cpus) && used.memory_mib <= *mib,
            "{name} is overloaded"
        );
        assert!(
            apart <= 1,
            "{apart} guests that want to be apart are on {name}"
        );
    }
}

proptest! {
    #[test]
    fn what_is_placed_keeps_to_every_rule(
        hosts in prop::collection::vec((1..16_u32, 64..2000_u64, 0..2_u8, prop::bool::weighted(0.2)), 1..5),
        shapes in prop::collection::vec(guest_shape(4), 0..12),
        lost in 0..5_usize,
    ) {
        let mut view = View::default();
        for (at, (cpus, mib, zone, cordoned)) in hosts.iter().enumerate() {
            view.set_host(host(&format!("h{at}"), *cpus, *mib, *zone, *cordoned));
            view.set_alive(&format!("h{at}"), true);
        }
        let mut revision = 0;
        for (at, shape) in shapes.iter().enumerate() {
            let name = format!("g{at}");
            let place = shape.local_to.map(|host| format!("h{host}"));
            view.set_disk(&name, disk(place.is_none(), place.as_deref()));
            revision += 1;
            view.set_guest(shape.guest(&name), revision);
        }
        settle(&mut view, &mut revision);
        check(&view, &shapes, &hosts);
        for (at, (.., cordoned)) in hosts.iter().enumerate() {
            let is_empty = view.guests_on(&format!("h{at}")).next().is_none();
            prop_assert!(!cordoned || is_empty);
        }
        // Hosts make something of what they were given; then one is lost.
        let mut stays = Vec::new();
        for name in view.guest_names().cloned().collect::<Vec<_>>() {
            let mut guest = view.guest(&name).unwrap().0.clone();
            let shape = &shapes[name.trim_start_matches('g').parse::<usize>().unwrap()];
            if let Some(placement) = &mut guest.status.placement {
                let states = [PlacementState::Assigned, PlacementState::Held, PlacementState::Leased];
                placement.state = states[shape.state];
                let movable = shape.pinned.is_none() && shape.local_to.is_none();
                if placement.state == PlacementState::Held || !movable {
                    stays.push((name.clone(), guest.status.placement.clone()));
                }
                revision += 1;
                view.set_guest(guest, revision);
            }
        }
        let lost = format!("h{}", lost % hosts.len());
        view.set_alive(&lost, false);
        settle(&mut view, &mut revision);
        check(&view, &shapes, &hosts);
        for (name, placement) in stays {
            prop_assert_eq!(&view.guest(&name).unwrap().0.status.placement, &placement);
        }
        // What is still on the lost host could not go anywhere.
        for name in view.guests_on(&lost) {
            let decided = view.decide(name);
            let may_wait = matches!(decided, Decision::Wait { .. } | Decision::Stay { .. });
            prop_assert!(may_wait, "{} is left on {}: {:?}", name, lost, decided);
        }
    }
}

#[test]
fn guests_are_spread_and_waiting_says_why() {
    let mut view = View::default();
    for (name, cordoned) in [("a", false), ("b", false), ("c", true)] {
        view.set_host(host(name, 4, 1000, 0, cordoned));
        view.set_alive(name, true);
    }
    let mut revision = 0;
    for name in ["one", "two"] {
        revision += 1;
        view.set_guest(guest(name, &json!({})), revision);
    }
    settle(&mut view, &mut revision);
    assert_eq!(view.guests_on("a").count(), 1);
    assert_eq!(view.guests_on("b").count(), 1);
    view.set_guest(guest("huge", &json!({ "memory": "990Mi" })), 100);
    let Decision::Wait { message, .. } = view.decide("huge") else {
        panic!("{:?}", view.decide("huge"));
    };
    assert_eq!(
        message,
        "none of 3 hosts takes it: 1 cordoned, 2 with too little memory"
    );
}

#[test]
fn what_runs_since_before_placement_is_left_alone() {
    let mut view = View::default();
    view.set_host(host("a", 4, 1000, 0, false));
    view.set_alive("a", true);
    let mut old = guest("old", &json!({}));
    old.status.phase = keelson_api::Phase::Running;
    old.status.host = Some("a".into());
    view.set_guest(old, 1);
    assert_eq!(view.decide("old"), Decision::Nothing);
    assert_eq!(view.guests_on("a").count(), 1);
}
