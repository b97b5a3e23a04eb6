//! DHCP (RFC 2131), as a server that knows each client's address before it asks.

use std::net::Ipv4Addr;

use dhcproto::Encodable;
use dhcproto::v4::{
    DhcpOption, DhcpOptions, Flags, HType, Message, MessageType, Opcode, OptionCode, borrowed,
};
use hickory_proto::rr::Name;
use ipnet::Ipv4Net;

use crate::{InterfaceConfiguration, Ipv4Configuration, frame};

/// IP packets that every client takes (RFC 2131, 2), in bytes.
const LEAST_SIZE: usize = 576;
/// Bytes of a client identifier: as many as one option has.
const CLIENT_LIMIT: usize = 255;
/// Bytes of the headers of IP and UDP.
const HEADERS: usize = 28;
/// What a client can do without, if not all fits: the least useful first.
const OPTIONAL: [OptionCode; 3] = [
    OptionCode::DomainSearch,
    OptionCode::Hostname,
    OptionCode::ClasslessStaticRoute,
];

/// What a client gets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Offer,
    Ack,
    /// An ack to a client that does without an offer (RFC 4039).
    RapidAck,
    /// The configuration, but no address (RFC 2131, 3.4).
    Informed,
    Nak,
}

/// What matters of a client's message.
struct Question {
    kind: MessageType,
    transaction: u32,
    flags: Flags,
    /// The address that it uses.
    address: Ipv4Addr,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    client: Option<Vec<u8>>,
    size_limit: usize,
    is_rapid: bool,
}

/// The answer to a client's message, as a frame.
pub fn answer(configuration: &InterfaceConfiguration, message: &[u8]) -> Option<Vec<u8>> {
    let ipv4 = configuration.ipv4.as_ref().filter(|ipv4| ipv4.dhcp)?;
    let question = read(configuration, message)?;
    let kind = decide(ipv4, &question)?;
    let mut reply = reply(configuration, ipv4, &question, kind);
    fit(&mut reply, question.size_limit)?;
    let message = reply.to_vec().ok()?;
    // RFC 2131, 4.1. Addresses other than the guest's own would not reach it.
    let own = ipv4.address.addr();
    let to = if kind == Answer::Nak || question.flags.broadcast() {
        None
    } else {
        Some(own)
    };
    frame::dhcp(configuration, ipv4.router, to, &message)
}

/// Reads what a guest's client sent. Options are read as far as they matter: decoding each that there is
/// gives a guest more code to try than it has use for.
fn read(configuration: &InterfaceConfiguration, message: &[u8]) -> Option<Question> {
    let message = borrowed::Message::new(message).ok()?;
    // The length first: the address is not there to be read where it is longer than its field. Guests
    // have no relays.
    if message.opcode() != Opcode::BootRequest
        || message.htype() != HType::Eth
        || message.hlen() != 6
        || message.chaddr() != configuration.mac
        || !message.giaddr().is_unspecified()
    {
        return None;
    }
    let mut kind = None;
    let mut question = Question {
        kind: MessageType::Unknown(0),
        transaction: message.xid(),
        flags: message.flags(),
        address: message.ciaddr(),
        requested: None,
        server: None,
        client: None,
        size_limit: LEAST_SIZE,
        is_rapid: false,
    };
    for option in message.opts() {
        match (option.code(), option.data()) {
            (OptionCode::MessageType, [number]) => kind = Some(MessageType::from(*number)),
            (OptionCode::RequestedIpAddress, data) => question.requested = Some(address(data)?),
            (OptionCode::ServerIdentifier, data) => question.server = Some(address(data)?),
            (OptionCode::ClientIdentifier, data) if data.len() <= CLIENT_LIMIT => {
                question.client = Some(data.to_vec());
            }
            (OptionCode::MaxMessageSize, [high, low]) => {
                let size = u16::from_be_bytes([*high, *low]);
                question.size_limit = usize::from(size).max(LEAST_SIZE);
            }
            (OptionCode::RapidCommit, _) => question.is_rapid = true,
            _ => {}
        }
    }
    Some(Question {
        kind: kind?,
        ..question
    })
}

fn address(data: &[u8]) -> Option<Ipv4Addr> {
    Some(<[u8; 4]>::try_from(data).ok()?.into())
}

