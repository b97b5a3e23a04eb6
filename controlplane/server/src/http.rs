//! What is asked over plain HTTP: health, version, metrics.

use axum::Router;
use axum::http::{StatusCode, header};
use axum::middleware::from_fn;
use axum::response::IntoResponse;
use axum::routing::get;

use crate::grpc::ETCD_VERSION;
use crate::metrics::Metrics;
use crate::node::Node;

/// Adds `/health`, `/version` and `/metrics`, and counts what is called.
pub fn routes(router: Router, node: Node, metrics: Metrics) -> Router {
    let health = node.clone();
    let counting = metrics.clone();
    router
        .route("/health", get(move || is_healthy(health.clone())))
        .route("/version", get(version))
        .route(
            "/metrics",
            get(move || std::future::ready(metrics_page(&metrics, &node))),
        )
        .layer(from_fn(move |request, next| {
            counting.clone().count(request, next)
        }))
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

fn metrics_page(metrics: &Metrics, node: &Node) -> impl IntoResponse + use<> {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        metrics.page(node),
    )
}
