//! Opens the member and serves it until the process is told to end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_member::command::Operation;
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::rebuild::{self, is_pristine};
use tokio::sync::{Semaphore, mpsc};
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::again;
use crate::compactor;
use crate::disk::Waiting;
use crate::ending::{self, Ending};
use crate::grpc::{Limits, Passwords, ResponseMemory, Services};
use crate::http;
use crate::listen::listen;
use crate::metrics::Metrics;
use crate::node::{self, Node, NodeOptions};
use crate::open;
use crate::options::{self, Listen, Options};
use crate::peers::{self, Connector, Lobby, Peers};
use crate::room::Room;
use crate::stall::{self, SlowSyncs};
use crate::tls::ServerTls;

/// Serves a member with the given flags.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let begin = Instant::now();
    match runtime.block_on(serve(options))? {
        End::Stopped => Ok(()),
        End::Damaged => Err(restart(begin.elapsed())),
    }
}

/// Runs this program anew in this process: of what a damaged member has in memory, nothing is to be
/// relied on. Returns only if that fails.
fn restart(served: Duration) -> anyhow::Error {
    use std::os::unix::process::CommandExt as _;
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let error = std::process::Command::new("/proc/self/exe")
        .arg0(name)
        .args(arguments)
        .env(again::IN_A_ROW, again::next(served).to_string())
        .exec();
    anyhow::Error::new(error).context("cannot start anew: start this member again")
}

/// How serving ended.
enum End {
    /// It was told to.
    Stopped,
    /// The member is damaged, and will be rebuilt by a process that starts anew.
    Damaged,
}

async fn serve(options: &Options) -> anyhow::Result<End> {
    let clients = options::addresses("--listen-client-urls", &options.listen_client_urls)?;
    let peer_addresses = options::addresses("--listen-peer-urls", &options.listen_peer_urls)?;
    let client_tls = server_tls(options.tls.clients().server()?, &clients, "--cert-file")?;
    let peer_tls = server_tls(
        options.tls.peers().server()?,
        &peer_addresses,
        "--peer-cert-file",
    )?;
    let connector = Connector::new(options.tls.peers())?;
    let metrics = Metrics::new()?;
    let waiting = Waiting::default();
    let slow_syncs = SlowSyncs::new(Duration::from_millis(options.election_timeout) / 4);
    let disk = open::lock(options, &metrics, &waiting, &slow_syncs)?;
    let lobby = Lobby::default();
    let mut listeners = Vec::new();
    for listen_on in &peer_addresses {
        let routes = Routes::new(lobby.service());
        listeners.push(
            listen(
                *listen_on,
                peer_tls.as_ref(),
                routes,
                std::future::pending(),
            )
            .await?,
        );
    }
    let opened = open::open(options, disk, &connector, &lobby, &metrics.rebuilds).await?;
    for listener in listeners {
        listener.abort();
        let _ = listener.await;
    }
    let identity = opened.identity;

    let (outbox, sent) = mpsc::unbounded_channel();
    let node_options = NodeOptions {
        tick: options.tick(),
        election_ticks: options.election_ticks()?,
        id_prefix: uuid::Uuid::new_v4().as_fields().0,
    };
    let disk = Arc::clone(&opened.disk);
    let (node, failure) = node::start(
        opened.member,
        opened.disk,
        node_options,
        outbox,
        metrics.clone(),
    )?;
    let peers = Peers::new(identity.cluster_id, identity.member_id, connector);
    tokio::spawn(Arc::clone(&peers).run(node.clone(), sent));
    let (end, ending) = Ending::new();
    let services = Services {
        node: node.clone(),
        peers: Arc::clone(&peers),
        cluster_id: identity.cluster_id,
        member_id: identity.member_id,
        limits: limits(options)?,
        ending: ending.clone(),
        responses: ResponseMemory::new(usize::try_from(options.max_response_bytes)?),
        passwords: Passwords {
            cost: options.bcrypt_cost,
            token_lifetime: Duration::from_secs(options.auth_token_ttl),
            at_once: Arc::new(Semaphore::new(
                std::thread::available_parallelism().map_or(1, usize::from),
            )),
        },
    };
    let seen = node.clone();
    lobby.answer(identity.cluster_id, move || {
        is_pristine(seen.keyspace(), seen.term())
    });
    let mut listeners = Vec::new();
    for listen_on in peer_addresses {
        let service = peers::service(
            node.clone(),
            Arc::clone(&peers),
            Arc::clone(&disk),
            identity.cluster_id,
            identity.member_id,
            metrics.rebuilds.served.clone(),
        );
        let routes = Routes::new(service).add_service(lobby.service());
        // Other members go on talking to this one until the process is gone.
        let never = std::future::pending();
        listen(listen_on, peer_tls.as_ref(), routes, never).await?;
    }
    for listen_on in clients {
        let (health, health_service) = tonic_health::server::health_reporter();
        tokio::spawn(report_health(node.clone(), health));
        let routes = services.clone().routes().add_service(health_service);
        let with_http = http::routes(
            routes.into_axum_router(),
            node.clone(),
            identity.member_id,
            metrics.clone(),
        );
        let ends = ending.clone().begins();
        let routes = Routes::from(with_http);
        listeners.push(listen(listen_on, client_tls.as_ref(), routes, ends).await?);
    }
    tracing::info!(
        member = %format_args!("{:x}", identity.member_id),
        cluster = %format_args!("{:x}", identity.cluster_id),
        clients = ?options.listen_client_urls,
        peers = ?options.listen_peer_urls,
        folder = %options.member.folder().display(),
        "keelson-state {} serves", env!("CARGO_PKG_VERSION")
    );
    let room = Room {
        folder: options.member.folder(),
        reserve: options.disk_reserve_mib * 1024 * 1024,
        waiting,
        member_id: identity.member_id,
    };
    tokio::spawn(room.watch(node.clone()));
    tokio::spawn(stall::watch(node.clone(), slow_syncs));
    if let Some(retention) = options.retention()? {
        tokio::spawn(compactor::run(node.clone(), retention));
    }
    tokio::spawn(peers::digests::compare(
        Arc::clone(&peers),
        node.clone(),
        metrics.rebuilds.divergent.clone(),
    ));
    tokio::spawn(introduce(
        node.clone(),
        peers,
        identity.member_id,
        options.member.name.clone(),
        options.client_urls(),
        options.replace.is_some(),
    ));
    tokio::spawn(open::remember_peers(
        node.clone(),
        Arc::clone(&disk),
        identity.clone(),
    ));
    tokio::select! {
        error = failure => match error {
            Ok(error) if error.is_damage() => {
                tracing::error!(%error, "the member is damaged");
                let urls = open::other_urls(options, &identity);
                rebuild::note(&*disk, &error, !urls.is_empty())?;
                Ok(End::Damaged)
            }
            Ok(error) => Err(error).context("the member stopped"),
            Err(_) => anyhow::bail!("the member's thread ended"),
        },
        () = stopped() => {
            ending::hand_over(&node).await;
            let _ = end.send(true);
            ending::wind_up(node, listeners).await;
            Ok(End::Stopped)
        }
    }
}

