//! What is asked over plain HTTP: health, version, metrics.

mod health;

use axum::Router;
use axum::http::header;
use axum::middleware::from_fn;
use axum::response::IntoResponse;
use axum::routing::get;

use crate::grpc::{ETCD_VERSION, hold};
use crate::metrics::Metrics;
use crate::node::Node;

/// Adds `/health`, `/livez`, `/readyz`, `/version` and `/metrics`, and counts what is called.
pub fn routes(router: Router, node: Node, member_id: u64, metrics: Metrics) -> Router {
    let counting = metrics.clone();
    let healthy = node.clone();
    router
        .merge(health::routes(healthy, member_id))
        .route("/version", get(version))
        .route(
            "/metrics",
            get(move || std::future::ready(metrics_page(&metrics, &node))),
        )
        .layer(from_fn(move |request, next| {
            let counted = counting.clone().count(request, next);
            async move { hold(counted.await) }
        }))
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
