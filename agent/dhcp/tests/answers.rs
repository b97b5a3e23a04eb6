//! What clients ask and are answered, message by message.

mod questions;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dhcproto::{v4, v6};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use keelson_dhcp::{advertisement, answer, withdrawal};
use questions::{
    GUEST_MAC, ROUTER_LINK_LOCAL, configuration, dhcp, dhcp_options, dhcpv6, dhcpv6_with,
    link_local, router_solicitation, server_id,
};

/// An answer taken apart.
struct Answer {
    destination: [u8; 6],
    from: IpAddr,
    to: IpAddr,
    payload: Vec<u8>,
}

fn read(frame: &[u8]) -> Answer {
    let packet = SlicedPacket::from_ethernet(frame).expect("an answer is well-formed");
    let (from, to): (IpAddr, IpAddr) = match packet.net.expect("it is IP") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        NetSlice::Arp(_) => panic!("nobody asked by ARP"),
    };
    let payload = match packet.transport.expect("it has a payload") {
        TransportSlice::Udp(udp) => udp.payload(),
        TransportSlice::Icmpv6(icmp) => icmp.slice(),
        other => panic!("no answer is {other:?}"),
    };
    Answer {
        destination: frame[..6].try_into().expect("six bytes"),
        from,
        to,
        payload: payload.to_vec(),
    }
}

fn dhcp_answer(question: &v4::Message) -> Option<(Answer, v4::Message)> {
    let frame = answer(&configuration(), &dhcp(question))?;
    let answer = read(&frame);
    let message = questions::decode(&answer.payload);
    Some((answer, message))
}

fn dhcpv6_answer(question: &v6::Message) -> Option<v6::Message> {
    let answer = read(&answer(&configuration(), &dhcpv6(question))?);
    assert_eq!(answer.from, IpAddr::V6(ROUTER_LINK_LOCAL));
    assert_eq!(answer.to, IpAddr::V6(link_local()));
    assert_eq!(answer.destination, GUEST_MAC);
    Some(questions::decode(&answer.payload))
}

#[test]
fn a_discover_is_offered_the_guests_address_and_all_of_its_network() {
    let question = dhcp_options(v4::MessageType::Discover, []);
    let (answer, offer) = dhcp_answer(&question).expect("an offer");
    assert_eq!(answer.destination, GUEST_MAC);
    assert_eq!(answer.from, IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)));
    assert_eq!(answer.to, IpAddr::V4(Ipv4Addr::new(10, 77, 0, 9)));
    assert_eq!(offer.xid(), question.xid());
    assert_eq!(offer.yiaddr(), Ipv4Addr::new(10, 77, 0, 9));
    let options = offer.opts();
    let expected = [
        v4::DhcpOption::MessageType(v4::MessageType::Offer),
        v4::DhcpOption::ServerIdentifier(Ipv4Addr::new(10, 77, 0, 1)),
        v4::DhcpOption::AddressLeaseTime(3600),
        v4::DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
        v4::DhcpOption::BroadcastAddr(Ipv4Addr::new(10, 77, 0, 255)),
        v4::DhcpOption::InterfaceMtu(1400),
        v4::DhcpOption::Hostname("web".into()),
        v4::DhcpOption::Router(vec![Ipv4Addr::new(10, 77, 0, 1)]),
        v4::DhcpOption::DomainNameServer(vec![Ipv4Addr::new(9, 9, 9, 9)]),
        v4::DhcpOption::DomainName("corp.example".into()),
        v4::DhcpOption::ClasslessStaticRoute(vec![
            (
                "10.0.0.0/8".parse().expect("valid"),
                Ipv4Addr::new(10, 77, 0, 254),
            ),
            (
                "0.0.0.0/0".parse().expect("valid"),
                Ipv4Addr::new(10, 77, 0, 1),
            ),
        ]),
    ];
    for option in expected {
        let code = v4::OptionCode::from(&option);
        assert_eq!(options.get(code), Some(&option));
    }
    let Some(v4::DhcpOption::DomainSearch(domains)) = options.get(v4::OptionCode::DomainSearch)
    else {
        panic!("no search domains");
    };
    let domains: Vec<_> = domains.iter().map(ToString::to_string).collect();
    assert_eq!(domains, ["corp.example.", "example."]);
}

