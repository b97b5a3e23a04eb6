//! What guests ask about their configuration goes to the agent and nowhere else, a few a second; what the
//! agent answers reaches the guest, and what others send as an answer does not.

mod network;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use keelson_ebpf::{
    AnswerSender, Answers, Datapath, DropReason, HookChoice, InterfaceCounters, InterfacePolicy,
    MacAddress, Question, QuestionReader,
};
use network::frames::{self, BROADCAST, Ends};
use network::{Guest, HOST_IP, HOST_MAC, Network};

with_both_hooks!(
    questions_reach_the_agent_alone,
    questions_are_in_the_guests_own_name,
    without_an_agent_that_answers_they_are_judged_as_ever,
    a_flood_of_questions_is_limited,
    answers_reach_the_guest,
    guests_are_no_servers,
    a_reader_of_a_new_agent_gets_what_was_not_read
);

const IPV6: u16 = 0x86dd;
const SERVERS: MacAddress = MacAddress([0x33, 0x33, 0, 1, 0, 2]);
const ALL: Answers = Answers {
    dhcp: true,
    solicitations: true,
};

fn policy(guest: &Guest, answers: Answers) -> InterfacePolicy {
    InterfacePolicy {
        ipv6: Some(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 9)),
        network: 9,
        mtu: 9000,
        answers,
        ..guest.policy()
    }
}

struct Asked {
    network: Network,
    datapath: Datapath,
    reader: QuestionReader,
    guest: Guest,
    neighbour: Guest,
    ifindex: u32,
}

/// A guest whose questions are answered, a neighbour, and a bridge with both.
fn asked(hook: HookChoice, answers: Answers) -> Asked {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let reader = datapath.take_question_reader().expect("the first one");
    let (guest, neighbour) = (network.guest(1), network.guest(2));
    let attached = datapath.attach(&policy(&guest, answers)).expect("attached");
    datapath.attach(&neighbour.policy()).expect("attached");
    network::ip("link add bridge type bridge");
    network::ip("link set bridge up");
    for guest in [&guest, &neighbour] {
        network::ip(&format!("link set {} master bridge up", guest.name));
    }
    Asked {
        network,
        datapath,
        reader,
        guest,
        neighbour,
        ifindex: attached.ifindex,
    }
}

impl Asked {
    fn counters(&self) -> InterfaceCounters {
        self.datapath.counters(&self.guest.name).expect("attached")
    }

    fn next(&mut self) -> Question {
        let mut poll = [rustix::event::PollFd::from_borrowed_fd(
            self.reader.as_fd(),
            rustix::event::PollFlags::IN,
        )];
        let patience = rustix::event::Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        let ready = rustix::event::poll(&mut poll, Some(&patience)).expect("it can be waited for");
        assert_eq!(ready, 1, "no question came");
        self.reader.next_question().expect("poll said so")
    }
}

fn discover_from(guest: &Guest, source: Ipv4Addr) -> Vec<u8> {
    let ends = Ends {
        source_mac: guest.mac,
        destination_mac: BROADCAST,
        source,
        destination: Ipv4Addr::BROADCAST,
    };
    frames::udp(ends, 68, 67, &[1; 300])
}

fn discover(guest: &Guest) -> Vec<u8> {
    discover_from(guest, Ipv4Addr::UNSPECIFIED)
}

fn ipv6(guest: &Guest, source: Ipv6Addr, hop_limit: u8, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("short");
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([protocol, hop_limit]);
    packet.extend(source.octets());
    packet.extend(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2).octets());
    packet.extend(payload);
    frames::ethernet(SERVERS, guest.mac, IPV6, &packet)
}

fn solicit(guest: &Guest) -> Vec<u8> {
    let datagram = frames::udp_datagram(546, 547, &[1; 60]);
    ipv6(guest, guest.mac.link_local(), 1, frames::UDP, &datagram)
}

fn router_solicitation(guest: &Guest) -> Vec<u8> {
    let rest = [&[0; 4][..], &[1, 1], &guest.mac.0].concat();
    let message = frames::icmp_message(133, 0, &rest);
    ipv6(guest, guest.mac.link_local(), 255, 58, &message)
}

