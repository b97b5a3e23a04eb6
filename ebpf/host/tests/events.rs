//! Drops and flows are reported to whoever waits for them, and only then.

mod network;

use keelson_ebpf::{Direction, DropReason, Happening, HookChoice, Observed, Protocol};
use network::frames::{self, Ends};
use network::{HOST_IP, HOST_MAC, Network, allow};

#[test]
fn drops_and_flows_are_reported_to_who_waits_for_them() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    let mut reader = datapath.take_event_reader().expect("the first");
    assert!(datapath.take_event_reader().is_none());
    let guest = network.guest(1);
    let policy = guest.policy_with(&[allow(Protocol::Tcp, 22..=22)]);
    datapath.attach(&policy).expect("attached");
    let ends = Ends {
        source_mac: guest.mac,
        destination_mac: HOST_MAC,
        source: guest.ip,
        destination: HOST_IP,
    };
    let tcp = |source_port, flags| frames::Tcp {
        source_port,
        destination_port: 80,
        sequence: 1,
        acknowledgement: 0,
        flags,
    };
    let send = |datapath: &mut keelson_ebpf::Datapath, frame: &[u8]| {
        datapath
            .evaluate(&guest.name, Direction::FromGuest, frame)
            .expect("the kernel takes it");
    };
    let spoofed = Ends {
        source: HOST_IP,
        ..ends
    };
    send(&mut datapath, &frames::tcp(ends, tcp(1000, frames::SYN)));
    assert!(reader.read(10).is_empty(), "nobody waits");

    let all = Observed {
        drops: true,
        flows: true,
    };
    datapath.observe(all).expect("observed");
    send(&mut datapath, &frames::udp(spoofed, 5, 6, b"x"));
    send(&mut datapath, &frames::tcp(ends, tcp(2000, frames::SYN)));
    send(&mut datapath, &frames::tcp(ends, tcp(2000, frames::SYN)));
    send(&mut datapath, &frames::tcp(ends, tcp(2000, frames::RST)));
    let events = reader.read(10);
    let happenings: Vec<Happening> = events.iter().map(|event| event.happening).collect();
    assert_eq!(
        happenings,
        [
            Happening::Dropped(DropReason::SpoofedIpv4),
            Happening::Opened,
            Happening::Closed
        ]
    );
    let opened = &events[1];
    assert_eq!(opened.interface, guest.name);
    assert_eq!(opened.addresses, Some((guest.ip.into(), HOST_IP.into())));
    assert_eq!((opened.ports, opened.protocol), ((2000, 80), 6));
    assert_eq!(events[0].ports, (5, 6));

    datapath.observe(Observed::default()).expect("observed");
    send(&mut datapath, &frames::udp(spoofed, 5, 6, b"x"));
    assert!(reader.read(10).is_empty(), "nobody waits any more");
}