fn decide(ipv4: &Ipv4Configuration, question: &Question) -> Option<Answer> {
    match question.kind {
        MessageType::Discover if question.is_rapid => Some(Answer::RapidAck),
        MessageType::Discover => Some(Answer::Offer),
        // It took another server's offer.
        MessageType::Request if question.server.is_some_and(|server| server != ipv4.router) => None,
        MessageType::Request => {
            let wanted = question.requested.unwrap_or(question.address);
            Some(if wanted == ipv4.address.addr() {
                Answer::Ack
            } else {
                Answer::Nak
            })
        }
        MessageType::Inform => Some(Answer::Informed),
        // What a client gives back or finds taken stays its own: there is no other for it.
        _ => None,
    }
}

fn reply(
    configuration: &InterfaceConfiguration,
    ipv4: &Ipv4Configuration,
    question: &Question,
    kind: Answer,
) -> Message {
    let nobody = Ipv4Addr::UNSPECIFIED;
    let (ciaddr, yiaddr) = match kind {
        Answer::Offer | Answer::RapidAck => (nobody, ipv4.address.addr()),
        Answer::Ack => (question.address, ipv4.address.addr()),
        Answer::Informed => (question.address, nobody),
        Answer::Nak => (nobody, nobody),
    };
    let mut reply = Message::new_with_id(
        question.transaction,
        ciaddr,
        yiaddr,
        nobody,
        nobody,
        &configuration.mac,
    );
    reply
        .set_opcode(Opcode::BootReply)
        .set_flags(question.flags);
    let options = reply.opts_mut();
    options.insert(DhcpOption::MessageType(match kind {
        Answer::Offer => MessageType::Offer,
        Answer::Ack | Answer::RapidAck | Answer::Informed => MessageType::Ack,
        Answer::Nak => MessageType::Nak,
    }));
    options.insert(DhcpOption::ServerIdentifier(ipv4.router));
    // RFC 6842.
    if let Some(client) = &question.client {
        options.insert(DhcpOption::ClientIdentifier(client.clone()));
    }
    if kind == Answer::RapidAck {
        options.insert(DhcpOption::RapidCommit);
    }
    if matches!(kind, Answer::Offer | Answer::Ack | Answer::RapidAck) {
        options.insert(DhcpOption::AddressLeaseTime(configuration.lease_seconds()));
    }
    if kind != Answer::Nak {
        configure(options, configuration, ipv4);
    }
    reply
}

fn configure(
    options: &mut DhcpOptions,
    configuration: &InterfaceConfiguration,
    ipv4: &Ipv4Configuration,
) {
    options.insert(DhcpOption::SubnetMask(ipv4.address.netmask()));
    options.insert(DhcpOption::BroadcastAddr(ipv4.address.broadcast()));
    options.insert(DhcpOption::InterfaceMtu(configuration.mtu));
    options.insert(DhcpOption::Hostname(configuration.host_name.clone()));
    if configuration.default_route {
        options.insert(DhcpOption::Router(vec![ipv4.router]));
    }
    let servers = configuration.dns_servers_v4();
    if !servers.is_empty() {
        options.insert(DhcpOption::DomainNameServer(servers));
    }
    if let Some(domain) = configuration.search_domains.first() {
        options.insert(DhcpOption::DomainName(domain.clone()));
    }
    let domains = names(&configuration.search_domains);
    if !domains.is_empty() {
        options.insert(DhcpOption::DomainSearch(domains));
    }
    if !ipv4.routes.is_empty() {
        // Who heeds this one ignores `Router` (RFC 3442), so that the default route is here as well.
        let default = configuration
            .default_route
            .then_some((Ipv4Net::default(), ipv4.router));
        let routes = ipv4.routes.iter().copied().chain(default);
        options.insert(DhcpOption::ClasslessStaticRoute(routes.collect()));
    }
}

/// Domains as names; those that are none, which validation refuses, are left out.
pub fn names(domains: &[String]) -> Vec<Name> {
    let names = domains.iter().map(Name::from_ascii);
    names
        .filter_map(Result::ok)
        .map(|mut name| {
            name.set_fqdn(true);
            name
        })
        .collect()
}

/// Leaves out what is too much for the client, which takes IP packets of so many bytes.
fn fit(reply: &mut Message, limit: usize) -> Option<()> {
    for code in OPTIONAL {
        if reply.to_vec().ok()?.len() + HEADERS <= limit {
            break;
        }
        reply.opts_mut().remove(code);
    }
    Some(())
}
