//! Metrics of the host, its guests, their networks and their disks in Prometheus' text form, over HTTP.

mod disks;
mod host;
mod services;
mod uplinks;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use keelson_api::{Kind, Object, SecurityGroup, VirtualMachine};
use keelson_ebpf::{
    Direction, DirectionCounters, FlowUse, InterfaceCounters, Tally, TunnelCounters,
};
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, TextEncoder};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use self::host::HostFamilies;
use crate::guest::rule_counters;
use crate::host::HostNetwork;
use crate::objects::World;
use crate::{Agent, AgentError, error::Result};

/// Pages that are made or waited for at a time; more are refused.
const PAGES: usize = 8;

/// Listens on `address` and answers `/metrics` for as long as it runs.
///
/// # Errors
/// [`AgentError::Io`] where the address can't be bound.
pub async fn serve_metrics(
    agent: Agent,
    address: SocketAddr,
) -> Result<impl Future<Output = io::Result<()>>> {
    let what = format!("listen on {address} for metrics");
    let listener = TcpListener::bind(address)
        .await
        .map_err(AgentError::io(what))?;
    let waiting = Arc::new(Semaphore::new(PAGES));
    // One at a time, so that whoever asks often does not slow down the network's other users.
    let turn = Arc::new(Semaphore::new(1));
    let page = move || {
        let (agent, waiting, turn) = (agent.clone(), waiting.clone(), turn.clone());
        async move {
            let Ok(_place) = waiting.try_acquire() else {
                return StatusCode::SERVICE_UNAVAILABLE.into_response();
            };
            let _turn = turn.acquire().await;
            answer(page(&agent).await)
        }
    };
    let router = Router::new().route("/metrics", get(page));
    Ok(axum::serve(listener, router).into_future())
}