#[test]
fn a_request_is_acknowledged_or_refused_by_what_it_wants() {
    use v4::DhcpOption::{RequestedIpAddress, ServerIdentifier};
    let (own, other) = (Ipv4Addr::new(10, 77, 0, 9), Ipv4Addr::new(10, 77, 0, 10));
    let (router, stranger) = (Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2));
    let request = |options: &[v4::DhcpOption], ciaddr: Ipv4Addr| {
        let mut message = dhcp_options(v4::MessageType::Request, options.iter().cloned());
        message.set_ciaddr(ciaddr);
        let (answer, message) = dhcp_answer(&message)?;
        Some((message.opts().msg_type()?, answer.to, message.yiaddr()))
    };
    let nobody = Ipv4Addr::UNSPECIFIED;
    let ack = Some((v4::MessageType::Ack, IpAddr::V4(own), own));
    let nak = Some((
        v4::MessageType::Nak,
        IpAddr::V4(Ipv4Addr::BROADCAST),
        nobody,
    ));
    // It chose an offer.
    assert_eq!(
        request(&[ServerIdentifier(router), RequestedIpAddress(own)], nobody),
        ack
    );
    assert_eq!(
        request(
            &[ServerIdentifier(router), RequestedIpAddress(other)],
            nobody
        ),
        nak
    );
    assert_eq!(
        request(
            &[ServerIdentifier(stranger), RequestedIpAddress(own)],
            nobody
        ),
        None
    );
    // It boots again, or renews.
    assert_eq!(request(&[RequestedIpAddress(own)], nobody), ack);
    assert_eq!(request(&[RequestedIpAddress(other)], nobody), nak);
    assert_eq!(request(&[], own), ack);
    assert_eq!(request(&[], other), nak);
}

#[test]
fn other_messages_of_dhcp() {
    let rapid = dhcp_options(v4::MessageType::Discover, [v4::DhcpOption::RapidCommit]);
    let (_, ack) = dhcp_answer(&rapid).expect("an ack");
    assert!(ack.opts().has_msg_type(v4::MessageType::Ack));
    assert!(ack.opts().contains(v4::OptionCode::RapidCommit));

    let (_, ack) = dhcp_answer(&dhcp_options(v4::MessageType::Inform, [])).expect("an ack");
    assert_eq!(ack.yiaddr(), Ipv4Addr::UNSPECIFIED);
    assert!(!ack.opts().contains(v4::OptionCode::AddressLeaseTime));
    assert!(ack.opts().contains(v4::OptionCode::InterfaceMtu));

    let mut broadcast = dhcp_options(v4::MessageType::Discover, []);
    broadcast.set_flags(v4::Flags::default().set_broadcast());
    let (answer, _) = dhcp_answer(&broadcast).expect("an offer");
    assert_eq!(answer.to, IpAddr::V4(Ipv4Addr::BROADCAST));
    assert_eq!(answer.destination, [0xff; 6]);

    let client = v4::DhcpOption::ClientIdentifier(vec![1, 2, 3]);
    let named = dhcp_options(v4::MessageType::Discover, [client.clone()]);
    let (_, offer) = dhcp_answer(&named).expect("an offer");
    assert_eq!(
        offer.opts().get(v4::OptionCode::ClientIdentifier),
        Some(&client)
    );
}

#[test]
fn what_has_no_answer_of_dhcp() {
    for kind in [
        v4::MessageType::Release,
        v4::MessageType::Decline,
        v4::MessageType::Offer,
        v4::MessageType::Ack,
    ] {
        assert!(dhcp_answer(&dhcp_options(kind, [])).is_none(), "{kind:?}");
    }
    let discover = || dhcp_options(v4::MessageType::Discover, []);
    let mut wrong = discover();
    wrong.set_chaddr(&[2, 0, 0, 0, 0, 1]);
    assert!(dhcp_answer(&wrong).is_none(), "in another's name");
    let mut wrong = discover();
    wrong.set_giaddr(Ipv4Addr::new(10, 77, 0, 5));
    assert!(dhcp_answer(&wrong).is_none(), "by a relay");
    let mut wrong = discover();
    wrong.set_opcode(v4::Opcode::BootReply);
    assert!(dhcp_answer(&wrong).is_none(), "a reply");
    let mut wrong = configuration();
    wrong.ipv4.as_mut().expect("it has IPv4").dhcp = false;
    assert_eq!(answer(&wrong, &dhcp(&discover())), None, "off");
    wrong.ipv4 = None;
    assert_eq!(answer(&wrong, &dhcp(&discover())), None, "without IPv4");
}