fn questions_reach_the_agent_alone(hook: HookChoice) {
    let mut asked = asked(hook, ALL);
    let own = asked.guest.ip;
    let frames = [
        discover(&asked.guest),
        discover_from(&asked.guest, own),
        solicit(&asked.guest),
        router_solicitation(&asked.guest),
    ];
    for frame in frames {
        asked.guest.send(&frame);
        let question = asked.next();
        assert_eq!(question.ifindex, asked.ifindex);
        assert_eq!(question.frame, frame);
    }
    assert!(
        asked.neighbour.receive_now().is_none(),
        "the bridge got one"
    );
    let counters = asked.counters();
    assert_eq!(counters.from_guest.passed.packets, 4);
    assert!(counters.from_guest.dropped.is_empty(), "{counters:?}");
}

fn questions_are_in_the_guests_own_name(hook: HookChoice) {
    let mut asked = asked(hook, ALL);
    let (guest, neighbour) = (&asked.guest, &asked.neighbour);
    let mut in_anothers_name = discover(guest);
    in_anothers_name[6..12].copy_from_slice(&neighbour.mac.0);
    let other_source = discover_from(guest, neighbour.ip);
    let stranger = ipv6(
        guest,
        neighbour.mac.link_local(),
        1,
        frames::UDP,
        &frames::udp_datagram(546, 547, &[1; 60]),
    );
    let nobody = Ends {
        source_mac: guest.mac,
        destination_mac: BROADCAST,
        source: Ipv4Addr::UNSPECIFIED,
        destination: Ipv4Addr::BROADCAST,
    };
    let no_client = frames::udp(nobody, 1068, 67, &[1; 300]);
    let mut fragment = discover(guest);
    fragment[20] = 0x20;
    let too_long = frames::udp(nobody, 68, 67, &[1; 2100]);
    for frame in [
        in_anothers_name,
        other_source,
        stranger,
        no_client,
        fragment,
        too_long,
    ] {
        guest.send(&frame);
    }
    let counters = asked.counters().from_guest;
    let dropped = |reason| counters.dropped_for(reason).packets;
    assert_eq!(dropped(DropReason::SpoofedMac), 1);
    assert_eq!(dropped(DropReason::SpoofedIpv4), 3);
    assert_eq!(dropped(DropReason::SpoofedIpv6), 1);
    assert_eq!(dropped(DropReason::Oversized), 1);
    assert!(asked.reader.next_question().is_none());
}

fn without_an_agent_that_answers_they_are_judged_as_ever(hook: HookChoice) {
    let mut asked = asked(hook, Answers::default());
    let guest = &asked.guest;
    for frame in [discover(guest), solicit(guest), router_solicitation(guest)] {
        guest.send(&frame);
    }
    let counters = asked.counters().from_guest;
    assert_eq!(counters.dropped_for(DropReason::SpoofedIpv4).packets, 1);
    assert_eq!(counters.passed.packets, 2);
    assert!(asked.reader.next_question().is_none());
}

fn a_flood_of_questions_is_limited(hook: HookChoice) {
    let mut asked = asked(hook, ALL);
    let frame = discover(&asked.guest);
    for _ in 0..400 {
        asked.guest.send(&frame);
    }
    let mut questions = 0;
    while asked.reader.next_question().is_some() {
        questions += 1;
    }
    let dropped = asked.counters().from_guest;
    let dropped = dropped.dropped_for(DropReason::RateLimited).packets;
    assert_eq!(questions + dropped, 400);
    assert!(questions >= 20, "a burst passes: {questions}");
    assert!(dropped > 0, "a flood does not");
    // Its other packets are not concerned, nor are its neighbour's questions.
    let ends = Ends {
        source_mac: asked.guest.mac,
        destination_mac: BROADCAST,
        source: asked.guest.ip,
        destination: Ipv4Addr::BROADCAST,
    };
    let before = asked.counters().from_guest.passed.packets;
    asked.guest.send(&frames::udp(ends, 68, 7000, b"other"));
    assert_eq!(asked.counters().from_guest.passed.packets, before + 1);
    let neighbour = policy(&asked.neighbour, ALL);
    let neighbour = InterfacePolicy {
        ipv6: None,
        ..neighbour
    };
    asked.datapath.update(&neighbour).expect("updated");
    let frame = discover(&asked.neighbour);
    asked.neighbour.send(&frame);
    assert_eq!(asked.next().frame, frame);
}