fn limits(options: &Options) -> anyhow::Result<Limits> {
    Ok(Limits {
        txn_operations: options.max_txn_ops,
        request_bytes: usize::try_from(options.max_request_bytes)?,
        lease_ttl: options.least_lease_ttl()?,
        watch_progress: options.watch_progress_notify_interval,
        learners: options.max_learners,
        certificate_is_user: options.tls.client_cert_auth,
    })
}

/// A TLS configuration where one is needed.
fn server_tls(
    config: Option<ServerTls>,
    addresses: &[Listen],
    flag: &str,
) -> anyhow::Result<Option<ServerTls>> {
    anyhow::ensure!(
        config.is_some() || !addresses.iter().any(|address| address.tls),
        "an https URL to listen on needs a certificate: {flag} is missing"
    );
    Ok(config)
}

/// Says over gRPC's health service whether this member can serve.
async fn report_health(node: Node, health: HealthReporter) {
    loop {
        let status = if node.is_stalled() {
            ServingStatus::NotServing
        } else {
            ServingStatus::Serving
        };
        health.set_service_status("", status).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Tells the cluster this member's name and client URLs, until it has heard; then keeps connections
/// in step with the membership.
async fn introduce(
    node: Node,
    peers: Arc<Peers>,
    id: u64,
    name: String,
    client_urls: Vec<String>,
    wants_vote: bool,
) {
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
            if let Err(error) = node.propose(Operation::Member(member), None).await {
                tracing::debug!(%error, "the cluster has not heard of this member's URLs yet");
            }
        }
        if wants_vote
            && known.is_some_and(|known| known.is_learner && known.name == name)
            && let Err(error) = peers.promote_self(&node).await
        {
            tracing::debug!(%error, "this member has no vote yet");
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
