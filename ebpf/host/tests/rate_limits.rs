//! Limits of an interface: the average is kept whatever is offered, by however many CPUs.

mod network;

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use keelson_ebpf::{
    Datapath, Direction, DropReason, HookChoice, InterfaceLimits, InterfacePolicy, Protocol,
    RateLimit, Verdict,
};
use network::frames::{self, Ends};
use network::{Guest, HOST_IP, HOST_MAC, Network, allow, host_socket};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

with_both_hooks!(
    a_flood_of_the_guest_keeps_to_the_average,
    limits_change_under_traffic
);

fn to_guest(guest: &Guest, size: usize) -> Vec<u8> {
    let ends = Ends {
        source_mac: HOST_MAC,
        destination_mac: guest.mac,
        source: HOST_IP,
        destination: guest.ip,
    };
    frames::udp(ends, 9000, 7000, &vec![0; size])
}

fn from_guest(guest: &Guest, size: usize) -> Vec<u8> {
    let ends = Ends {
        source_mac: guest.mac,
        destination_mac: HOST_MAC,
        source: guest.ip,
        destination: HOST_IP,
    };
    frames::udp(ends, 7000, 9000, &vec![0; size])
}

fn limited(guest: &Guest, limits: InterfaceLimits) -> InterfacePolicy {
    InterfacePolicy {
        limits,
        ..guest.policy_with(&[allow(Protocol::Udp, 7000..=7000)])
    }
}

fn packets(rate: u64, burst: Duration) -> RateLimit {
    RateLimit {
        packets_per_second: Some(rate),
        burst,
        ..RateLimit::default()
    }
}

fn bits(rate: u64, burst: Duration) -> RateLimit {
    RateLimit {
        bits_per_second: Some(rate),
        burst,
        ..RateLimit::default()
    }
}

fn passes(datapath: &mut Datapath, guest: &Guest, direction: Direction, frame: &[u8]) -> bool {
    let verdict = datapath.evaluate(&guest.name, direction, frame);
    verdict.expect("run") == Verdict::Pass
}

/// How much may pass in a time: at least the burst, which is there at once however slow this machine
/// is, and at most that and what the average allows meanwhile.
fn bounds(rate: u64, burst: Duration, took: Duration) -> RangeInclusive<u64> {
    let in_time = |time: Duration| {
        let packets = u128::from(rate) * time.as_nanos() / 1_000_000_000;
        u64::try_from(packets).expect("few")
    };
    // One packet that finds nothing left but is not behind yet, and one for what is rounded.
    in_time(burst)..=in_time(burst + took) + 2
}

/// Any limit and any frames: the number that passes is within what the limit says.
#[test]
fn any_limit_is_kept() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let cases = (
        any::<bool>(),
        any::<bool>(),
        1_000..200_000_u64,
        1..40_u64,
        18..1400_usize,
    );
    let mut runner = TestRunner::new(Config {
        cases: 32,
        failure_persistence: None,
        ..Config::default()
    });
    let state = std::cell::RefCell::new(&mut datapath);
    let result = runner.run(&cases, |(of_guest, by_bits, rate, burst_ms, size)| {
        let datapath = &mut **state.borrow_mut();
        let burst = Duration::from_millis(burst_ms);
        let (direction, frame) = if of_guest {
            (Direction::FromGuest, from_guest(&guest, size))
        } else {
            (Direction::ToGuest, to_guest(&guest, size))
        };
        let frame_bits = u64::try_from(frame.len()).expect("short") * 8;
        let limit = if by_bits {
            bits(rate * frame_bits, burst)
        } else {
            packets(rate, burst)
        };
        // The other direction is not limited.
        let (from_guest, to_guest) = if of_guest {
            (limit, RateLimit::default())
        } else {
            (RateLimit::default(), limit)
        };
        let limits = InterfaceLimits {
            from_guest,
            to_guest,
        };
        // The bucket begins full.
        datapath.detach(&guest.name).expect("detached");
        datapath.attach(&limited(&guest, limits)).expect("attached");
        let started = Instant::now();
        let offered = rate * burst_ms / 1000 + 300;
        let mut passed = 0;
        for _ in 0..offered {
            passed += u64::from(passes(datapath, &guest, direction, &frame));
        }
        let bounds = bounds(rate, burst, started.elapsed());
        assert!(bounds.contains(&passed), "{passed} passed, not {bounds:?}");
        let counters = datapath.counters(&guest.name).expect("attached");
        let counters = if of_guest {
            counters.from_guest
        } else {
            counters.to_guest
        };
        assert_eq!(counters.passed.packets, passed);
        let dropped = counters.dropped_for(DropReason::RateLimited).packets;
        assert_eq!(dropped, offered - passed);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn a_packet_larger_than_the_burst_passes_and_is_paid_for() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let guest = network.guest(1);
    // 1 ms of 8 kbit/s is one byte; 1000 bytes take a second.
    let limits = InterfaceLimits {
        to_guest: bits(8_000, Duration::from_millis(1)),
        ..InterfaceLimits::default()
    };
    datapath.attach(&limited(&guest, limits)).expect("attached");
    let frame = to_guest(&guest, 1400);
    let started = Instant::now();
    assert!(passes(&mut datapath, &guest, Direction::ToGuest, &frame));
    let next = passes(&mut datapath, &guest, Direction::ToGuest, &frame);
    assert!(!next || started.elapsed() > Duration::from_secs(1));
}

#[test]
fn the_limits_of_one_direction_and_interface_are_nobody_elses() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let (guest, other) = (network.guest(1), network.guest(2));
    let limits = InterfaceLimits {
        to_guest: packets(1, Duration::from_millis(1)),
        ..InterfaceLimits::default()
    };
    datapath.attach(&limited(&guest, limits)).expect("attached");
    let free = InterfaceLimits::default();
    datapath.attach(&limited(&other, free)).expect("attached");
    let started = Instant::now();
    let (mut limited, mut sent) = (0, 0);
    while sent < 100 || started.elapsed() < Duration::from_millis(50) {
        sent += 1;
        let frame = to_guest(&guest, 20);
        limited += u64::from(passes(&mut datapath, &guest, Direction::ToGuest, &frame));
        let frame = from_guest(&guest, 20);
        assert!(passes(&mut datapath, &guest, Direction::FromGuest, &frame));
        let frame = to_guest(&other, 20);
        assert!(passes(&mut datapath, &other, Direction::ToGuest, &frame));
    }
    assert!(limited <= 2 + started.elapsed().as_secs());
}

