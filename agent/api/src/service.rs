//! A virtual address that is balanced over guests.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::metadata::{Condition, ObjectMeta, validate_name};
use crate::units::TimeLimit;

/// The most ports that one service may have.
const PORT_LIMIT: usize = 32;
/// The most guests that one service may name, and have; what the eBPF programs have room for.
const BACKEND_LIMIT: usize = 128;
const INTERVALS: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_mins(10);
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_mins(1);
const THRESHOLDS: RangeInclusive<u32> = 1..=100;
/// The longest that flows of a guest that drains may go on.
const DRAIN_LIMIT: Duration = Duration::from_hours(24);
/// How long they do where nothing is said.
const DRAIN_TIMEOUT: TimeLimit = TimeLimit::from_secs(30);

/// A virtual address in a network, whose ports are balanced over guests of that network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Service {
    /// Always [`crate::API_VERSION`].
    pub api_version: String,
    /// Always `Service`.
    pub kind: String,
    /// Its name.
    pub metadata: ObjectMeta,
    /// What it should be.
    pub spec: ServiceSpec,
    /// What the agent observed.
    #[serde(default)]
    pub status: ServiceStatus,
}

/// What a service should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceSpec {
    /// The `Network` object that the address and the guests are in.
    pub network: String,
    /// Its address there, where the network has IPv4; the lowest free one is allocated where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// Its IPv6 address, where the network has IPv6; the lowest free one is allocated where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_v6: Option<Ipv6Addr>,
    /// Its ports; all else that is sent to the addresses is dropped.
    pub ports: Vec<ServicePort>,
    /// Guests by their labels: all that have each of these, and an interface in the network.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub selector: BTreeMap<String, String>,
    /// Guests by their names, besides those that are selected by labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<String>,
    /// Guests that get no new flows, whether or not others do; for maintenance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub draining: Vec<String>,
    /// How long flows go on of a guest that drains, is about to stop, or is not selected any more: up to a day, and
    /// not at all with zero.
    #[serde(default = "drain_timeout", skip_serializing_if = "is_drain_timeout")]
    pub drain_timeout: TimeLimit,
    /// How it is found out which guests serve. Without it, those that run do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
}

fn drain_timeout() -> TimeLimit {
    DRAIN_TIMEOUT
}

fn is_drain_timeout(limit: &TimeLimit) -> bool {
    *limit == DRAIN_TIMEOUT
}

/// A port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServicePort {
    /// The protocol.
    #[serde(default)]
    pub protocol: ServiceProtocol,
    /// The port of the service.
    pub port: u16,
    /// The port of the guests; the service's where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<u16>,
}

/// Protocols that can be balanced.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum ServiceProtocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// How it is found out which guests serve: the host connects by TCP, from the network's gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HealthCheck {
    /// The guests' port; that of the service's first TCP port where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// How often it is tried: 100 ms to 10 minutes.
    pub interval: TimeLimit,
    /// How long it may take: 10 ms to a minute.
    pub timeout: TimeLimit,
    /// After how many successes in a row a guest serves.
    pub healthy_threshold: u32,
    /// After how many failures in a row a guest serves no longer.
    pub unhealthy_threshold: u32,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            port: None,
            interval: TimeLimit::from_secs(5),
            timeout: TimeLimit::from_secs(1),
            healthy_threshold: 1,
            unhealthy_threshold: 3,
        }
    }
}

impl ServicePort {
    /// The port of the guests.
    pub fn target(&self) -> u16 {
        self.target_port.unwrap_or(self.port)
    }
}

impl fmt::Display for ServiceProtocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for ServicePort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.port, self.protocol)
    }
}

impl ServiceSpec {
    /// Whether the service is for a guest: by its name, or by its labels.
    pub fn selects(&self, guest: &str, labels: &BTreeMap<String, String>) -> bool {
        let has = |(key, value): (&String, &String)| labels.get(key) == Some(value);
        self.guests.iter().any(|name| name == guest)
            || !self.selector.is_empty() && self.selector.iter().all(has)
    }

