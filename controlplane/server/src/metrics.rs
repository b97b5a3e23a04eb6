//! Metrics in Prometheus' text form, under etcd's names where etcd has them, so that its dashboards
//! and alerts work.

use std::collections::HashMap;

use axum::body::Body;
use axum::http::Request;
use axum::middleware::Next;
use axum::response::Response;
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, exponential_buckets,
};
use tonic::Code;

use crate::grpc::ETCD_VERSION;
use crate::node::Node;

/// What is counted while it happens.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    started: IntCounterVec,
    handled: IntCounterVec,
    /// Seconds that syncs of the log take, with the writes before them.
    pub log_syncs: Histogram,
    /// Seconds that syncs of the storage engine take.
    pub engine_syncs: Histogram,
    /// Changes of the leader that this member saw.
    pub leader_changes: IntCounter,
    /// Proposals that were refused before they were replicated.
    pub proposals_failed: IntCounter,
    /// Proposals whose outcome is awaited.
    pub proposals_pending: IntGauge,
    /// What there is of damaged members.
    pub rebuilds: Rebuilds,
}

/// Members that are damaged, and are rebuilt. A process that finds itself damaged starts anew: what it
/// counted begins at 0 then, and the rebuild is counted by the new one.
#[derive(Debug, Clone)]
pub struct Rebuilds {
    /// Times that this member was found damaged, or without its data, since the process began.
    pub damage_found: IntCounter,
    /// Attempts to rebuild it that failed.
    pub failures: IntCounter,
    /// Seconds that rebuilds took, from finding the damage on.
    pub durations: Histogram,
    /// Other members that were rebuilt from this one.
    pub served: IntCounter,
    /// Other members that this one, the leader, found to hold something else than most.
    pub divergent: IntCounter,
}

impl Metrics {
    /// Nothing has happened yet.
    pub fn new() -> prometheus::Result<Self> {
        let calls = ["grpc_type", "grpc_service", "grpc_method"];
        let handled = ["grpc_type", "grpc_service", "grpc_method", "grpc_code"];
        let metrics = Self {
            registry: Registry::new(),
            started: IntCounterVec::new(Opts::new("grpc_server_started_total", "Calls."), &calls)?,
            handled: IntCounterVec::new(
                Opts::new(
                    "grpc_server_handled_total",
                    "Calls that were answered; streams that were opened.",
                ),
                &handled,
            )?,
            log_syncs: seconds(
                "etcd_disk_wal_fsync_duration_seconds",
                "Time of syncs of the log, with the writes before them.",
            )?,
            engine_syncs: seconds(
                "etcd_disk_backend_commit_duration_seconds",
                "Time of syncs of the storage engine.",
            )?,
            leader_changes: IntCounter::new(
                "etcd_server_leader_changes_seen_total",
                "Changes of the leader.",
            )?,
            proposals_failed: IntCounter::new(
                "etcd_server_proposals_failed_total",
                "Proposals that were refused before they were replicated.",
            )?,
            proposals_pending: IntGauge::new(
                "etcd_server_proposals_pending",
                "Proposals whose outcome is awaited.",
            )?,
            rebuilds: Rebuilds::new()?,
        };
        let collectors: [Box<dyn Collector>; 13] = [
            Box::new(metrics.started.clone()),
            Box::new(metrics.handled.clone()),
            Box::new(metrics.log_syncs.clone()),
            Box::new(metrics.engine_syncs.clone()),
            Box::new(metrics.leader_changes.clone()),
            Box::new(metrics.proposals_failed.clone()),
            Box::new(metrics.proposals_pending.clone()),
            Box::new(metrics.rebuilds.damage_found.clone()),
            Box::new(metrics.rebuilds.failures.clone()),
            Box::new(metrics.rebuilds.durations.clone()),
            Box::new(metrics.rebuilds.served.clone()),
            Box::new(metrics.rebuilds.divergent.clone()),
            Box::new(ProcessCollector::for_self()),
        ];
        for collector in collectors {
            metrics.registry.register(collector)?;
        }
        Ok(metrics)
    }

    /// Counts a call of gRPC.
    pub async fn count(self, request: Request<Body>, next: Next) -> Response {
        let path = request.uri().path().to_owned();
        let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/'))
        else {
            return next.run(request).await;
        };
        let response = next.run(request).await;
        // A call that failed has its status in the headers; one that did not, in trailers.
        let status = response.headers().get("grpc-status");
        let code = status.map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()));
        // Only what there is has a place: a client must not make up names.
        let known = KNOWN_PACKAGES
            .iter()
            .any(|package| service.starts_with(package));
        if known && code != Code::Unimplemented {
            let kind = kind_of(method);
            let code = match code {
                Code::Ok => "OK".to_owned(),
                other => format!("{other:?}"),
            };
            self.started
                .with_label_values(&[kind, service, method])
                .inc();
            self.handled
                .with_label_values(&[kind, service, method, &code])
                .inc();
        }
        response
    }

    /// Every metric, as a page.
    pub fn page(&self, node: &Node) -> String {
        let mut families = self.registry.gather();
        for gauge in gauges(node).into_iter().flatten() {
            families.extend(gauge.collect());
        }
        let labels = HashMap::from([
            ("server_version".to_owned(), ETCD_VERSION.to_owned()),
            (
                "keelson_version".to_owned(),
                env!("CARGO_PKG_VERSION").to_owned(),
            ),
        ]);
        let version = Opts::new("etcd_server_version", "The API's version.").const_labels(labels);
        if let Ok(version) = IntGaugeVec::new(version, &[]) {
            version.with_label_values::<&str>(&[]).set(1);
            families.extend(version.collect());
        }
        TextEncoder::new()
            .encode_to_string(&families)
            .unwrap_or_else(|error| format!("# {error}\n"))
    }
}