#[test]
fn an_answer_fits_what_the_client_takes() {
    let mut long = configuration();
    // Different ones, which no compression makes short.
    let domains = ["a", "b", "c", "d"];
    long.search_domains = domains.map(|letter| letter.repeat(63)).to_vec();
    for size in [0, 576, 1500] {
        let option = v4::DhcpOption::MaxMessageSize(size);
        let question = dhcp_options(v4::MessageType::Discover, [option]);
        let frame = answer(&long, &dhcp(&question)).expect("an offer");
        assert!(frame.len() - 14 <= usize::from(size.max(576)), "{size}");
        let offer: v4::Message = questions::decode(&read(&frame).payload);
        let has_domains = offer.opts().contains(v4::OptionCode::DomainSearch);
        assert_eq!(has_domains, size == 1500);
        assert!(offer.opts().contains(v4::OptionCode::Router));
    }
}

fn address(id: u32, addresses: &[&str]) -> v6::DhcpOption {
    let addresses = addresses.iter().map(|address| {
        v6::DhcpOption::IAAddr(v6::IAAddr {
            addr: address.parse().expect("valid"),
            preferred_life: 0,
            valid_life: 0,
            opts: v6::DhcpOptions::new(),
        })
    });
    v6::DhcpOption::IANA(v6::IANA {
        id,
        t1: 0,
        t2: 0,
        opts: addresses.collect(),
    })
}

/// Addresses with their lifetimes, and the status, of the association with this number.
fn associated(message: &v6::Message, id: u32) -> (Vec<(Ipv6Addr, u32)>, Option<v6::Status>) {
    let association = message.opts().iter().find_map(|option| match option {
        v6::DhcpOption::IANA(association) if association.id == id => Some(association),
        _ => None,
    });
    let options = &association.expect("it was answered").opts;
    let addresses = options.iter().filter_map(|option| match option {
        v6::DhcpOption::IAAddr(address) => Some((address.addr, address.valid_life)),
        _ => None,
    });
    let status = options.iter().find_map(|option| match option {
        v6::DhcpOption::StatusCode(status) => Some(status.status),
        _ => None,
    });
    (addresses.collect(), status)
}

#[test]
fn dhcpv6_gives_the_guests_address_once() {
    let own: Ipv6Addr = "fd77::9".parse().expect("valid");
    let solicit = dhcpv6_with(v6::MessageType::Solicit, [address(1, &[]), address(2, &[])]);
    let advertise = dhcpv6_answer(&solicit).expect("an advertisement");
    assert_eq!(advertise.msg_type(), v6::MessageType::Advertise);
    assert_eq!(advertise.xid(), solicit.xid());
    assert_eq!(associated(&advertise, 1), (vec![(own, 3600)], None));
    assert_eq!(
        associated(&advertise, 2),
        (vec![], Some(v6::Status::NoAddrsAvail))
    );
    let servers = v6::DhcpOption::DomainNameServers(vec!["fd77::53".parse().expect("valid")]);
    let told = advertise.opts().get(v6::OptionCode::DomainNameServers);
    assert_eq!(told, Some(&servers));
    assert!(
        advertise
            .opts()
            .get(v6::OptionCode::DomainSearchList)
            .is_some()
    );

    let rapid = dhcpv6_with(
        v6::MessageType::Solicit,
        [address(1, &[]), v6::DhcpOption::RapidCommit],
    );
    let reply = dhcpv6_answer(&rapid).expect("a reply");
    assert_eq!(reply.msg_type(), v6::MessageType::Reply);

    for kind in [v6::MessageType::Request, v6::MessageType::Renew] {
        let options = [address(7, &["fd77::9", "fd77::8"]), server_id()];
        let reply = dhcpv6_answer(&dhcpv6_with(kind, options)).expect("a reply");
        assert_eq!(reply.msg_type(), v6::MessageType::Reply);
        let other = "fd77::8".parse().expect("valid");
        let (mut addresses, _) = associated(&reply, 7);
        addresses.sort();
        assert_eq!(addresses, [(other, 0), (own, 3600)]);
    }
    let rebind = dhcpv6_with(v6::MessageType::Rebind, [address(7, &["fd77::9"])]);
    let reply = dhcpv6_answer(&rebind).expect("a reply");
    assert_eq!(associated(&reply, 7), (vec![(own, 3600)], None));
}

