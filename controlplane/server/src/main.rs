//! `keelson-state`: a member of a replicated state store that speaks etcd v3's API.

mod check;
mod grpc;
mod http;
mod identity;
mod maintenance;
mod metrics;
mod node;
mod options;
mod peers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;
use keelson_member::command::Operation;
use keelson_member::disk::{Disk, Folder};
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::{Member, MemberOptions};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::grpc::{Limits, Services};
use crate::node::{Input, Node, NodeOptions};
use crate::options::{Identity, Options};
use crate::peers::Peers;

fn main() -> std::process::ExitCode {
    let options = Options::parse();
    let filter = tracing_subscriber::EnvFilter::try_new(&options.log_level).unwrap_or_default();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(&options) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    let identity = options.identity()?;
    let clients = options::addresses("--listen-client-urls", &options.listen_client_urls)?;
    let peers = options::addresses("--listen-peer-urls", &options.listen_peer_urls)?;
    let member = open(options, &identity)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(serve(options, identity, member, &clients, &peers))
}

/// The member and its disk.
struct Opened {
    member: Member,
    disk: Arc<dyn Disk>,
}

fn open(options: &Options, identity: &Identity) -> anyhow::Result<Opened> {
    let folder = options.folder();
    let disk = Folder::open(&folder).map_err(|error| match error.kind() {
        std::io::ErrorKind::WouldBlock => {
            anyhow::anyhow!("{} is in use by another process", folder.display())
        }
        _ => anyhow::anyhow!("cannot open {}: {error}", folder.display()),
    })?;
    let disk: Arc<dyn Disk> = Arc::new(disk);
    let (seed, _) = uuid::Uuid::new_v4().as_u64_pair();
    let member_options = MemberOptions {
        cluster_id: identity.cluster_id,
        id: identity.member_id,
        bootstrap: match options.initial_cluster_state {
            options::ClusterState::New => identity.members.clone(),
            options::ClusterState::Existing => Vec::new(),
        },
        election_ticks: options.election_ticks()? as usize,
        seed,
        cache_bytes: options.cache_mib * 1024 * 1024,
    };
    let member =
        Member::open(&disk, &member_options).with_context(|| format!("in {}", folder.display()))?;
    Ok(Opened { member, disk })
}

async fn serve(
    options: &Options,
    identity: Identity,
    opened: Opened,
    clients: &[SocketAddr],
    peer_addresses: &[SocketAddr],
) -> anyhow::Result<()> {
    let (outbox, sent) = mpsc::unbounded_channel();
    let (id_prefix, _) = uuid::Uuid::new_v4().as_u64_pair();
    let node_options = NodeOptions {
        tick: options.tick(),
        election_ticks: options.election_ticks()?,
        id_prefix: id_prefix >> 32,
    };
    let (node, failure) = node::start(opened.member, opened.disk, node_options, outbox)?;
    let peers = Peers::new(identity.cluster_id);
    tokio::spawn(Arc::clone(&peers).run(node.clone(), sent));
    let services = Services {
        node: node.clone(),
        peers: Arc::clone(&peers),
        cluster_id: identity.cluster_id,
        member_id: identity.member_id,
        limits: Limits {
            txn_operations: options.max_txn_ops,
            request_bytes: options.max_request_bytes,
            lease_ttl: options.least_lease_ttl()?,
            watch_progress: options.watch_progress_notify_interval,
        },
    };
    for address in peer_addresses {
        let routes = Routes::new(peers::service(node.clone(), identity.cluster_id));
        listen(*address, routes).await?;
    }
    for address in clients {
        let (health, health_service) = tonic_health::server::health_reporter();
        health
            .set_service_status("", tonic_health::ServingStatus::Serving)
            .await;
        let routes = services.clone().routes().add_service(health_service);
        let with_http = http::routes(routes.into_axum_router(), node.clone());
        listen(*address, Routes::from(with_http)).await?;
    }
    tracing::info!(
        member = %format_args!("{:x}", identity.member_id),
        cluster = %format_args!("{:x}", identity.cluster_id),
        clients = ?options.listen_client_urls,
        peers = ?options.listen_peer_urls,
        folder = %options.folder().display(),
        "keelson-state {} serves", env!("CARGO_PKG_VERSION")
    );
    tokio::spawn(introduce(
        node.clone(),
        peers,
        identity.member_id,
        options.name.clone(),
        options.client_urls(),
    ));
    tokio::select! {
        error = failure => match error {
            Ok(error) => Err(error).context("the member stopped"),
            Err(_) => anyhow::bail!("the member's thread ended"),
        },
        () = stopped() => {
            node.tell(Input::Stop);
            Ok(())
        }
    }
}

async fn listen(address: SocketAddr, routes: Routes) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = Server::builder()
        .accept_http1(true)
        .initial_connection_window_size(Some(8 * 1024 * 1024))
        .initial_stream_window_size(Some(4 * 1024 * 1024))
        .add_routes(routes)
        .serve_with_incoming(incoming);
    tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%address, %error, "a listener ended");
        }
    });
    Ok(())
}

/// Tells the cluster this member's name and client URLs, until it has heard; then keeps connections
/// in step with the membership.
async fn introduce(node: Node, peers: Arc<Peers>, id: u64, name: String, client_urls: Vec<String>) {
    loop {
        let metadata = node.keyspace().metadata();
        let known = metadata.members.iter().find(|member| member.id == id);
        if let Some(known) = known
            && (known.name != name || known.client_urls != client_urls)
        {
            let member = MemberInfo {
                id,
                name: name.clone(),
                client_urls: client_urls.clone(),
                ..MemberInfo::default()
            };
            if let Err(error) = node.propose(Operation::Member(member)).await {
                tracing::debug!(%error, "the cluster has not heard of this member's URLs yet");
            }
        }
        peers.prune(&node);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn stopped() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