impl Rebuilds {
    fn new() -> prometheus::Result<Self> {
        Ok(Self {
            damage_found: IntCounter::new(
                "keelson_state_damage_found_total",
                "Times that this member was found damaged, or without its data, and had to be rebuilt.",
            )?,
            failures: IntCounter::new(
                "keelson_state_rebuild_failures_total",
                "Attempts to rebuild this member from others that failed.",
            )?,
            durations: Histogram::with_opts(
                HistogramOpts::new(
                    "keelson_state_rebuild_duration_seconds",
                    "Time of rebuilds of this member, from finding the damage on.",
                )
                // From 0.1 s to an hour.
                .buckets(exponential_buckets(0.1, 2.0, 16)?),
            )?,
            served: IntCounter::new(
                "keelson_state_rebuilds_served_total",
                "Other members that were rebuilt from this one.",
            )?,
            divergent: IntCounter::new(
                "keelson_state_divergent_members_total",
                "Members that this one, as the leader, found to differ from most.",
            )?,
        })
    }
}

const KNOWN_PACKAGES: [&str; 4] = [
    "etcdserverpb.",
    "v3lockpb.",
    "v3electionpb.",
    "grpc.health.v1.",
];

fn kind_of(method: &str) -> &'static str {
    match method {
        "Watch" | "LeaseKeepAlive" => "bidi_stream",
        "Snapshot" | "Observe" | "RangeStream" => "server_stream",
        _ => "unary",
    }
}

fn seconds(name: &str, help: &str) -> prometheus::Result<Histogram> {
    // etcd's buckets: from 1 ms to 8 s.
    Histogram::with_opts(
        HistogramOpts::new(name, help).buckets(exponential_buckets(0.001, 2.0, 14)?),
    )
}

/// What is asked for when the page is.
fn gauges(node: &Node) -> Vec<prometheus::Result<IntGauge>> {
    let status = node.status();
    let (revision, compacted) = node.keyspace().revisions();
    let (watches, streams) = node.watches().count();
    let size = node.keyspace().size().unwrap_or(0);
    let count = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
    let index = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let values = [
        (
            "etcd_server_has_leader",
            "Whether a leader is known.",
            i64::from(status.leader != 0),
        ),
        (
            "etcd_server_is_leader",
            "Whether this member leads.",
            i64::from(status.is_leader),
        ),
        (
            "keelson_state_stalled",
            "Whether the member's thread hangs, most likely on the disk.",
            i64::from(node.is_stalled()),
        ),
        (
            "keelson_state_refuses_growth",
            "Whether writes are refused for lack of room on disks.",
            i64::from(node.refuses_growth()),
        ),
        (
            "keelson_state_alarms",
            "Alarms that are raised, of all members.",
            count(node.keyspace().metadata().alarms.len()),
        ),
        (
            "etcd_server_is_learner",
            "Whether this member has no vote.",
            i64::from(status.is_learner),
        ),
        (
            "etcd_server_proposals_committed_total",
            "Index of the last committed entry.",
            index(status.committed),
        ),
        (
            "etcd_server_proposals_applied_total",
            "Index of the last applied entry.",
            index(status.applied),
        ),
        (
            "etcd_debugging_mvcc_current_revision",
            "The current revision.",
            revision,
        ),
        (
            "etcd_debugging_mvcc_compact_revision",
            "The compacted revision.",
            compacted.max(0),
        ),
        (
            "etcd_debugging_mvcc_watcher_total",
            "Watches.",
            count(watches),
        ),
        (
            "etcd_debugging_mvcc_watch_stream_total",
            "Streams of watches.",
            count(streams),
        ),
        (
            "etcd_mvcc_db_total_size_in_bytes",
            "Size of the storage engine's file.",
            index(size),
        ),
        (
            "etcd_debugging_lease_total",
            "Leases.",
            count(node.keyspace().leases().len()),
        ),
    ];
    values
        .into_iter()
        .map(|(name, help, value)| {
            let gauge = IntGauge::new(name, help)?;
            gauge.set(value);
            Ok(gauge)
        })
        .collect()
}
