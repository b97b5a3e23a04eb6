use keelson_ebpf_common::{Address, NAME_LENGTH};
use proptest::prelude::*;

use super::*;

const NOW: Duration = Duration::from_hours(1000);

fn interface(has_ipv6: bool) -> PolicyEntry {
    let address: Address = if has_ipv6 { [1; 4] } else { NO_ADDRESS };
    PolicyEntry {
        ipv6: address,
        link_local: address,
        ipv4: 1,
        generation: 1,
        ingress_table: 0,
        egress_table: 0,
        network: 1,
        slot: 1,
        mac: [2; 6],
        mtu: 1500,
        flags: 0,
        hook: 1,
        reserved: [0; 5],
        name: [0; NAME_LENGTH],
    }
}

prop_compose! {
    /// What a peer may say.
    fn anything()(
        peer in any::<IpAddr>(),
        ports in any::<(u16, u16)>(),
        protocol in prop_oneof![Just(TCP), Just(UDP), Just(ICMP), Just(ICMPV6), any::<u8>()],
        numbers in (0_u8..5, 0_u8..6, 0_u8..6),
        flags in any::<(bool, bool)>(),
        idle_milliseconds in prop_oneof![0..200_000_u32, any::<u32>()],
    ) -> MovedFlow {
        MovedFlow {
            peer,
            guest_port: ports.0,
            peer_port: ports.1,
            protocol,
            local: numbers.0,
            opened_by_guest: flags.0,
            answered: flags.1,
            phase: numbers.1,
            finished: numbers.2,
            idle_milliseconds,
        }
    }
}

prop_compose! {
    /// What a host's maps may hold.
    fn real()(
        flow in anything(),
        local in 0_u8..=2,
        phase in 0_u8..=3,
        finished in 0_u8..=3,
        asker in 1_u16..=2,
        v4 in any::<std::net::Ipv4Addr>(),
        v6 in any::<std::net::Ipv6Addr>(),
        idle in any::<u32>(),
    ) -> MovedFlow {
        let is_ipv4 = local == local::IPV4;
        let protocol = match (flow.protocol, is_ipv4) {
            (ICMP, false) => ICMPV6,
            (ICMPV6, true) => ICMP,
            (other, _) => other,
        };
        let (guest_port, peer_port) = match protocol {
            TCP | UDP => (flow.guest_port, flow.peer_port),
            ICMP | ICMPV6 => (flow.guest_port, asker),
            _ => (0, 0),
        };
        let peer = if is_ipv4 { v4.into() } else { v6.into() };
        let most = u32::try_from(limit(protocol, phase).as_millis()).expect("fits");
        MovedFlow {
            peer,
            local,
            protocol,
            guest_port,
            peer_port,
            phase,
            finished,
            idle_milliseconds: idle % most,
            ..flow
        }
    }
}

proptest! {
    #[test]
    fn whatever_comes_makes_a_flow_or_is_refused(flow in anything(), has_ipv6: bool) {
        let Ok(Some((key, state))) = flow.entry(&interface(has_ipv6), NOW) else {
            return Ok(());
        };
        prop_assert_eq!(from_map(key.peer), flow.peer);
        prop_assert_eq!(key.reserved, [0; 2]);
        prop_assert!(key.local == local::IPV4 || has_ipv6 && key.local <= local::LINK_LOCAL);
        prop_assert_eq!(key.local == local::IPV4, from_map(key.peer).is_ipv4());
        prop_assert_eq!((state.generation, state.translated), (0, 0));
        prop_assert!(state.opener <= 1 && state.phase <= phase::CLOSED && state.finished <= 3);
        let seen = Duration::from_nanos(state.last_seen_ns);
        prop_assert!(seen <= NOW && NOW < seen + limit(key.protocol, state.phase));
    }

    #[test]
    fn what_a_host_has_the_other_one_gets(flow in real()) {
        prop_assume!(flow.check() != Err(BadFlow::Peer));
        let entries = flow.entry(&interface(true), NOW);
        let (key, state) = entries.expect("it is one").expect("it lives");
        prop_assert_eq!(MovedFlow::new(&key, &state, flow.answered, NOW), Some(flow));
    }
}

#[test]
fn a_flow_that_is_older_than_the_host_lives() {
    let flow = MovedFlow {
        peer: [192, 0, 2, 1].into(),
        guest_port: 1,
        peer_port: 2,
        protocol: TCP,
        local: local::IPV4,
        opened_by_guest: true,
        answered: true,
        phase: phase::ESTABLISHED,
        finished: 0,
        idle_milliseconds: 3_600_000,
    };
    let entries = flow.entry(&interface(false), Duration::from_mins(1));
    let (_, state) = entries.expect("it is one").expect("it lives");
    assert_eq!(state.last_seen_ns, 0);
}
