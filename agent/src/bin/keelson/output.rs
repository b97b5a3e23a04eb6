//! What commands print: tables for people, JSON and YAML for machines.

use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{Table, presets};
use jiff::{Timestamp, Unit};
use keelson_api::{Condition, ConditionStatus, Health, Object, PlacementState};
use serde::Serialize;
use serde_json::{Value, json};

use crate::failure::Failure;

/// How objects are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table for people.
    #[default]
    Table,
    /// JSON; several objects as one `List`.
    Json,
    /// YAML.
    Yaml,
    /// Only `kind/name`.
    Name,
}

/// Prints objects; a single one by itself, where `single` says that one was asked for.
pub fn print_objects(format: Format, objects: &[Object], single: bool) -> Result<(), Failure> {
    let value = match objects {
        [object] if single => serde_json::to_value(object)?,
        _ => json!({ "apiVersion": "v1", "kind": "List", "items": objects }),
    };
    match format {
        Format::Table => print_table(objects),
        Format::Json | Format::Yaml => print_value(format, &value),
        Format::Name => {
            for object in objects {
                line(&format!("{}/{}", object.kind(), object.metadata().name))?;
            }
            Ok(())
        }
    }
}

/// Prints a value as JSON or YAML.
pub fn print_value<T: Serialize>(format: Format, value: &T) -> Result<(), Failure> {
    let text = if format == Format::Yaml {
        // Through JSON, so that both have the same fields in the same order.
        let value: Value = serde_json::to_value(value)?;
        serde_saphyr::to_string(&value).map_err(anyhow::Error::from)?
    } else {
        serde_json::to_string_pretty(value)?
    };
    line(text.trim_end())
}

/// Prints one line. A reader that went away, as `head` does, is the end and no failure.
pub fn line(text: &str) -> Result<(), Failure> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}

/// A table without frames, as such tools have.
pub fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.map(str::to_owned));
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table
}

/// Prints a table without trailing blanks.
pub fn print_lines(table: &Table) -> Result<(), Failure> {
    table.lines().try_for_each(|row| line(row.trim_end()))
}

/// A time as an age, such as `5m`.
pub fn age(since: Option<Timestamp>) -> String {
    let Some(since) = since else {
        return "-".into();
    };
    let seconds = Timestamp::now().duration_since(since).as_secs().max(0);
    let (value, unit) = match seconds {
        0..120 => (seconds, "s"),
        120..7200 => (seconds / 60, "m"),
        7200..172_800 => (seconds / 3600, "h"),
        _ => (seconds / 86_400, "d"),
    };
    format!("{value}{unit}")
}

/// A time to the second, for lists.
pub fn time(at: Timestamp) -> String {
    at.round(Unit::Second).unwrap_or(at).to_string()
}

/// What the `Ready` condition says in one word.
pub fn readiness(conditions: &[Condition]) -> String {
    let ready = conditions
        .iter()
        .find(|condition| condition.kind == "Ready");
    ready.map_or("Unknown".into(), |condition| match condition.status {
        ConditionStatus::True => "True".into(),
        ConditionStatus::Unknown => "Unknown".into(),
        ConditionStatus::False => format!("False ({})", condition.reason),
    })
}

fn print_table(objects: &[Object]) -> Result<(), Failure> {
    let mut table = match objects.first() {
        None => {
            eprintln!("nothing found");
            return Ok(());
        }
        Some(Object::Host(_)) => table([
            "NAME", "READY", "GUESTS", "CPUS", "MEMORY", "VERSION", "AGE",
        ]),
        Some(Object::Disk(_)) => table(["NAME", "PATH", "MODE", "READY", "AGE"]),
        Some(Object::Network(_)) => table(["NAME", "SUBNET", "GATEWAY", "DEVICE", "READY", "AGE"]),
        Some(Object::PortForward(_)) => table([
            "NAME",
            "NETWORK",
            "PORTS",
            "ADDRESSES",
            "TARGET",
            "READY",
            "AGE",
        ]),
        Some(Object::SecurityGroup(_)) => table(["NAME", "INGRESS", "EGRESS", "AGE"]),
        Some(Object::Service(_)) => table([
            "NAME",
            "NETWORK",
            "ADDRESSES",
            "PORTS",
            "HEALTHY",
            "READY",
            "AGE",
        ]),
        Some(Object::VirtualMachine(_)) => table([
            "NAME",
            "HOST",
            "PHASE",
            "READY",
            "CPUS",
            "MEMORY",
            "ADDRESSES",
            "UPTIME",
            "AGE",
        ]),
    };
    for object in objects {
        table.add_row(row(object));
    }
    print_lines(&table)
}