    /// The port that health checks connect to, if there are any.
    pub fn checked_port(&self) -> Option<u16> {
        let check = self.health_check?;
        let mut ports = self.ports.iter();
        let first = ports.find(|port| port.protocol == ServiceProtocol::Tcp);
        check.port.or(first.map(ServicePort::target))
    }

    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        if let Err(message) = validate_name(&self.network) {
            errors.push(FieldError::new("spec.network", message));
        }
        self.validate_ports(errors);
        if self.selector.is_empty() && self.guests.is_empty() {
            let message = "is missing, and so is spec.guests; say by labels or names who serves";
            errors.push(FieldError::new("spec.selector", message));
        }
        validate_guests("spec.guests", &self.guests, errors);
        validate_guests("spec.draining", &self.draining, errors);
        if self.drain_timeout.duration() > DRAIN_LIMIT {
            let message = format!("is {}; give 0s to 24h", self.drain_timeout);
            errors.push(FieldError::new("spec.drainTimeout", message));
        }
        if let Some(check) = &self.health_check {
            check.validate(self, errors);
        }
    }

    fn validate_ports(&self, errors: &mut Vec<FieldError>) {
        if self.ports.is_empty() {
            errors.push(FieldError::new("spec.ports", "is empty; give at least one"));
        }
        if self.ports.len() > PORT_LIMIT {
            let message = format!("has {} ports; at most {PORT_LIMIT} fit", self.ports.len());
            errors.push(FieldError::new("spec.ports", message));
        }
        let mut seen = BTreeSet::new();
        for (index, port) in self.ports.iter().enumerate() {
            let field = |name: &str| format!("spec.ports[{index}].{name}");
            for (name, number) in [("port", Some(port.port)), ("targetPort", port.target_port)] {
                if number == Some(0) {
                    errors.push(FieldError::new(field(name), "is 0; give 1 to 65535"));
                }
            }
            if !seen.insert((port.protocol, port.port)) {
                let message = format!("{port} stands in the list twice");
                errors.push(FieldError::new(field("port"), message));
            }
        }
    }
}

fn validate_guests(field: &str, guests: &[String], errors: &mut Vec<FieldError>) {
    if guests.len() > BACKEND_LIMIT {
        let message = format!("names {} guests; at most {BACKEND_LIMIT} fit", guests.len());
        errors.push(FieldError::new(field, message));
    }
    let mut seen = BTreeSet::new();
    for (index, guest) in guests.iter().enumerate() {
        let field = format!("{field}[{index}]");
        if let Err(message) = validate_name(guest) {
            errors.push(FieldError::new(field, message));
        } else if !seen.insert(guest) {
            errors.push(FieldError::new(field, format!("names {guest} again")));
        }
    }
}

impl HealthCheck {
    fn validate(&self, spec: &ServiceSpec, errors: &mut Vec<FieldError>) {
        let field = |name: &str| format!("spec.healthCheck.{name}");
        if self.port == Some(0) {
            errors.push(FieldError::new(field("port"), "is 0; give 1 to 65535"));
        }
        if spec.checked_port().is_none() {
            let message = "is missing, and the service has no TCP port that could be checked";
            errors.push(FieldError::new(field("port"), message));
        }
        for (name, time, range, expected) in [
            ("interval", self.interval, INTERVALS, "100ms to 10m"),
            ("timeout", self.timeout, TIMEOUTS, "10ms to 1m"),
        ] {
            if !range.contains(&time.duration()) {
                let message = format!("is {time}; give {expected}");
                errors.push(FieldError::new(field(name), message));
            }
        }
        for (name, threshold) in [
            ("healthyThreshold", self.healthy_threshold),
            ("unhealthyThreshold", self.unhealthy_threshold),
        ] {
            if !THRESHOLDS.contains(&threshold) {
                let message = format!("is {threshold}; give 1 to 100");
                errors.push(FieldError::new(field(name), message));
            }
        }
    }
}

/// What the agent observed of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// `Ready`: the address is served, by one guest at least.
    pub conditions: Vec<Condition>,
    /// The guests that it is for.
    pub backends: Vec<BackendStatus>,
}

/// A guest that a service is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendStatus {
    /// The guest.
    pub guest: String,
    /// Its interface in the network.
    pub interface: String,
    /// The interface's address: that of IPv4, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The host that says so, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Whether it serves.
    pub health: Health,
    /// Why, for people.
    pub message: String,
    /// When `health` last changed.
    pub since: Timestamp,
}

/// Whether a guest serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Health {
    /// It gets its share of what is new.
    Healthy,
    /// It was not yet checked often enough, and gets nothing.
    Unknown,
    /// Checks failed; it gets nothing, and its flows get another guest.
    Unhealthy,
    /// It does not run; as if unhealthy.
    Stopped,
    /// It gets nothing new, and its flows go on for a while.
    Draining,
    /// It has drained: it gets nothing, and its flows were cut.
    Drained,
}

impl fmt::Display for Health {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Healthy => "Healthy",
            Self::Unknown => "Unknown",
            Self::Unhealthy => "Unhealthy",
            Self::Stopped => "Stopped",
            Self::Draining => "Draining",
            Self::Drained => "Drained",
        })
    }
}