#[test]
fn other_messages_of_dhcpv6() {
    let status = |message: &v6::Message| {
        message.opts().iter().find_map(|option| match option {
            v6::DhcpOption::StatusCode(status) => Some(status.status),
            _ => None,
        })
    };
    let confirm = |addresses: &[&str]| {
        let message = dhcpv6_with(v6::MessageType::Confirm, [address(1, addresses)]);
        dhcpv6_answer(&message).map(|reply| status(&reply))
    };
    assert_eq!(confirm(&["fd77::9"]), Some(Some(v6::Status::Success)));
    assert_eq!(confirm(&["fd78::9"]), Some(Some(v6::Status::NotOnLink)));
    assert_eq!(confirm(&[]), None);
    for kind in [v6::MessageType::Release, v6::MessageType::Decline] {
        let message = dhcpv6_with(kind, [address(1, &["fd77::9"]), server_id()]);
        let reply = dhcpv6_answer(&message).expect("a reply");
        assert_eq!(status(&reply), Some(v6::Status::Success));
    }
    let reply = dhcpv6_answer(&dhcpv6_with(v6::MessageType::InformationRequest, []));
    let reply = reply.expect("a reply");
    assert!(
        reply
            .opts()
            .get(v6::OptionCode::DomainNameServers)
            .is_some()
    );
    assert!(reply.opts().get(v6::OptionCode::IANA).is_none());
}

#[test]
fn what_has_no_answer_of_dhcpv6() {
    let other_server = v6::DhcpOption::ServerId(vec![0, 3, 0, 1, 9, 9, 9, 9, 9, 9]);
    for (kind, options) in [
        (v6::MessageType::Solicit, vec![server_id()]),
        (v6::MessageType::Request, vec![]),
        (v6::MessageType::Request, vec![other_server.clone()]),
        (v6::MessageType::Renew, vec![other_server]),
        (v6::MessageType::Rebind, vec![server_id()]),
        (v6::MessageType::Advertise, vec![server_id()]),
        (v6::MessageType::RelayForw, vec![]),
    ] {
        let message = dhcpv6_with(kind, options);
        assert!(dhcpv6_answer(&message).is_none(), "{kind:?}");
    }
    let mut nameless = v6::Message::new(v6::MessageType::Solicit);
    nameless.opts_mut().insert(address(1, &[]));
    assert!(dhcpv6_answer(&nameless).is_none());
    let mut off = configuration();
    off.ipv6.as_mut().expect("it has IPv6").dhcp = false;
    let solicit = dhcpv6_with(v6::MessageType::Solicit, [address(1, &[])]);
    assert_eq!(answer(&off, &dhcpv6(&solicit)), None);
}

/// The options of a router advertisement: kind and data.
fn options(message: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut rest = &message[16..];
    let mut options = Vec::new();
    while let [kind, eighths, ..] = *rest {
        let (option, more) = rest.split_at(usize::from(eighths) * 8);
        options.push((kind, option[2..].to_vec()));
        rest = more;
    }
    options
}