/// What a network has of IPv4 and of IPv6.
fn both(ipv4: Option<impl ToString>, ipv6: Option<impl ToString>) -> String {
    let ipv4 = ipv4.map(|ipv4| ipv4.to_string());
    let ipv6 = ipv6.map(|ipv6| ipv6.to_string());
    let both: Vec<_> = ipv4.into_iter().chain(ipv6).collect();
    both.join(",")
}

fn row(object: &Object) -> Vec<String> {
    let name = object.metadata().name.clone();
    let created = age(object.metadata().creation_timestamp);
    match object {
        Object::Host(host) => {
            let capacity = host.status.capacity.as_ref();
            vec![
                name,
                readiness(&host.status.conditions),
                match (host.spec.drain, host.spec.unschedulable) {
                    (true, _) => "drained".into(),
                    (false, true) => "cordoned".into(),
                    (false, false) => "placed".into(),
                },
                capacity.map_or("-".into(), |capacity| capacity.cpus.to_string()),
                capacity.map_or("-".into(), |capacity| capacity.memory.to_string()),
                host.status.version.clone(),
                created,
            ]
        }
        Object::Disk(disk) => vec![
            name,
            disk.spec.path.display().to_string(),
            if disk.spec.read_only { "ro" } else { "rw" }.into(),
            readiness(&disk.status.conditions),
            created,
        ],
        Object::Network(network) => vec![
            name,
            both(network.spec.subnet, network.spec.subnet_v6),
            both(network.spec.gateway(), network.spec.gateway_v6()),
            network.status.device.clone().unwrap_or_else(|| "-".into()),
            readiness(&network.status.conditions),
            created,
        ],
        Object::PortForward(forward) => {
            let spec = &forward.spec;
            let addresses = forward.status.addresses.iter();
            let addresses: Vec<_> = addresses.map(|at| at.ip().to_string()).collect();
            vec![
                name,
                spec.network.clone(),
                format!("{}/{}", spec.ports, spec.protocol),
                if addresses.is_empty() {
                    "-".into()
                } else {
                    addresses.join(",")
                },
                format!("{}:{}", spec.guest, spec.targets()),
                readiness(&forward.status.conditions),
                created,
            ]
        }
        Object::SecurityGroup(group) => {
            let egress = group.spec.egress.as_ref();
            vec![
                name,
                group.spec.ingress.len().to_string(),
                egress.map_or("all".into(), |rules| rules.len().to_string()),
                created,
            ]
        }
        Object::Service(service) => {
            let spec = &service.spec;
            let ipv4 = spec.address.map(|address| address.to_string());
            let ipv6 = spec.address_v6.map(|address| address.to_string());
            let backends = &service.status.backends;
            let healthy = backends.iter().filter(|b| b.health == Health::Healthy);
            vec![
                name,
                spec.network.clone(),
                ipv4.into_iter().chain(ipv6).collect::<Vec<_>>().join(","),
                spec.ports
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(","),
                format!("{}/{}", healthy.count(), backends.len()),
                readiness(&service.status.conditions),
                created,
            ]
        }
        Object::VirtualMachine(guest) => {
            let addresses = guest.spec.interfaces.iter().flat_map(|interface| {
                let ipv4 = interface.address.map(|address| address.to_string());
                let ipv6 = interface.address_v6.map(|address| address.to_string());
                ipv4.into_iter().chain(ipv6)
            });
            let addresses: Vec<_> = addresses.collect();
            vec![
                name,
                host_of(guest),
                guest.status.phase.to_string(),
                readiness(&guest.status.conditions),
                guest.spec.cpus.to_string(),
                guest.spec.memory.to_string(),
                if addresses.is_empty() {
                    "-".into()
                } else {
                    addresses.join(",")
                },
                age(guest.status.started_at),
                created,
            ]
        }
    }
}

/// The host that a guest is placed on, or that runs it.
fn host_of(guest: &keelson_api::VirtualMachine) -> String {
    let placed = guest.status.placement.as_ref();
    let placed = placed.filter(|placement| placement.state != PlacementState::Released);
    let host = placed.map(|placement| placement.host.clone());
    host.or_else(|| guest.status.host.clone())
        .unwrap_or_else(|| "-".into())
}
