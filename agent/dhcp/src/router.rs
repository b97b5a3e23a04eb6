//! Router advertisements (RFC 4861, 4.2), with DNS (RFC 8106) and routes (RFC 4191).

use std::net::Ipv6Addr;

use etherparse::icmpv6::{
    PrefixInformation, RouterAdvertisementHeader, RouterAdvertisementPayload,
};
use hickory_proto::rr::Name;
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};
use ipnet::Ipv6Net;

use crate::{InterfaceConfiguration, Ipv6Configuration, frame};

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
    let mut rest = payload(configuration);
    let mtu = [&[0; 2][..], &u32::from(configuration.mtu).to_be_bytes()].concat();
    option(&mut rest, MTU, &mtu);
    rest.extend(prefix(ipv6, PREFIX_VALID, PREFIX_PREFERRED).to_bytes());
    told(
        &mut rest,
        LIFETIME,
        &ipv6.routes,
        &configuration.dns_servers_v6(),
        &configuration.search_domains,
    )?;
    let header = header(configuration, Some(ipv6));
    frame::advertisement(configuration, ipv6.router, to, header, &rest)
}

/// The advertisement that takes back what no longer holds: that the router is one (RFC 4861, 6.2.5), that a prefix is
/// on the link and addresses in it are to be used (RFC 4862, 5.5.3), routes, and DNS. `None` if all of it still does.
pub fn withdrawal(
    before: &InterfaceConfiguration,
    now: &InterfaceConfiguration,
) -> Option<Vec<u8>> {
    let old = before.ipv6.as_ref().filter(|ipv6| ipv6.advertised)?;
    let new = now.ipv6.as_ref().filter(|ipv6| ipv6.advertised);
    let new_routes = new.map_or(&[][..], |new| &new.routes);
    let new_servers = new.map(|_| now.dns_servers_v6()).unwrap_or_default();
    let new_domains = new.map_or(&[][..], |_| &now.search_domains);
    let routes = gone(&old.routes, new_routes);
    let servers = gone(&before.dns_servers_v6(), &new_servers);
    let domains = gone(&before.search_domains, new_domains);
    // Without advertisements the subnet may still be there.
    let subnet = now.ipv6.as_ref().map(|ipv6| ipv6.address.trunc());
    let has_prefix = subnet == Some(old.address.trunc());
    let is_over = new.is_none() || !has_prefix;
    if !is_over && routes.is_empty() && servers.is_empty() && domains.is_empty() {
        return None;
    }
    let mut rest = payload(before);
    if !has_prefix {
        rest.extend(prefix(old, 0, 0).to_bytes());
    }
    told(&mut rest, 0, &routes, &servers, &domains)?;
    frame::advertisement(before, old.router, None, header(now, new), &rest)
}

fn gone<T: PartialEq + Clone>(before: &[T], now: &[T]) -> Vec<T> {
    let gone = before.iter().filter(|one| !now.contains(one));
    gone.cloned().collect()
}

/// `ipv6` is what is advertised, if anything is.
fn header(
    configuration: &InterfaceConfiguration,
    ipv6: Option<&Ipv6Configuration>,
) -> RouterAdvertisementHeader {
    RouterAdvertisementHeader {
        cur_hop_limit: HOP_LIMIT,
        managed_address_config: ipv6.is_some_and(|ipv6| ipv6.dhcp && !ipv6.slaac),
        other_config: ipv6.is_some_and(|ipv6| ipv6.dhcp),
        router_lifetime: match ipv6 {
            Some(_) if configuration.default_route => LIFETIME,
            _ => 0,
        },
    }
}

/// What follows the header, up to the first option that differs.
fn payload(configuration: &InterfaceConfiguration) -> Vec<u8> {
    let payload = RouterAdvertisementPayload {
        reachable_time: 0,
        retrans_timer: 0,
    };
    let mut rest = payload.to_bytes().to_vec();
    option(&mut rest, SOURCE_LINK_LAYER, &configuration.router_mac);
    rest
}

fn prefix(ipv6: &Ipv6Configuration, valid: u32, preferred: u32) -> PrefixInformation {
    PrefixInformation {
        prefix_length: ipv6.address.prefix_len(),
        on_link: true,
        autonomous_address_configuration: ipv6.slaac,
        valid_lifetime: valid,
        preferred_lifetime: preferred,
        prefix: ipv6.address.network().octets(),
    }
}

/// Appends the options of routes and DNS, which hold for so many seconds.
fn told(
    to: &mut Vec<u8>,
    seconds: u16,
    routes: &[Ipv6Net],
    servers: &[Ipv6Addr],
    domains: &[String],
) -> Option<()> {
    for route in routes {
        option(to, ROUTE_INFORMATION, &route_information(route, seconds));
    }
    // Reserved bytes and the lifetime, as both options begin.
    let lifetime = [&[0; 2][..], &u32::from(seconds).to_be_bytes()].concat();
    if !servers.is_empty() {
        let servers: Vec<u8> = servers.iter().flat_map(Ipv6Addr::octets).collect();
        option(to, DNS_SERVERS, &[&lifetime[..], &servers].concat());
    }
    if !domains.is_empty() {
        let domains = search_domains(domains)?;
        option(to, SEARCH_DOMAINS, &[lifetime, domains].concat());
    }
    Some(())
}

fn route_information(route: &Ipv6Net, seconds: u16) -> Vec<u8> {
    let octets = route.network().octets();
    let significant = match route.prefix_len() {
        0 => 0,
        1..=64 => 8,
        _ => 16,
    };
    // Of medium preference.
    let mut data = vec![route.prefix_len(), 0];
    data.extend(u32::from(seconds).to_be_bytes());
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
