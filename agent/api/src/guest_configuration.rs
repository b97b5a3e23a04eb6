//! What guests are told of their network when they ask, by DHCP, DHCPv6 and router advertisements.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::metadata::validate_name;
use crate::units::TimeLimit;
use crate::{FieldError, NetworkSpec};

/// Resolvers that C libraries and systemd use at most, of both versions of IP.
const SERVER_LIMIT: usize = 6;
const DOMAIN_LIMIT: usize = 6;
/// Characters of a domain name (RFC 1035, 2.3.4, less the root).
const DOMAIN_LENGTH: usize = 253;
/// Characters of all search domains, so that answers fit every client.
const DOMAINS_LENGTH: usize = 256;
const ROUTE_LIMIT: usize = 16;
/// Shorter leases are renewed all the time; longer ones aren't counted in DHCP.
const LEASE_TIMES: std::ops::RangeInclusive<u64> = 120..=365 * 24 * 3600;

/// How guests of a network resolve names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Dns {
    /// Servers, at most 6.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<IpAddr>,
    /// Domains that names without one are looked for in, at most 6; the first is also the guests' own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search_domains: Vec<String>,
}

impl Dns {
    /// Whether nothing is told.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A network that guests reach by another way than the default one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Route {
    /// The network, such as `10.0.0.0/8`.
    pub destination: IpNet,
    /// The router to it, an IPv4 address in the subnet; the gateway where not given, and always with IPv6,
    /// whose router speaks for itself only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<IpAddr>,
}

/// Checks the fields of a network that guests are told.
pub(crate) fn validate(spec: &NetworkSpec, errors: &mut Vec<FieldError>) {
    validate_dns(&spec.dns, errors);
    if spec.routes.len() > ROUTE_LIMIT {
        errors.push(FieldError::new(
            "spec.routes",
            format!(
                "has {} routes; give at most {ROUTE_LIMIT}",
                spec.routes.len()
            ),
        ));
    }
    for (index, route) in spec.routes.iter().enumerate() {
        let field = format!("spec.routes[{index}]");
        validate_route(spec, route, &field, errors);
    }
    let lease = spec.lease_time.duration();
    if !LEASE_TIMES.contains(&lease.as_secs())
        || lease != TimeLimit::from_secs(lease.as_secs()).duration()
    {
        errors.push(FieldError::new(
            "spec.leaseTime",
            format!(
                "is {}; give whole seconds from 2m to 8760h",
                spec.lease_time
            ),
        ));
    }
    if spec.slaac {
        if spec
            .subnet_v6
            .is_none_or(|subnet| subnet.prefix_len() != 64)
        {
            errors.push(FieldError::new(
                "spec.slaac",
                "needs a spec.subnetV6 with a /64 prefix, of which guests make their addresses",
            ));
        }
        if !spec.router_advertisements {
            errors.push(FieldError::new(
                "spec.slaac",
                "needs spec.routerAdvertisements, which tell guests of it",
            ));
        }
    }
}

fn validate_dns(dns: &Dns, errors: &mut Vec<FieldError>) {
    if dns.servers.len() > SERVER_LIMIT {
        errors.push(FieldError::new(
            "spec.dns.servers",
            format!("has {}; give at most {SERVER_LIMIT}", dns.servers.len()),
        ));
    }
    for (index, server) in dns.servers.iter().enumerate() {
        let is_link_local = matches!(server, IpAddr::V6(server) if server.is_unicast_link_local());
        if server.is_unspecified() || server.is_multicast() || server.is_loopback() || is_link_local
        {
            errors.push(FieldError::new(
                format!("spec.dns.servers[{index}]"),
                format!("{server} is no server that every guest reaches"),
            ));
        }
    }
    let domains = &dns.search_domains;
    let length: usize = domains.iter().map(String::len).sum();
    if domains.len() > DOMAIN_LIMIT || length > DOMAINS_LENGTH {
        errors.push(FieldError::new(
            "spec.dns.searchDomains",
            format!(
                "has {} domains of {length} characters; give at most {DOMAIN_LIMIT} of {DOMAINS_LENGTH}",
                domains.len()
            ),
        ));
    }
    for (index, domain) in domains.iter().enumerate() {
        if domain.len() > DOMAIN_LENGTH
            || domain.split('.').any(|label| validate_name(label).is_err())
        {
            errors.push(FieldError::new(
                format!("spec.dns.searchDomains[{index}]"),
                format!(
                    "{domain:?} is no domain; write it in lower case and without a dot at its end, \
                     e.g. corp.example"
                ),
            ));
        }
    }
}

fn validate_route(spec: &NetworkSpec, route: &Route, field: &str, errors: &mut Vec<FieldError>) {
    let mut report = |part: &str, problem: String| {
        errors.push(FieldError::new(format!("{field}.{part}"), problem));
    };
    let destination = route.destination;
    if destination != destination.trunc() {
        let trunc = destination.trunc();
        report(
            "destination",
            format!("{destination} has host bits set; write {trunc}"),
        );
    }
    if destination.prefix_len() == 0 {
        let problem = "is the default route, which spec.defaultRoute and spec.gateway say";
        report("destination", problem.into());
    }
    match (destination, route.via) {
        (IpNet::V4(_), via) => {
            let Some(subnet) = spec.subnet else {
                report("destination", "the network has no spec.subnet".into());
                return;
            };
            match via {
                Some(IpAddr::V4(via)) if subnet.contains(&via) => {}
                None => {}
                Some(via) => report("via", format!("{via} is no address of {subnet}")),
            }
        }
        (IpNet::V6(_), via) => {
            if spec.subnet_v6.is_none() {
                report("destination", "the network has no spec.subnetV6".into());
            }
            if via.is_some() && via != spec.gateway_v6().map(IpAddr::from) {
                let problem =
                    "IPv6's routers tell of themselves only: leave it out for the gateway";
                report("via", problem.into());
            }
        }
    }
}