#[test]
fn a_router_solicitation_is_answered() {
    let frame = answer(&configuration(), &router_solicitation()).expect("an advertisement");
    let solicited = read(&frame);
    assert_eq!(solicited.from, IpAddr::V6(ROUTER_LINK_LOCAL));
    assert_eq!(solicited.to, IpAddr::V6(link_local()));
    assert_eq!(solicited.payload[0], 134);
    // Hop limit; addresses by DHCPv6, and everything else; the router's lifetime.
    assert_eq!(solicited.payload[4..8], [64, 0xc0, 0xff, 0xff]);
    let told = options(&solicited.payload);
    let kinds: Vec<u8> = told.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [1, 5, 3, 24, 25, 31]);
    assert_eq!(told[0].1, [2, 0, 0, 0, 0, 0x11]);
    assert_eq!(told[1].1[2..], 1400_u32.to_be_bytes());
    // A /64 that is on the link; nobody makes an address of it.
    assert_eq!(told[2].1[..2], [64, 0x80]);
    assert_eq!(told[3].1[0], 48);
    let server: Ipv6Addr = "fd77::53".parse().expect("valid");
    assert_eq!(told[4].1[6..], server.octets());
    assert_eq!(&told[5].1[6..20], b"\x04corp\x07example\0");

    let unsolicited = advertisement(&configuration()).expect("an advertisement");
    assert_eq!(unsolicited[..6], [0x33, 0x33, 0, 0, 0, 1]);
    assert_eq!(read(&unsolicited).payload[4..], solicited.payload[4..]);

    let mut slaac = configuration();
    slaac.default_route = false;
    let ipv6 = slaac.ipv6.as_mut().expect("it has IPv6");
    (ipv6.slaac, ipv6.dhcp) = (true, false);
    let told = read(&advertisement(&slaac).expect("an advertisement")).payload;
    assert_eq!(told[4..8], [64, 0, 0, 0]);
    assert_eq!(options(&told)[2].1[..2], [64, 0xc0]);

    slaac.ipv6.as_mut().expect("it has IPv6").advertised = false;
    assert_eq!(advertisement(&slaac), None);
    assert_eq!(answer(&slaac, &router_solicitation()), None);
}

/// Kinds of options, and the lifetimes in them.
fn lifetimes(message: &[u8]) -> Vec<(u8, Vec<u32>)> {
    let number = |data: &[u8], at: usize| {
        let bytes = data[at..at + 4].try_into().expect("four bytes");
        u32::from_be_bytes(bytes)
    };
    let told = options(message).into_iter().map(|(kind, data)| {
        let lifetimes = match kind {
            3 => vec![number(&data, 2), number(&data, 6)],
            24 | 25 | 31 => vec![number(&data, 2)],
            _ => Vec::new(),
        };
        (kind, lifetimes)
    });
    told.collect()
}

#[test]
fn what_no_longer_holds_is_taken_back() {
    let before = configuration();
    assert_eq!(withdrawal(&before, &before), None);
    let mut silent = before.clone();
    silent.ipv6.as_mut().expect("it has IPv6").advertised = false;
    assert_eq!(withdrawal(&silent, &before), None, "nothing was told");
    let last = withdrawal(&before, &silent).expect("an advertisement");
    assert_eq!(last[..6], [0x33, 0x33, 0, 0, 0, 1]);
    let last = read(&last);
    assert_eq!(last.from, IpAddr::V6(ROUTER_LINK_LOCAL));
    assert_eq!(last.payload[0], 134);
    assert_eq!(last.payload[4..8], [64, 0, 0, 0], "it is no router");
    let dns_and_routes = [(24, vec![0]), (25, vec![0]), (31, vec![0])];
    let expected = [&[(1, vec![])][..], &dns_and_routes].concat();
    assert_eq!(lifetimes(&last.payload), expected);
    // Without the subnet the prefix is no more either.
    let mut without = before.clone();
    without.ipv6 = None;
    let last = read(&withdrawal(&before, &without).expect("an advertisement"));
    let expected = [&[(1, vec![]), (3, vec![0, 0])][..], &dns_and_routes].concat();
    assert_eq!(lifetimes(&last.payload), expected);
    // Another subnet: it is still a router, and the old prefix is none of its.
    let mut other = before.clone();
    other.ipv6.as_mut().expect("it has IPv6").address = "fd78::9/64".parse().expect("valid");
    let last = read(&withdrawal(&before, &other).expect("an advertisement"));
    assert_eq!(last.payload[4..8], [64, 0xc0, 0xff, 0xff]);
    assert_eq!(lifetimes(&last.payload), [(1, vec![]), (3, vec![0, 0])]);
    let prefix: Ipv6Addr = "fd77::".parse().expect("valid");
    assert_eq!(options(&last.payload)[1].1[14..], prefix.octets());
    // One of what was told goes.
    let mut fewer = before.clone();
    fewer.search_domains.clear();
    let last = read(&withdrawal(&before, &fewer).expect("an advertisement"));
    assert_eq!(lifetimes(&last.payload), [(1, vec![]), (31, vec![0])]);
}