fn answer(page: Result<String>) -> Response {
    match page {
        Ok(page) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response(),
        Err(error) => {
            tracing::warn!(%error, "metrics can't be read");
            (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response()
        }
    }
}

/// Every metric, as a page.
async fn page(agent: &Agent) -> Result<String> {
    let world = agent.objects.world().await?;
    let statistics = agent.network.statistics().await?;
    let failed = |error: prometheus::Error| AgentError::io("make metrics")(io::Error::other(error));
    let families = Families::new().map_err(failed)?;
    for stored in world.of_kind(Kind::VirtualMachine) {
        let Object::VirtualMachine(guest) = &stored.object else {
            continue;
        };
        for interface in &guest.spec.interfaces {
            let device = HostNetwork::device_of(&guest.metadata.name, &interface.name);
            if let Some((counters, flows)) = statistics.get(&device) {
                let labels = [guest.metadata.name.as_str(), interface.name.as_str()];
                let groups = groups_of(&world, guest, &interface.name);
                families.set(labels, &device, counters, flows, &groups);
            }
        }
    }
    let hook = agent.network.hook().await?;
    let host = HostFamilies::new().map_err(failed)?;
    host.set(agent, &world).await;
    if let Some(counters) = agent.network.tunnel_counters().await? {
        families.set_tunnel(&counters);
    }
    let mut more = host.collect();
    more.extend(uplinks::collect(agent).await?);
    more.extend(services::collect(agent).await?);
    let page = families.encode(&hook, more).map_err(failed)?;
    Ok(page + &disks::page(agent).await?)
}

fn groups_of(world: &World, guest: &VirtualMachine, interface: &str) -> Vec<SecurityGroup> {
    let interfaces = guest.spec.interfaces.iter();
    interfaces
        .filter(|candidate| candidate.name == interface)
        .flat_map(|interface| &interface.security_groups)
        .filter_map(|name| match world.get::<SecurityGroup>(name)? {
            Object::SecurityGroup(group) => Some(group),
            _ => None,
        })
        .collect()
}

/// A pair of counters, of packets and of bytes.
struct Tallies {
    packets: IntCounterVec,
    bytes: IntCounterVec,
}

impl Tallies {
    fn new(name: &str, what: &str, labels: &[&str]) -> prometheus::Result<Self> {
        let counter = |unit: &str| {
            let name = format!("keelson_network_{name}{unit}_total");
            IntCounterVec::new(Opts::new(name, format!("{what}, in {unit}.")), labels)
        };
        Ok(Self {
            packets: counter("packets")?,
            bytes: counter("bytes")?,
        })
    }

    fn set(&self, labels: &[&str], tally: &Tally) {
        self.packets.with_label_values(labels).inc_by(tally.packets);
        self.bytes.with_label_values(labels).inc_by(tally.bytes);
    }
}

/// The metrics of one page.
struct Families {
    passed: Tallies,
    dropped: Tallies,
    allowed: Tallies,
    tunnelled: Tallies,
    tunnel_dropped: Tallies,
    flows: IntGaugeVec,
    max_flows: IntGaugeVec,
    interfaces: IntGaugeVec,
    build: IntGaugeVec,
}

impl Families {
    fn new() -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            IntGaugeVec::new(Opts::new(format!("keelson_{name}"), help), labels)
        };
        let flow = ["guest", "interface", "state"];
        Ok(Self {
            passed: Tallies::new(
                "",
                "What an interface passed",
                &["guest", "interface", "direction"],
            )?,
            dropped: Tallies::new(
                "dropped_",
                "What an interface dropped",
                &["guest", "interface", "direction", "reason"],
            )?,
            allowed: Tallies::new(
                "rule_allowed_",
                "What a rule let open a flow, or what belongs to none",
                &["guest", "interface", "direction", "rule"],
            )?,
            tunnelled: Tallies::new(
                "tunnel_",
                "What guests sent to other hosts, and what came from there",
                &["direction"],
            )?,
            tunnel_dropped: Tallies::new(
                "tunnel_dropped_",
                "What came from other hosts and was dropped before any guest's interface",
                &["reason"],
            )?,
            flows: gauge("network_flows", "Flows that an interface has.", &flow)?,
            max_flows: gauge(
                "network_flows_limit",
                "Flows that an interface can have before the least recently used make room.",
                &flow,
            )?,
            interfaces: gauge(
                "network_interface_info",
                "An interface, and its device on the host.",
                &["guest", "interface", "device"],
            )?,
            build: gauge(
                "build_info",
                "The agent's version, and how its eBPF programs are attached.",
                &["version", "network_hook"],
            )?,
        })
    }

    fn set(
        &self,
        [guest, interface]: [&str; 2],
        device: &str,
        counters: &InterfaceCounters,
        flows: &FlowUse,
        groups: &[SecurityGroup],
    ) {
        self.interfaces
            .with_label_values(&[guest, interface, device])
            .set(1);
        let directions = [
            (Direction::FromGuest, "from-guest", &counters.from_guest),
            (Direction::ToGuest, "to-guest", &counters.to_guest),
        ];
        for (direction, name, counters) in directions {
            self.set_direction([guest, interface, name], direction, counters, groups);
        }
        for (state, count, limit) in [
            ("established", flows.established, flows.max_established),
            ("opening", flows.opening, flows.max_opening),
        ] {
            let labels = [guest, interface, state];
            self.flows.with_label_values(&labels).set(count.into());
            self.max_flows.with_label_values(&labels).set(limit.into());
        }
    }

    fn set_tunnel(&self, counters: &TunnelCounters) {
        let received = &counters.received;
        self.tunnelled.set(&["sent"], &counters.sent);
        self.tunnelled.set(&["received"], &received.passed);
        for (reason, tally) in &received.dropped {
            self.tunnel_dropped.set(&[reason.as_str()], tally);
        }
    }

    fn set_direction(
        &self,
        labels: [&str; 3],
        direction: Direction,
        counters: &DirectionCounters,
        groups: &[SecurityGroup],
    ) {
        let [guest, interface, name] = labels;
        self.passed.set(&labels, &counters.passed);
        for (reason, tally) in &counters.dropped {
            let labels = [guest, interface, name, reason.as_str()];
            self.dropped.set(&labels, tally);
        }
        for rule in rule_counters(groups, direction) {
            if let Some(tally) = counters.allowed.get(&rule.counter) {
                let labels = [guest, interface, name, &rule.rule(direction)];
                self.allowed.set(&labels, tally);
            }
        }
    }

    fn encode(&self, hook: &str, more: Vec<MetricFamily>) -> prometheus::Result<String> {
        let version = env!("CARGO_PKG_VERSION");
        self.build.with_label_values(&[version, hook]).set(1);
        let mut families = ProcessCollector::for_self().collect();
        for tallies in [
            &self.passed,
            &self.dropped,
            &self.allowed,
            &self.tunnelled,
            &self.tunnel_dropped,
        ] {
            families.extend(tallies.packets.collect());
            families.extend(tallies.bytes.collect());
        }
        for gauges in [&self.flows, &self.max_flows, &self.interfaces, &self.build] {
            families.extend(gauges.collect());
        }
        families.extend(more);
        // What nothing is known of is left out: a family without metrics is an error to the encoder.
        families.retain(|family| !family.get_metric().is_empty());
        TextEncoder::new().encode_to_string(&families)
    }
}
