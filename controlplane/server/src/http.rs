//! What is asked over plain HTTP: health, version, metrics.

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

use crate::grpc::ETCD_VERSION;
use crate::metrics;
use crate::node::Node;

/// Adds `/health`, `/version` and `/metrics`.
pub fn routes(router: Router, node: Node) -> Router {
    let health = node.clone();
    router
        .route("/health", get(move || is_healthy(health.clone())))
        .route("/version", get(version))
        .route(
            "/metrics",
            get(move || std::future::ready(metrics_page(&node))),
        )
}

async fn is_healthy(node: Node) -> impl IntoResponse {
    let outcome = if node.status().leader == 0 {
        Err("RAFT NO LEADER".to_owned())
    } else {
        node.read_barrier().await.map_err(|error| error.to_string())
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
}

async fn version() -> impl IntoResponse {
    let body = serde_json::json!({
        "etcdserver": ETCD_VERSION,
        "etcdcluster": "3.5.0",
        "keelson": env!("CARGO_PKG_VERSION"),
    });
    (
        [(header::CONTENT_TYPE, "application/json")],
        body.to_string(),
    )
}

fn metrics_page(node: &Node) -> impl IntoResponse + use<> {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        metrics::page(node),
    )
}
