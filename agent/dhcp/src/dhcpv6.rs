//! DHCPv6 (RFC 8415), as a server that knows each client's address before it asks.

use std::net::Ipv6Addr;

use dhcproto::Encodable;
use dhcproto::v6::{
    DhcpOption, DhcpOptions, IAAddr, IANA, IAPD, IATA, Message, MessageType, Status, StatusCode,
};

use crate::dhcpv4::names;
use crate::dhcpv6_question::Question;
use crate::{InterfaceConfiguration, Ipv6Configuration, frame};

/// The answer's bytes that an Ethernet packet of IPv6's least MTU has room for.
const SIZE_LIMIT: usize = 1280 - 48;
/// No other server need be waited for (RFC 8415, 18.2.1).
const PREFERENCE: u8 = 255;
/// A server's identifier by its Ethernet address (RFC 8415, 11.4).
const DUID_LINK_LAYER_ETHERNET: [u8; 4] = [0, 3, 0, 1];

/// The answer to a client's message, as a frame.
pub fn answer(
    configuration: &InterfaceConfiguration,
    client: Ipv6Addr,
    message: &[u8],
) -> Option<Vec<u8>> {
    let ipv6 = configuration.ipv6.as_ref().filter(|ipv6| ipv6.dhcp)?;
    let question = Question::read(message)?;
    let own_id = server_id(configuration);
    check_identifiers(&question, &own_id)?;
    let kind = match question.kind {
        MessageType::Solicit if !question.is_rapid => MessageType::Advertise,
        _ => MessageType::Reply,
    };
    let mut reply = Message::new_with_id(kind, question.transaction);
    let options = reply.opts_mut();
    if let Some(client) = question.client {
        options.insert(DhcpOption::ClientId(client.to_vec()));
    }
    options.insert(DhcpOption::ServerId(own_id));
    match question.kind {
        MessageType::Solicit | MessageType::Request | MessageType::Renew | MessageType::Rebind => {
            associate(options, configuration, ipv6, &question);
            if kind == MessageType::Advertise {
                options.insert(DhcpOption::Preference(PREFERENCE));
            }
            if question.kind == MessageType::Solicit && question.is_rapid {
                options.insert(DhcpOption::RapidCommit);
            }
        }
        MessageType::Confirm => {
            let associations = question.associations.iter();
            let mut claimed = associations.flat_map(|association| &association.addresses);
            // RFC 8415, 18.3.3: nothing to say about nothing.
            claimed.clone().next()?;
            let own = ipv6.address.addr();
            let (status, text) = if claimed.all(|address| *address == own) {
                (Status::Success, "the addresses are yours")
            } else {
                (Status::NotOnLink, "the addresses are not this guest's")
            };
            options.insert(status_code(status, text));
        }
        // What a client gives back or finds taken stays its own: there is no other for it.
        MessageType::Release | MessageType::Decline => {
            options.insert(status_code(Status::Success, "noted"));
        }
        MessageType::InformationRequest => {}
        _ => return None,
    }
    let servers = configuration.dns_servers_v6();
    if !servers.is_empty() {
        options.insert(DhcpOption::DomainNameServers(servers));
    }
    let domains = names(&configuration.search_domains);
    if !domains.is_empty() {
        options.insert(DhcpOption::DomainSearchList(domains));
    }
    let reply = reply.to_vec().ok()?;
    if reply.len() > SIZE_LIMIT {
        return None;
    }
    frame::dhcpv6(configuration, ipv6.router, client, &reply)
}

/// A client's identifier must or may be there, a server's must be this one, by the kind of message
/// (RFC 8415, 16).
fn check_identifiers(question: &Question<'_>, own: &[u8]) -> Option<()> {
    let server = question.server;
    let has_client = question.client.is_some();
    let fits = match question.kind {
        MessageType::Solicit | MessageType::Confirm | MessageType::Rebind => {
            has_client && server.is_none()
        }
        MessageType::Request | MessageType::Renew | MessageType::Release | MessageType::Decline => {
            has_client && server == Some(own)
        }
        MessageType::InformationRequest => server.is_none_or(|server| server == own),
        _ => false,
    };
    fits.then_some(())
}

fn server_id(configuration: &InterfaceConfiguration) -> Vec<u8> {
    [&DUID_LINK_LAYER_ETHERNET[..], &configuration.router_mac].concat()
}

/// One association gets the guest's address: the one that has it, or the first by its number. Others,
/// temporary ones and prefixes get nothing.
fn associate(
    options: &mut DhcpOptions,
    configuration: &InterfaceConfiguration,
    ipv6: &Ipv6Configuration,
    question: &Question<'_>,
) {
    let own = ipv6.address.addr();
    let lifetime = configuration.lease_seconds();
    let chosen = question.associations.iter().min_by_key(|association| {
        let has_own = association.addresses.contains(&own);
        (!has_own, association.id)
    });
    let chosen = chosen.map(|association| association.id);
    for association in &question.associations {
        let is_chosen = chosen == Some(association.id);
        let mut inner = DhcpOptions::new();
        if is_chosen {
            inner.insert(address(own, lifetime));
            // Others that the client believes to have, it has no more.
            let others = association.addresses.iter();
            for other in others.filter(|other| **other != own) {
                inner.insert(address(*other, 0));
            }
        } else {
            inner.insert(status_code(
                Status::NoAddrsAvail,
                "a guest's interface has one address",
            ));
        }
        let (t1, t2) = match lifetime {
            _ if !is_chosen => (0, 0),
            u32::MAX => (u32::MAX, u32::MAX),
            // The recommended parts (RFC 8415, 14.2).
            lifetime => (lifetime / 2, lifetime / 5 * 4),
        };
        options.insert(DhcpOption::IANA(IANA {
            id: association.id,
            t1,
            t2,
            opts: inner,
        }));
    }
    for id in &question.temporary {
        let status = status_code(Status::NoAddrsAvail, "there are no temporary addresses");
        options.insert(DhcpOption::IATA(IATA {
            id: *id,
            opts: [status].into_iter().collect(),
        }));
    }
    for id in &question.prefixes {
        let status = status_code(Status::NoPrefixAvail, "there are no prefixes for guests");
        options.insert(DhcpOption::IAPD(IAPD {
            id: *id,
            t1: 0,
            t2: 0,
            opts: [status].into_iter().collect(),
        }));
    }
}

fn address(addr: Ipv6Addr, lifetime: u32) -> DhcpOption {
    DhcpOption::IAAddr(IAAddr {
        addr,
        preferred_life: lifetime,
        valid_life: lifetime,
        opts: DhcpOptions::new(),
    })
}

fn status_code(status: Status, message: &str) -> DhcpOption {
    DhcpOption::StatusCode(StatusCode {
        status,
        msg: message.into(),
    })
}
