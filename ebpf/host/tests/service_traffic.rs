//! What is counted of services: packets and bytes to and from each backend, of clients in namespaces with the
//! kernel's own network stack, beside what those clients know that they sent and got.

mod network;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use keelson_ebpf::{
    HookChoice, MAX_BACKENDS, MAX_COUNTED_BACKENDS, MacAddress, Protocol, Service, ServiceBackend,
    ServiceUse,
};
use network::fleet::{ADDRESSES, Fleet, SERVED, service_at};
use network::machine::{Machine, connect, datagrams, exchange, talk};

with_both_hooks!(
    every_datagram_is_counted_for_its_backend,
    large_transfers_are_counted_whole
);

const DATAGRAMS: u64 = 40;
const LENGTH: usize = 100;
/// More than fits in three packets, so that there are four fragments.
const FRAGMENTED: usize = 5000;
const ETHERNET: u64 = 14;
const UDP: u64 = 8;

/// Packets and bytes to and from a backend.
type Counts = [(u64, u64); 2];

fn counts(used: &ServiceUse) -> Counts {
    [used.to_backend, used.from_backend].map(|tally| (tally.packets, tally.bytes))
}

/// What is counted at one address and protocol, by backend.
fn counted(fleet: &Fleet, address: IpAddr, protocol: Protocol) -> BTreeMap<Option<IpAddr>, Counts> {
    let uses = fleet.datapath.service_use().expect("read");
    let uses = uses
        .iter()
        .filter(|used| used.address == address && used.protocol == protocol && used.network == 9);
    uses.map(|used| (used.backend, counts(used))).collect()
}

/// Sends datagrams by as many flows; how many each backend answered.
fn send_datagrams(to: SocketAddr, length: usize) -> BTreeMap<u8, u64> {
    let mut answered = BTreeMap::new();
    for _ in 0..DATAGRAMS {
        let number = exchange(&datagrams(to), length).expect("it answers");
        *answered.entry(number).or_insert(0) += 1;
    }
    answered
}

/// Packets and bytes of datagrams of `length` bytes.
fn expected(to: IpAddr, datagrams: u64, length: usize) -> (u64, u64) {
    let length = length as u64;
    let (header, fragments, fragment_header) = match (to, length > 1400) {
        (_, false) => (20, 1, 0),
        (IpAddr::V4(_), true) => (20, 4, 0),
        (IpAddr::V6(_), true) => (40, 4, 8),
    };
    let header = if to.is_ipv6() { 40 } else { header };
    let bytes = fragments * (ETHERNET + header + fragment_header) + UDP + length;
    (datagrams * fragments, datagrams * bytes)
}

fn every_datagram_is_counted_for_its_backend(hook: HookChoice) {
    let fleet = Fleet::new(hook);
    let outside = Machine::outside(4);
    for address in ADDRESSES {
        let to = service_at(address, 80);
        let mut totals = BTreeMap::<u8, Counts>::new();
        for length in [LENGTH, FRAGMENTED] {
            let by_guest = fleet.client().run(move || send_datagrams(to, length));
            let by_host = send_datagrams(to, length);
            let by_outside = outside.run(move || send_datagrams(to, length));
            // One more byte comes back: the backend's number.
            let lengths = [length, length + 1];
            for (number, datagrams) in by_guest.into_iter().chain(by_host).chain(by_outside) {
                for (sum, length) in totals.entry(number).or_default().iter_mut().zip(lengths) {
                    let (packets, bytes) = expected(to.ip(), datagrams, length);
                    *sum = (sum.0 + packets, sum.1 + bytes);
                }
            }
        }
        assert_eq!(totals.len(), 2, "both backends answered");
        let mut wanted = BTreeMap::from([(None, Counts::default())]);
        for (number, counts) in totals {
            let guest = &fleet.guests[usize::from(number) - 1];
            let address = if to.is_ipv4() { guest.ipv4 } else { guest.ipv6 };
            wanted.insert(Some(address), counts);
        }
        assert_eq!(counted(&fleet, to.ip(), Protocol::Udp), wanted, "{address}");
        let none = counted(&fleet, to.ip(), Protocol::Tcp);
        assert!(none.values().all(|counts| *counts == Counts::default()));
    }
    check_that_counts_stay(fleet);
}

