//! Network interfaces on a TAP device, in a network namespace of the test's own.

use std::net::Ipv4Addr;
use std::path::Path;

use keelson_vmm_tests::{EchoSocket, FrameSocket, GuestBuilder, Namespaces};
use serde_json::json;

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

#[test]
fn each_queue_pair_works_and_pairs_come_and_go() {
    let namespaces = Namespaces::enter();
    namespaces.tap_of_several_queues("payload0", "10.77.0.1/24");
    let ended = GuestBuilder::new(
        "net-pairs:address=10.77.0.2,target=10.77.0.1,pairs=4,rounds=40 \
         net-ping:address=10.77.0.2,target=10.77.0.1,count=20 \
         net-pairs:address=10.77.0.2,target=10.77.0.1,pairs=4",
    )
    .interface_with("eth0", "payload0", MAC, &json!({"queues": 4}))
    .run();
    ended.assert_passed();
    // 20 rounds of 4 pairs and 20 of one, 3 pings each. The TAP learns a flow's queue from what the guest
    // sends, so that all answers but the odd one that was under way come on the queue of their question.
    let line = ended.line("payload: net-pairs ok pairs=4 pings=300 lost=0 own=");
    let own: u32 = line
        .rsplit('=')
        .next()
        .unwrap_or_default()
        .parse()
        .expect("a number");
    assert!(own > 150, "{line}");
}

#[test]
fn a_guest_has_a_queue_pair_for_each_vcpu() {
    let namespaces = Namespaces::enter();
    namespaces.tap_of_several_queues("payload0", "10.77.0.1/24");
    namespaces.tap("payload1", "10.78.0.1/24");
    let ended = GuestBuilder::new(
        "net-pairs:address=10.77.0.2,target=10.77.0.1,pairs=3 \
         net-ping:interface=1,address=10.78.0.2,target=10.78.0.1 \
         net-ping:address=10.77.0.2,target=10.77.0.1",
    )
    .set("/vcpus", 3)
    .interface("eth0", "payload0", MAC)
    .interface("eth1", "payload1", "52:54:00:12:34:57")
    .run();
    ended.assert_passed();
}

#[test]
fn a_tap_of_one_queue_is_refused_to_an_interface_of_several() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    GuestBuilder::new("hello")
        .interface_with("eth0", "payload0", MAC, &json!({"queues": 2}))
        .run()
        .assert_refused(5, &["eth0", "payload0", "2 queue pairs", "multi_queue"]);
}

#[test]
fn vhost_net_is_an_error_only_where_it_must_be_used() {
    if Path::new("/dev/vhost-net").exists() {
        println!("skipped: this host has /dev/vhost-net, and its use is tested in the lab");
        return;
    }
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let guest = |vhost: &str| {
        GuestBuilder::new("net-ping:address=10.77.0.2,target=10.77.0.1").interface_with(
            "eth0",
            "payload0",
            MAC,
            &json!({"vhost": vhost}),
        )
    };
    guest("auto").run().assert_passed();
    guest("off").run().assert_passed();
    let refused = guest("on").run();
    refused.assert_refused(5, &["eth0", "/dev/vhost-net", "vhost_net"]);
}
