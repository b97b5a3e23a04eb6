//! An agent with another layout of maps takes over what an earlier one left: connections go on, and no packet
//! meets an open door or a closed one meanwhile.

mod network;
mod older;

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};

use keelson_ebpf::{Datapath, DatapathError, DropReason, HookChoice, InterfacePolicy, Protocol};
use keelson_ebpf_common::LAYOUT_VERSION;
use network::frames::{self, Ends};
use network::machine::{connect, talk};
use network::uplink::{EXTERNAL, INSIDE, SERVED, Scene, forwards, nat};
use network::{Guest, HOST_IP, HOST_MAC, Network, allow, host_socket};

with_both_hooks!(
    connections_go_on_and_nothing_is_open_meanwhile,
    a_captured_and_limited_interface_stays_so,
    a_later_layout_is_refused,
    what_guests_have_at_an_uplink_goes_on
);

fn to_host(guest: &Guest) -> Ends {
    Ends {
        source_mac: guest.mac,
        destination_mac: HOST_MAC,
        source: guest.ip,
        destination: HOST_IP,
    }
}

fn policy(guest: &Guest) -> InterfacePolicy {
    guest.policy_with(&[allow(Protocol::Udp, 7000..=7000)])
}

/// Traffic in both directions all the while: every packet that the rules allow arrives, none that they don't.
fn connections_go_on_and_nothing_is_open_meanwhile(hook: HookChoice) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    datapath.attach(&policy(&guest)).expect("attached");
    guest.up();
    let socket = host_socket(9000);
    // A connection that no rule of the host's direction allows, but the guest opened it.
    guest.send(&frames::udp(to_host(&guest), 4000, 9000, b"hello"));
    let mut buffer = [0; 64];
    socket.recv(&mut buffer).expect("it arrives");
    socket.send_to(b"answer", (guest.ip, 4000)).expect("sent");
    assert_eq!(frames::seen(&guest.receive()).data, b"answer");
    drop(datapath);

    older::make_older(&network.config);
    let done = AtomicBool::new(false);
    let stranger = UdpSocket::bind((HOST_IP, 0)).expect("bound");
    let rounds = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let mut rounds = 0_u32;
            // Some rounds after all is done, too.
            let mut after = 0;
            while after < 20 {
                after += u32::from(done.load(Ordering::Relaxed));
                stranger.send_to(b"no", (guest.ip, 9)).expect("sent");
                stranger.send_to(b"rule", (guest.ip, 7000)).expect("sent");
                assert_eq!(frames::seen(&guest.receive()).data, b"rule");
                socket.send_to(b"flow", (guest.ip, 4000)).expect("sent");
                assert_eq!(frames::seen(&guest.receive()).data, b"flow");
                rounds += 1;
            }
            rounds
        });
        let mut datapath = network.open();
        datapath.attach(&policy(&guest)).expect("taken over");
        done.store(true, Ordering::Relaxed);
        let rounds = traffic.join().expect("all arrived");
        check_counters(&datapath, &guest, rounds);
        rounds
    });
    assert!(rounds > 20, "{rounds}");
    assert!(guest.receive_now().is_none(), "what no rule allows");
    assert_eq!(older::layout(&network.config), LAYOUT_VERSION);
    let maps = network.config.pin_root.join("maps");
    assert!(!maps.join("POLICIES").exists(), "the old map is gone");
    assert!(maps.join("POLICIES_6").exists());
}

/// What was counted before and during the upgrade is there after it.
fn check_counters(datapath: &Datapath, guest: &Guest, rounds: u32) {
    let counters = datapath.counters(&guest.name).expect("attached").to_guest;
    let rounds = u64::from(rounds);
    assert_eq!(counters.passed.packets, 1 + 2 * rounds);
    let dropped = counters.dropped_for(DropReason::NotAllowed);
    assert_eq!(dropped.packets, rounds);
    assert_eq!(counters.dropped.len(), 1, "{counters:?}");
}

fn a_captured_and_limited_interface_stays_so(hook: HookChoice) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    let mut limited = policy(&guest);
    limited.limits.from_guest.packets_per_second = Some(1);
    datapath.attach(&limited).expect("attached");
    drop(datapath);
    older::make_older(&network.config);
    let datapath = network.open();
    let before = datapath.attached().expect("read");
    guest.up();
    for _ in 0..20 {
        guest.send(&frames::udp(to_host(&guest), 4000, 9000, b"hello"));
    }
    let counters = datapath.counters(&guest.name).expect("attached").from_guest;
    assert!(counters.dropped_for(DropReason::RateLimited).packets > 0);
    assert_eq!(before.len(), 1);
    assert_eq!(before[0].mac, guest.mac);
    assert_eq!(before[0].ipv4, Some(guest.ip));
}

fn a_later_layout_is_refused(hook: HookChoice) {
    let network = Network::new(hook);
    drop(network.open());
    for layout in [4, 1000] {
        older::set_layout(&network.config, layout);
        let error = Datapath::open(&network.config).expect_err("it is refused");
        let is_mismatch =
            matches!(error, DatapathError::LayoutMismatch { found, .. } if found == layout);
        assert!(is_mismatch, "{error}");
    }
}

/// Connections to the outside and through a forward, while the programs of guests and of the uplink are replaced.
fn what_guests_have_at_an_uplink_goes_on(hook: HookChoice) {
    let Scene {
        mut datapath,
        guests,
        outside,
        network,
    } = Scene::new(hook);
    let wanted = forwards(&guests[1], 8000, INSIDE);
    datapath.set_nat(&[nat()], &wanted).expect("valid");
    let (ipv4, ipv6) = (outside.ipv4, outside.ipv6);
    let to = [ipv4, ipv6].map(|address| SocketAddr::new(address, SERVED));
    let mut streams: Vec<TcpStream> = guests[0].run(move || to.map(|to| connect(to).0)).into();
    let to = EXTERNAL.map(|address| SocketAddr::new(address.parse().expect("valid"), 8000));
    streams.extend(outside.run(move || to.map(|to| connect(to).0)));
    let talk_all = |streams: &mut Vec<TcpStream>| {
        for stream in streams {
            talk(stream, 100_000).expect("the connection goes on");
        }
    };
    talk_all(&mut streams);
    drop(datapath);
    older::make_older(&network.config);
    talk_all(&mut streams);
    let mut datapath = network.open();
    talk_all(&mut streams);
    datapath.set_nat(&[nat()], &wanted).expect("valid");
    talk_all(&mut streams);
    assert_eq!(older::layout(&network.config), LAYOUT_VERSION);
}
