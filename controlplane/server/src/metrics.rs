//! Metrics in Prometheus' text form, under etcd's names where etcd has them.

use std::fmt::Write as _;

use crate::grpc::ETCD_VERSION;
use crate::node::Node;

/// Every metric, as a page.
pub fn page(node: &Node) -> String {
    let status = node.status();
    let (revision, compacted) = node.keyspace().revisions();
    let (watches, streams) = node.watches().count();
    let size = node.keyspace().size().unwrap_or(0);
    let gauges: [(&str, &str, i128); 10] = [
        (
            "etcd_server_has_leader",
            "Whether a leader is known.",
            i128::from(status.leader != 0),
        ),
        (
            "etcd_server_is_leader",
            "Whether this member leads.",
            i128::from(status.is_leader),
        ),
        (
            "etcd_server_proposals_committed_total",
            "Index of the last committed entry.",
            i128::from(status.committed),
        ),
        (
            "etcd_server_proposals_applied_total",
            "Index of the last applied entry.",
            i128::from(status.applied),
        ),
        (
            "etcd_debugging_mvcc_current_revision",
            "The current revision.",
            i128::from(revision),
        ),
        (
            "etcd_debugging_mvcc_compact_revision",
            "The compacted revision.",
            i128::from(compacted),
        ),
        (
            "etcd_debugging_mvcc_watcher_total",
            "Watches.",
            watches as i128,
        ),
        (
            "etcd_debugging_mvcc_watch_stream_total",
            "Streams of watches.",
            streams as i128,
        ),
        (
            "etcd_mvcc_db_total_size_in_bytes",
            "Size of the storage engine's file.",
            i128::from(size),
        ),
        (
            "etcd_debugging_lease_total",
            "Leases.",
            node.keyspace().leases().len() as i128,
        ),
    ];
    let mut page = String::new();
    for (name, help, value) in gauges {
        let _ = writeln!(
            page,
            "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}"
        );
    }
    let version = env!("CARGO_PKG_VERSION");
    let _ = writeln!(
        page,
        "# HELP etcd_server_version The API's version.\n# TYPE etcd_server_version gauge\n\
         etcd_server_version{{server_version=\"{ETCD_VERSION}\",keelson_version=\"{version}\"}} 1"
    );
    page
}
