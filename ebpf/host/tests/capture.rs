//! Captured packets: both directions, as they came, with what became of them.

mod network;

use keelson_ebpf::{
    CapturedPacket, Direction, DropReason, HookChoice, MAX_SNAP_LENGTH, MacAddress, Protocol,
    Verdict,
};
use network::frames::{self, ARP, BROADCAST, Ends};
use network::{Guest, HOST_IP, HOST_MAC, Network, allow};

fn ends(guest: &Guest, direction: Direction) -> Ends {
    match direction {
        Direction::FromGuest => Ends {
            source_mac: guest.mac,
            destination_mac: HOST_MAC,
            source: guest.ip,
            destination: HOST_IP,
        },
        Direction::ToGuest => Ends {
            source_mac: HOST_MAC,
            destination_mac: guest.mac,
            source: HOST_IP,
            destination: guest.ip,
        },
    }
}

fn brief(packet: &CapturedPacket) -> (Direction, Option<DropReason>, &[u8]) {
    (packet.direction, packet.dropped, &packet.data)
}

#[test]
fn packets_of_one_interface_are_captured_until_told_otherwise() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let mut reader = datapath.take_capture_reader().expect("the only one");
    assert!(datapath.take_capture_reader().is_none());
    let (guest, other) = (network.guest(1), network.guest(2));
    let policy = guest.policy_with(&[allow(Protocol::Udp, 7000..=7000)]);
    datapath.attach(&policy).expect("attached");
    datapath.attach(&other.policy()).expect("attached");
    let outgoing = frames::udp(ends(&guest, Direction::FromGuest), 1, 2, b"from guest");
    let allowed = frames::udp(ends(&guest, Direction::ToGuest), 2, 7000, b"to guest");
    let refused = frames::udp(ends(&guest, Direction::ToGuest), 2, 7001, b"refused");
    let elsewhere = frames::udp(ends(&other, Direction::FromGuest), 1, 2, b"other");
    let all = [
        (&guest, Direction::FromGuest, &outgoing, Verdict::Pass),
        (&guest, Direction::ToGuest, &allowed, Verdict::Pass),
        (&guest, Direction::ToGuest, &refused, Verdict::Drop),
        (&other, Direction::FromGuest, &elsewhere, Verdict::Pass),
    ];
    let send = |datapath: &mut keelson_ebpf::Datapath| {
        for (guest, direction, frame, verdict) in all {
            let said = datapath.evaluate(&guest.name, direction, frame);
            assert_eq!(said.expect("run"), verdict);
        }
    };
    send(&mut datapath);
    assert_eq!(reader.read(10), [], "nobody asked for it");

    datapath.capture(&guest.name, true).expect("captured");
    send(&mut datapath);
    // Also across other rules.
    datapath.update(&guest.policy()).expect("updated");
    let said = datapath.evaluate(&guest.name, Direction::ToGuest, &refused);
    assert_eq!(said.expect("run"), Verdict::Drop);
    let captured = reader.read(10);
    let not_allowed = Some(DropReason::NotAllowed);
    assert_eq!(
        captured.iter().map(brief).collect::<Vec<_>>(),
        [
            (Direction::FromGuest, None, &*outgoing),
            (Direction::ToGuest, None, &*allowed),
            (Direction::ToGuest, not_allowed, &*refused),
            (Direction::ToGuest, not_allowed, &*refused),
        ]
    );
    for (packet, before) in captured.iter().skip(1).zip(&captured) {
        assert_eq!(packet.interface, guest.name);
        assert_eq!(packet.length as usize, packet.data.len());
        assert!(packet.time_ns >= before.time_ns);
        assert_eq!(packet.lost, 0);
    }

    datapath.capture(&guest.name, false).expect("ended");
    send_nothing_captured(&mut datapath, &guest, &outgoing);
    assert_eq!(reader.read(10), []);
}

fn send_nothing_captured(datapath: &mut keelson_ebpf::Datapath, guest: &Guest, frame: &[u8]) {
    let said = datapath.evaluate(&guest.name, Direction::FromGuest, frame);
    assert_eq!(said.expect("run"), Verdict::Pass);
}

#[test]
fn what_is_answered_in_place_is_captured_as_it_came() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let mut reader = datapath.take_capture_reader().expect("the only one");
    let (guest, other) = (network.guest(1), network.guest(2));
    for guest in [&guest, &other] {
        let policy = keelson_ebpf::InterfacePolicy {
            network: 7,
            ..guest.policy()
        };
        datapath.attach(&policy).expect("attached");
        guest.up();
    }
    datapath.capture(&guest.name, true).expect("captured");
    let nobody = MacAddress([0; 6]);
    let request = frames::arp(1, (guest.mac, guest.ip), (nobody, other.ip));
    let request = frames::ethernet(BROADCAST, guest.mac, ARP, &request);
    guest.send(&request);
    let answer = guest.receive();
    let captured = reader.read(10);
    assert_eq!(
        captured.iter().map(brief).collect::<Vec<_>>(),
        [
            (Direction::FromGuest, None, &*request),
            (Direction::ToGuest, None, &*answer),
        ]
    );
}

#[test]
fn a_flood_is_cut_and_what_is_lost_is_counted() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let mut reader = datapath.take_capture_reader().expect("the only one");
    let guest = network.guest(1);
    let policy = keelson_ebpf::InterfacePolicy {
        mtu: 9000,
        ..guest.policy()
    };
    datapath.attach(&policy).expect("attached");
    guest.up();
    datapath.capture(&guest.name, true).expect("captured");
    let frame = frames::udp(ends(&guest, Direction::FromGuest), 1, 2, &[7; 8000]);
    // What is lost, the CPU that lost it tells later: stay there.
    let mut cpus = rustix::thread::CpuSet::new();
    cpus.set(rustix::thread::sched_getcpu());
    rustix::thread::sched_setaffinity(None, &cpus).expect("a CPU that it runs on");
    // The ring buffer holds about a thousand of them.
    for _ in 0..1500 {
        guest.send(&frame);
    }
    // The host answers some of them with an ICMP error.
    let sent = |packets: Vec<CapturedPacket>| -> Vec<CapturedPacket> {
        let packets = packets.into_iter();
        packets
            .filter(|packet| packet.direction == Direction::FromGuest)
            .collect()
    };
    let first = sent(reader.read(usize::MAX));
    assert!((900..1100).contains(&first.len()), "{}", first.len());
    for packet in &first {
        assert_eq!(packet.data, frame[..MAX_SNAP_LENGTH]);
        assert_eq!(packet.length as usize, frame.len());
    }
    for _ in 0..200 {
        guest.send(&frame);
    }
    let lost = sent(reader.read(usize::MAX));
    let lost: u32 = lost.iter().map(|packet| packet.lost).sum();
    assert!(lost > 0, "some say that some were lost");
    assert!(lost <= 1500, "{lost}");
}

#[test]
fn an_agent_that_comes_back_captures_nothing() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let guest = network.guest(1);
    datapath.attach(&guest.policy()).expect("attached");
    datapath.capture(&guest.name, true).expect("captured");
    drop(datapath);
    let mut datapath = network.open();
    let mut reader = datapath.take_capture_reader().expect("the only one");
    let frame = frames::udp(ends(&guest, Direction::FromGuest), 1, 2, b"hello");
    send_nothing_captured(&mut datapath, &guest, &frame);
    assert_eq!(reader.read(10), []);
}
