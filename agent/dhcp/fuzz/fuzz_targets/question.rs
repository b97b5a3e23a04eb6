//! What guests ask about their configuration: any frame, and any message in a frame that is in order, is
//! answered to the guest or not at all.

#![no_main]

use std::net::Ipv4Addr;
use std::time::Duration;

use keelson_dhcp::{InterfaceConfiguration, Ipv4Configuration, Ipv6Configuration, answer};
use libfuzzer_sys::fuzz_target;

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 9];
const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Ethernet, IPv4 and UDP from a client without an address to a DHCP server, lengths left out.
const DHCP: [u8; 42] = [
    255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0,
    0, 0, 0, 0, 255, 255, 255, 255, 0, 68, 0, 67, 0, 0, 0, 0,
];

fuzz_target!(|bytes: &[u8]| {
    let configuration = configuration();
    check(answer(&configuration, bytes));
    let Ok(udp) = u16::try_from(bytes.len() + 8) else {
        return;
    };
    let mut frame = DHCP.to_vec();
    frame[16..18].copy_from_slice(&udp.saturating_add(20).to_be_bytes());
    frame[38..40].copy_from_slice(&udp.to_be_bytes());
    frame.extend(bytes);
    check(answer(&configuration, &frame));

    let mut frame = [&[0x33; 6][..], &GUEST, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend(udp.to_be_bytes());
    frame.extend([17, 1, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0, 0, 9]);
    frame.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 2, 34, 2, 35]);
    frame.extend(udp.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(bytes);
    check(answer(&configuration, &frame));
});

fn check(answer: Option<Vec<u8>>) {
    let Some(frame) = answer else { return };
    assert!(frame.len() <= 1514);
    assert!(frame[0] & 1 == 1 || frame[..6] == GUEST);
    assert_eq!(frame[6..12], ROUTER);
}

fn configuration() -> InterfaceConfiguration {
    InterfaceConfiguration {
        mac: GUEST,
        router_mac: ROUTER,
        host_name: "web".into(),
        mtu: 1500,
        dns_servers: vec![Ipv4Addr::new(9, 9, 9, 9).into()],
        search_domains: vec!["corp.example".into()],
        lease_time: Duration::from_secs(3600),
        default_route: true,
        ipv4: Some(Ipv4Configuration {
            address: "10.77.0.9/24".parse().unwrap(),
            router: Ipv4Addr::new(10, 77, 0, 1),
            routes: Vec::new(),
            dhcp: true,
        }),
        ipv6: Some(Ipv6Configuration {
            address: "fd77::9/64".parse().unwrap(),
            router: "fe80::1".parse().unwrap(),
            routes: Vec::new(),
            dhcp: true,
            advertised: true,
            slaac: false,
        }),
    }
}