/// Four threads send at once through a real TAP device, each on whatever CPU it runs.
fn a_flood_of_the_guest_keeps_to_the_average(hook: HookChoice) {
    const THREADS: u64 = 4;
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let rate = 2_000;
    let burst = Duration::from_millis(200);
    let limits = InterfaceLimits {
        from_guest: packets(rate, burst),
        ..InterfaceLimits::default()
    };
    datapath.attach(&limited(&guest, limits)).expect("attached");
    guest.up();
    let before = datapath.counters(&guest.name).expect("attached").from_guest;
    let started = Instant::now();
    let sent: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    let frame = from_guest(&guest, 20);
                    let mut sent = 0;
                    while started.elapsed() < Duration::from_secs(1) {
                        guest.send(&frame);
                        sent += 1;
                    }
                    sent
                })
            })
            .collect();
        let sent = threads
            .into_iter()
            .map(|thread| thread.join().expect("done"));
        sent.sum()
    });
    let took = started.elapsed();
    let after = datapath.counters(&guest.name).expect("attached").from_guest;
    let passed = after.passed.packets - before.passed.packets;
    let (least, most) = bounds(rate, burst, took).into_inner();
    let range = least.min(sent)..=most + THREADS;
    assert!(
        range.contains(&passed),
        "{passed} of {sent} passed, not {range:?}"
    );
    assert_eq!(
        after.dropped_for(DropReason::RateLimited).packets,
        sent - passed
    );
    println!("{passed} of {sent} passed in {took:?} at {rate} per second");
}

fn limits_change_under_traffic(hook: HookChoice) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let nearly_nothing = InterfaceLimits {
        to_guest: packets(1, Duration::from_millis(1)),
        ..InterfaceLimits::default()
    };
    let free = limited(&guest, InterfaceLimits::default());
    let attached = datapath.attach(&free).expect("attached");
    guest.up();
    let socket = host_socket(9000);
    let send = |text: &str| {
        let sent = socket.send_to(text.as_bytes(), (guest.ip, 7000));
        sent.expect("sent");
    };
    let received = || String::from_utf8_lossy(&frames::seen(&guest.receive()).data).into_owned();
    send("free");
    assert_eq!(received(), "free");
    let flows = datapath.flows(&guest.name).expect("read").len();

    let started = Instant::now();
    let policy = limited(&guest, nearly_nothing);
    datapath.update(&policy).expect("updated");
    for _ in 0..50 {
        send("flood");
    }
    let counters = datapath.counters(&guest.name).expect("attached");
    let dropped = counters.to_guest.dropped_for(DropReason::RateLimited);
    assert!(
        dropped.packets + 2 + started.elapsed().as_secs() >= 50,
        "{dropped:?}"
    );
    // The agent goes away and comes back: the limit is in force all the time.
    drop(datapath);
    let mut datapath = network.open();
    assert_eq!(datapath.attach(&policy).expect("taken over"), attached);
    send("flood");
    let again = datapath.counters(&guest.name).expect("attached");
    let again = again.to_guest.dropped_for(DropReason::RateLimited);
    assert!(again.packets > dropped.packets || started.elapsed().as_secs() >= 1);

    datapath.update(&free).expect("updated");
    while guest.receive_now().is_some() {}
    for round in 0..50 {
        send(&format!("free again {round}"));
        assert_eq!(received(), format!("free again {round}"));
    }
    assert_eq!(datapath.flows(&guest.name).expect("read").len(), flows);
}
