//! Network interfaces on a TAP device, in a network namespace of the test's own.

use std::net::Ipv4Addr;

use keelson_vmm_tests::{EchoSocket, FrameSocket, GuestBuilder, Namespaces};

const MAC: &str = "52:54:00:12:34:56";
const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

#[test]
fn the_guest_pings_the_host() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let ended = GuestBuilder::new(
        "net-arp:address=10.77.0.2,target=10.77.0.1 \
         net-ping:address=10.77.0.2,target=10.77.0.1,count=20 \
         net-ping:address=10.77.0.2,target=10.77.0.1,size=0 \
         net-ping:address=10.77.0.2,target=10.77.0.1,size=1472",
    )
    .interface("eth0", "payload0", MAC)
    .run();
    ended.assert_passed();
}

#[test]
fn the_host_pings_the_guest() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let mut guest = GuestBuilder::new("net-serve:address=10.77.0.2,ms=60000,echoes=10")
        .interface("eth0", "payload0", MAC)
        .start();
    let line = guest.wait_for_line("payload: net-serve ready");
    assert!(line.ends_with(MAC), "{line}");
    let echo = EchoSocket::open();
    for sequence in 1..=10 {
        echo.ping(Ipv4Addr::new(10, 77, 0, 2), sequence);
    }
    let ended = guest.wait();
    ended.assert_passed();
    assert!(ended.line("payload: net-serve ok").ends_with("echoes=10"));
}

/// The TAP passes on what the guest sends: to drop it is the eBPF programs' part, not the VMM's.
#[test]
fn a_frame_with_a_foreign_source_leaves_on_the_tap() {
    const FOREIGN: [u8; 6] = [0x52, 0x54, 0x00, 0x66, 0x66, 0x66];
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let frames = FrameSocket::open();
    let ended = GuestBuilder::new(
        "net-spoof:mac=52:54:00:66:66:66,address=10.77.0.99,target=10.77.0.1 \
         net-spoof:address=10.77.0.98,target=10.77.0.1",
    )
    .interface("eth0", "payload0", MAC)
    .run();
    ended.assert_passed();
    let ping_from = |mac: [u8; 6], address: [u8; 4]| {
        move |frame: &[u8]| {
            frame.get(6..12) == Some(&mac[..]) && frame.get(26..30) == Some(&address[..])
        }
    };
    frames.wait_for(ping_from(FOREIGN, [10, 77, 0, 99]));
    frames.wait_for(ping_from(MAC_BYTES, [10, 77, 0, 98]));
}

#[test]
fn interfaces_keep_their_order_and_their_addresses() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    namespaces.tap("payload1", "10.78.0.1/24");
    let ended = GuestBuilder::new(
        "net-ping:interface=0,address=10.77.0.2,target=10.77.0.1 \
         net-ping:interface=1,address=10.78.0.2,target=10.78.0.1",
    )
    .interface("eth0", "payload0", MAC)
    .interface("eth1", "payload1", "52:54:00:12:34:57")
    .run();
    ended.assert_passed();
}

#[test]
fn the_interface_works_after_a_reset() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let mut guest = GuestBuilder::new("net-ping:address=10.77.0.2,target=10.77.0.1 hang")
        .interface("eth0", "payload0", MAC)
        .start();
    guest.wait_for_line("payload: hang ok");
    let mut client = guest.client();
    client.reset().expect("it can be reset");
    keelson_vmm_tests::wait_until("second boot's ping", || {
        (guest.log().matches("payload: net-ping ok").count() == 2).then_some(())
    });
    client.kill().expect("it can be killed");
    assert_eq!(guest.wait().code, Some(0));
}