/// A service counts on when a backend leaves or the agent goes, and anew when it was gone itself.
fn check_that_counts_stay(mut fleet: Fleet) {
    let at = |address: &str| service_at(address, 80).ip();
    let before = ADDRESSES.map(|address| counted(&fleet, at(address), Protocol::Udp));
    fleet.serve_from(&[1]);
    for (address, before) in ADDRESSES.into_iter().zip(&before) {
        let now = counted(&fleet, at(address), Protocol::Udp);
        let [first, second] = [0, 1].map(|index: usize| {
            let guest = &fleet.guests[index];
            let is_ipv4 = at(address).is_ipv4();
            Some(if is_ipv4 { guest.ipv4 } else { guest.ipv6 })
        });
        let wanted = BTreeMap::from([(None, before[&first]), (second, before[&second])]);
        assert_eq!(now, wanted, "{address}");
    }
    let left = ADDRESSES.map(|address| counted(&fleet, at(address), Protocol::Udp));
    fleet = fleet.open_again();
    fleet.serve_from(&[1]);
    let taken_over = ADDRESSES.map(|address| counted(&fleet, at(address), Protocol::Udp));
    assert_eq!(taken_over, left);
    fleet.datapath.set_services(&[]).expect("valid");
    assert_eq!(fleet.datapath.service_use().expect("read"), []);
    fleet.serve_from(&[0, 1]);
    let uses = fleet.datapath.service_use().expect("read");
    assert!(uses.iter().all(|used| counts(used) == Counts::default()));
}

fn large_transfers_are_counted_whole(hook: HookChoice) {
    const MUCH: usize = 4 << 20;
    let fleet = Fleet::new(hook);
    for address in ADDRESSES {
        let to = service_at(address, 80);
        let number = fleet.client().run(move || {
            let (mut stream, number) = connect(to);
            talk(&mut stream, MUCH).expect("it answers");
            number
        });
        let guest = &fleet.guests[usize::from(number) - 1];
        let backend = if to.is_ipv4() { guest.ipv4 } else { guest.ipv6 };
        let counted = counted(&fleet, to.ip(), Protocol::Tcp);
        let tap = fleet.datapath.counters("tap3").expect("attached");
        let passed = [tap.from_guest.passed, tap.to_guest.passed];
        for ((packets, bytes), passed) in counted[&Some(backend)].into_iter().zip(passed) {
            assert!(bytes > MUCH as u64, "{counted:?}");
            // The interface has them, too, with those of the other version and of neighbour discovery.
            assert!(packets > 2 && packets <= passed.packets && bytes <= passed.bytes);
        }
    }
}

#[test]
fn what_the_client_may_not_send_is_not_counted() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    let closed = keelson_ebpf::InterfacePolicy {
        egress: keelson_ebpf::EgressPolicy::Only(Vec::new()),
        ..network::fleet::policy(fleet.client())
    };
    fleet.datapath.attach(&closed).expect("attached");
    let to = service_at(ADDRESSES[0], 80);
    fleet.client().run(move || {
        datagrams(to).send(b"anyone?").expect("sent");
    });
    let refused = || {
        let counters = fleet.datapath.counters("tap3").expect("attached");
        counters
            .from_guest
            .dropped_for(keelson_ebpf::DropReason::NotAllowed)
    };
    for _ in 0..200 {
        if refused().packets > 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(refused().packets, 1);
    let uses = fleet.datapath.service_use().expect("read");
    assert!(uses.iter().all(|used| counts(used) == Counts::default()));
}

/// Where there are more backends than can be counted one by one, the rest are counted together.
#[test]
fn others_are_counted_together() {
    let mut fleet = Fleet::new(HookChoice::Auto);
    fleet.datapath.set_services(&[]).expect("valid");
    let mut services: Vec<Service> = (0..MAX_COUNTED_BACKENDS / MAX_BACKENDS)
        .map(crowd)
        .collect();
    fleet.datapath.set_services(&services).expect("valid");
    services.extend(fleet.services(&[0, 1], SERVED));
    fleet.datapath.set_services(&services).expect("valid");
    let to = service_at(ADDRESSES[0], 80);
    let answered = fleet.client().run(move || send_datagrams(to, LENGTH));
    assert_eq!(answered.values().sum::<u64>(), DATAGRAMS);
    let wanted = [LENGTH, LENGTH + 1].map(|length| expected(to.ip(), DATAGRAMS, length));
    assert_eq!(
        counted(&fleet, to.ip(), Protocol::Udp),
        BTreeMap::from([(None, wanted)])
    );
    let uses = fleet.datapath.service_use().expect("read");
    let one_by_one = uses.iter().filter(|used| used.backend.is_some()).count();
    assert_eq!(one_by_one, MAX_COUNTED_BACKENDS);
}

/// A service with as many backends as fit, none of which is there.
fn crowd(number: usize) -> Service {
    let backends = (0..MAX_BACKENDS).map(|index| {
        let index = u8::try_from(index).expect("few");
        ServiceBackend {
            address: [10, 78, u8::try_from(number).expect("few"), index].into(),
            port: 80,
            mac: MacAddress([2, 0, 0, 0, 1, index]),
        }
    });
    Service {
        network: 8,
        address: [10, 79, 0, u8::try_from(number).expect("few") + 1].into(),
        protocol: Protocol::Udp,
        port: 80,
        backends: backends.collect(),
        draining: Vec::new(),
    }
}
