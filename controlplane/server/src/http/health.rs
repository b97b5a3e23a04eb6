//! `/health`, `/livez` and `/readyz`, as etcd 3.5 answers them.

use std::fmt::Write as _;

use axum::Router;
use axum::extract::{Path, Query};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::Authority;
use keelson_member::{Failure, RequestError};

use crate::node::Node;

/// Of the query; names may be given more than once.
type Parameters = Query<Vec<(String, String)>>;

/// What can be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    /// No member has found its data damaged.
    DataCorruption,
    /// This member reads what it has.
    SerializableRead,
    /// The cluster confirms that what it reads is current.
    LinearizableRead,
    /// This member has a vote.
    NonLearner,
}

const LIVE: &[Check] = &[Check::SerializableRead];
const READY: &[Check] = &[
    Check::DataCorruption,
    Check::SerializableRead,
    Check::LinearizableRead,
    Check::NonLearner,
];

/// Whose health it is.
#[derive(Clone)]
struct Checked {
    node: Node,
    member_id: u64,
}

/// The three, and each check by itself.
pub fn routes(node: Node, member_id: u64) -> Router {
    let checked = Checked { node, member_id };
    let mut router = Router::new();
    for (path, checks) in [("/livez", LIVE), ("/readyz", READY)] {
        let all = checked.clone();
        let one = checked.clone();
        router = router
            .route(
                path,
                get(move |query: Parameters| async move { all.run(checks, &query).await }),
            )
            .route(
                &format!("{path}/{{check}}"),
                get(
                    move |Path(name): Path<String>, query: Parameters| async move {
                        match checks.iter().position(|check| check.name() == name) {
                            Some(at) => one.run(&checks[at..=at], &query).await,
                            None => StatusCode::NOT_FOUND.into_response(),
                        }
                    },
                ),
            );
    }
    router.route(
        "/health",
        get(move |query: Parameters| async move { checked.health(&query).await }),
    )
}

impl Checked {
    async fn run(&self, checks: &[Check], query: &[(String, String)]) -> Response {
        let excluded = |check: &Check| has(query, "exclude", check.name());
        let mut report = String::new();
        let mut failed = false;
        for check in checks.iter().filter(|check| !excluded(check)) {
            let outcome = self.check(*check).await;
            // Writing to a String does not fail.
            let _ = match outcome {
                Ok(()) => writeln!(report, "[+]{} ok", check.name()),
                Err(reason) => {
                    failed = true;
                    writeln!(report, "[-]{} failed: {reason}", check.name())
                }
            };
        }
        if failed {
            return (StatusCode::SERVICE_UNAVAILABLE, report).into_response();
        }
        if !query.iter().any(|(name, _)| name == "verbose") {
            report.clear();
        }
        report.push_str("ok\n");
        report.into_response()
    }

    async fn check(&self, check: Check) -> Result<(), String> {
        match check {
            Check::DataCorruption => match self.alarm(&[pb::AlarmType::Nospace]) {
                Some(alarm) => Err(format!("alarm activated: {alarm}")),
                None => Ok(()),
            },
            Check::SerializableRead => self.read(),
            Check::LinearizableRead => {
                self.node
                    .read_barrier()
                    .await
                    .map_err(|error| error.to_string())?;
                self.read()
            }
            Check::NonLearner if self.node.keyspace().is_learner(self.member_id) => {
                Err("not supported for learner".into())
            }
            Check::NonLearner => Ok(()),
        }
    }

    /// The name of a raised alarm, but for those to be passed over.
    fn alarm(&self, but: &[pb::AlarmType]) -> Option<&'static str> {
        let alarms = self.node.keyspace().metadata().alarms;
        let mut kinds = alarms
            .iter()
            .filter_map(|alarm| pb::AlarmType::try_from(alarm.kind).ok());
        kinds
            .find(|kind| !but.contains(kind))
            .map(|kind| kind.as_str_name())
    }

    fn read(&self) -> Result<(), String> {
        let request = pb::RangeRequest {
            key: "a".into(),
            ..pb::RangeRequest::default()
        };
        match self.node.keyspace().range(&Authority::default(), &request) {
            // Nobody in particular may not read when authentication is on: the member can.
            Ok(_) | Err(Failure::Request(_)) => Ok(()),
            Err(Failure::Member(error)) => Err(error.to_string()),
        }
    }

    async fn health(&self, query: &[(String, String)]) -> Response {
        let mut passed_over = Vec::new();
        for kind in [pb::AlarmType::Nospace, pb::AlarmType::Corrupt] {
            if has(query, "exclude", kind.as_str_name()) {
                passed_over.push(kind);
            }
        }
        let serializable = has(query, "serializable", "true");
        let outcome = if let Some(alarm) = self.alarm(&passed_over) {
            Err(format!("ALARM {alarm}"))
        } else if serializable {
            self.read()
        } else if self.node.status().leader == 0 {
            Err("RAFT NO LEADER".to_owned())
        } else {
            let read = self.node.read_barrier().await;
            read.map_err(|error: RequestError| error.to_string())
        };
        let (code, body) = match outcome {
            Ok(()) => (
                StatusCode::OK,
                serde_json::json!({"health": "true", "reason": ""}),
            ),
            Err(reason) => (
                StatusCode::SERVICE_UNAVAILABLE,
                serde_json::json!({"health": "false", "reason": reason}),
            ),
        };
        (
            code,
            [(header::CONTENT_TYPE, "application/json")],
            body.to_string(),
        )
            .into_response()
    }
}

impl Check {
    fn name(self) -> &'static str {
        match self {
            Self::DataCorruption => "data_corruption",
            Self::SerializableRead => "serializable_read",
            Self::LinearizableRead => "linearizable_read",
            Self::NonLearner => "non_learner",
        }
    }
}

fn has(query: &[(String, String)], name: &str, value: &str) -> bool {
    query
        .iter()
        .any(|(given, other)| given == name && other == value)
}
