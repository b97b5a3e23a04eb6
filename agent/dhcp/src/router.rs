//! Router advertisements (RFC 4861, 4.2), with DNS (RFC 8106) and routes (RFC 4191).

use std::net::Ipv6Addr;

use etherparse::icmpv6::{
    PrefixInformation, RouterAdvertisementHeader, RouterAdvertisementPayload,
};
use hickory_proto::rr::Name;
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};
use ipnet::Ipv6Net;

use crate::{InterfaceConfiguration, frame};

/// How long what is told lasts, in seconds: as long as RFC 8319 lets a router say. Guests don't depend on
/// the agent, which tells them anew every few minutes while it runs.
const LIFETIME: u16 = u16::MAX;
/// Of prefixes, in seconds: the defaults of RFC 4861, 6.2.1.
const PREFIX_VALID: u32 = 30 * 24 * 3600;
const PREFIX_PREFERRED: u32 = 7 * 24 * 3600;
const HOP_LIMIT: u8 = 64;

const SOURCE_LINK_LAYER: u8 = 1;
const MTU: u8 = 5;
const ROUTE_INFORMATION: u8 = 24;
const DNS_SERVERS: u8 = 25;
const SEARCH_DOMAINS: u8 = 31;

/// The advertisement for whoever solicited one, or for everyone.
pub fn advertisement(
    configuration: &InterfaceConfiguration,
    to: Option<Ipv6Addr>,
) -> Option<Vec<u8>> {
    let ipv6 = configuration.ipv6.as_ref().filter(|ipv6| ipv6.advertised)?;
    let header = RouterAdvertisementHeader {
        cur_hop_limit: HOP_LIMIT,
        managed_address_config: ipv6.dhcp && !ipv6.slaac,
        other_config: ipv6.dhcp,
        router_lifetime: if configuration.default_route {
            LIFETIME
        } else {
            0
        },
    };
    let payload = RouterAdvertisementPayload {
        reachable_time: 0,
        retrans_timer: 0,
    };
    let prefix = PrefixInformation {
        prefix_length: ipv6.address.prefix_len(),
        on_link: true,
        autonomous_address_configuration: ipv6.slaac,
        valid_lifetime: PREFIX_VALID,
        preferred_lifetime: PREFIX_PREFERRED,
        prefix: ipv6.address.network().octets(),
    };
    let mut rest = payload.to_bytes().to_vec();
    option(&mut rest, SOURCE_LINK_LAYER, &configuration.router_mac);
    let mtu = [&[0; 2][..], &u32::from(configuration.mtu).to_be_bytes()].concat();
    option(&mut rest, MTU, &mtu);
    rest.extend(prefix.to_bytes());
    for route in &ipv6.routes {
        option(&mut rest, ROUTE_INFORMATION, &route_information(route));
    }
    let servers = configuration.dns_servers_v6();
    if !servers.is_empty() {
        let servers = servers.iter().flat_map(Ipv6Addr::octets);
        let option_data: Vec<u8> = lifetime().into_iter().chain(servers).collect();
        option(&mut rest, DNS_SERVERS, &option_data);
    }
    if !configuration.search_domains.is_empty() {
        let mut option_data = lifetime();
        option_data.extend(search_domains(&configuration.search_domains)?);
        option(&mut rest, SEARCH_DOMAINS, &option_data);
    }
    frame::advertisement(configuration, ipv6.router, to, header, &rest)
}

/// Reserved bytes and the lifetime, as two options begin.
fn lifetime() -> Vec<u8> {
    [&[0; 2][..], &u32::from(LIFETIME).to_be_bytes()].concat()
}

fn route_information(route: &Ipv6Net) -> Vec<u8> {
    let octets = route.network().octets();
    let significant = match route.prefix_len() {
        0 => 0,
        1..=64 => 8,
        _ => 16,
    };
    // Of medium preference.
    let mut data = vec![route.prefix_len(), 0];
    data.extend(u32::from(LIFETIME).to_be_bytes());
    data.extend(&octets[..significant]);
    data
}

/// Names one after another, without compression (RFC 8106, 5.2).
fn search_domains(domains: &[String]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for domain in domains {
        let mut name = Name::from_ascii(domain).ok()?;
        name.set_fqdn(true);
        let mut encoded = Vec::new();
        name.emit(&mut BinEncoder::new(&mut encoded)).ok()?;
        bytes.extend(encoded);
    }
    Some(bytes)
}

/// Appends an option, filled up to a multiple of eight bytes. Configurations are small, so that the length
/// always fits.
fn option(to: &mut Vec<u8>, kind: u8, data: &[u8]) {
    let eighths = (data.len() + 2).div_ceil(8);
    let Ok(length) = u8::try_from(eighths) else {
        return;
    };
    let end = to.len() + eighths * 8;
    to.extend([kind, length]);
    to.extend(data);
    to.resize(end, 0);
}