/// What a DHCP server sends to a client.
fn offer(asked: &Asked, from: MacAddress, to: MacAddress) -> Vec<u8> {
    let ends = Ends {
        source_mac: from,
        destination_mac: to,
        source: HOST_IP,
        destination: asked.guest.ip,
    };
    frames::udp(ends, 67, 68, b"an offer")
}

fn answers_reach_the_guest(hook: HookChoice) {
    let asked = asked(hook, ALL);
    let sender = AnswerSender::open().expect("a socket");
    let frame = offer(&asked, HOST_MAC, asked.guest.mac);
    sender.send(asked.ifindex, &frame).expect("sent");
    assert_eq!(asked.guest.receive(), frame);
    let to_all = offer(&asked, HOST_MAC, BROADCAST);
    sender.send(asked.ifindex, &to_all).expect("sent");
    assert_eq!(asked.guest.receive(), to_all);
    // Not what is for another.
    let other = offer(&asked, HOST_MAC, asked.neighbour.mac);
    let error = sender.send(asked.ifindex, &other).expect_err("dropped");
    assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS));
    let counters = asked.counters().to_guest;
    assert_eq!(counters.passed.packets, 2);
    let wrong = counters.dropped_for(DropReason::WrongDestination).packets;
    assert_eq!(wrong, 1);
    assert!(sender.send(9999, &frame).is_err(), "no such interface");
}

fn guests_are_no_servers(hook: HookChoice) {
    let asked = asked(hook, ALL);
    let server = Ends {
        source_mac: asked.guest.mac,
        destination_mac: asked.neighbour.mac,
        source: asked.guest.ip,
        destination: asked.neighbour.ip,
    };
    asked.guest.send(&frames::udp(server, 67, 68, b"an offer"));
    let advertisement = frames::icmp_message(134, 0, &[0; 12]);
    let advertisement = ipv6(
        &asked.guest,
        asked.guest.mac.link_local(),
        255,
        58,
        &advertisement,
    );
    asked.guest.send(&advertisement);
    let reply = frames::udp_datagram(547, 546, &[7; 60]);
    let link_local = asked.guest.mac.link_local();
    asked
        .guest
        .send(&ipv6(&asked.guest, link_local, 1, frames::UDP, &reply));
    let counters = asked.counters().from_guest;
    assert_eq!(counters.dropped_for(DropReason::DhcpServer).packets, 2);
    let routers = counters.dropped_for(DropReason::RouterAdvertisement);
    assert_eq!(routers.packets, 1);
    assert!(asked.neighbour.receive_now().is_none());
    // Nor is what anyone else sends an answer of the agent's, though it looks like one.
    let frame = offer(&asked, HOST_MAC, asked.neighbour.mac);
    let socket = network::raw_socket(&asked.neighbour.name);
    let dropped = || -> u64 {
        let counters = asked.datapath.counters(&asked.neighbour.name);
        let counters = counters.expect("attached").to_guest;
        counters.dropped.values().map(|tally| tally.packets).sum()
    };
    // The host's kernel sends things of its own.
    let before = dropped();
    let error = rustix::io::write(&socket, &frame).expect_err("dropped");
    assert_eq!(error, rustix::io::Errno::NOBUFS);
    assert!(dropped() > before);
    assert!(asked.neighbour.receive_now().is_none());
}

fn a_reader_of_a_new_agent_gets_what_was_not_read(hook: HookChoice) {
    let asked = asked(hook, ALL);
    let frame = discover(&asked.guest);
    asked.guest.send(&frame);
    let Asked {
        network,
        datapath,
        reader,
        guest,
        ..
    } = asked;
    drop((reader, datapath));
    guest.send(&frame);
    let mut datapath = network.open();
    let mut reader = datapath.take_question_reader().expect("the first one");
    for _ in 0..2 {
        assert_eq!(
            reader.next_question().map(|question| question.frame),
            Some(frame.clone())
        );
    }
    assert!(datapath.take_question_reader().is_none());
}
