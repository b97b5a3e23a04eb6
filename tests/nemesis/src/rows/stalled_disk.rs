use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_etcd_api::etcdserverpb as pb;
use pb::lease_client::LeaseClient;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Notes;
use super::prober::{Probe, Prober};
use crate::admin;
use crate::cluster::{Cluster, Setup};

/// Leases that are kept alive meanwhile, and their time-to-live in seconds.
const LEASES: i64 = 20;
const TTL: i64 = 5;
/// How long the disk does not answer.
const STALL: Duration = Duration::from_secs(15);

/// The leader's disk stops answering writes and syncs, and goes on later. (By freezing its file
/// system: a suspended device-mapper target would stop reads of what is not cached as well, but not
/// every kernel has device-mapper.)
pub async fn make(folder: &Path, setup: Setup, notes: &mut Notes) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(folder, setup).await?;
    let urls = cluster.client_urls();
    let leader = admin::wait_for_leader(&urls, Duration::from_secs(10)).await?;
    let mut kept = JoinSet::new();
    for id in 1..=LEASES {
        let channel = admin::connect(&urls[leader]).await?;
        let grant = pb::LeaseGrantRequest { ttl: TTL, id };
        LeaseClient::new(channel).lease_grant(grant).await?;
        kept.spawn(keep_alive(
            urls.clone(),
            id,
            Instant::now() + STALL + Duration::from_secs(5),
        ));
    }
    let (puts, ranges) = (
        Prober::start(&urls, Probe::Put),
        Prober::start(&urls, Probe::Range),
    );
    sleep(Duration::from_secs(1)).await;
    let begin = Instant::now();
    cluster.disk(leader).freeze()?;
    sleep(STALL).await;
    let others: Vec<String> = urls
        .iter()
        .enumerate()
        .filter(|(at, _)| *at != leader)
        .map(|(_, url)| url.clone())
        .collect();
    let leads = admin::leader(&others).await;
    cluster.disk(leader).thaw()?;
    let thawed = Instant::now();
    sleep(Duration::from_secs(5)).await;
    let ended = cluster.supervise()?;
    let end = Instant::now();
    let (puts, ranges) = (puts.stop().await, ranges.stop().await);
    let mut alive = 0;
    while let Some(is_alive) = kept.join_next().await {
        alive += i64::from(is_alive.context("keep a lease alive")?);
    }
    notes.note(
        "another member led before the disk went on",
        leads.is_some(),
    );
    notes.seconds(
        "longest time without a write, s",
        puts.longest_gap(begin, end),
    );
    notes.seconds(
        "longest time without a linearizable read, s",
        ranges.longest_gap(begin, end),
    );
    notes.note("writes while it stalled", puts.count(begin, thawed));
    notes.note("leases kept alive", LEASES);
    notes.note("leases lost", LEASES - alive);
    notes.note("the member ended by itself", !ended.is_empty());
    Ok(())
}

/// Keeps a lease alive as a client does, each second, on the next member where one does not answer:
/// whether it is still there.
async fn keep_alive(urls: Vec<String>, id: i64, until: Instant) -> bool {
    let mut at = 0;
    let mut alive = true;
    while Instant::now() < until {
        let answer = timeout(
            Duration::from_secs(1),
            keep_alive_once(&urls[at % urls.len()], id),
        );
        match answer.await {
            Ok(Ok(ttl)) => {
                alive = ttl > 0;
                sleep(Duration::from_secs(1)).await;
            }
            _ => at += 1,
        }
    }
    alive
}

async fn keep_alive_once(url: &str, id: i64) -> anyhow::Result<i64> {
    let mut leases = LeaseClient::new(admin::connect(url).await?);
    let messages = tokio_stream::once(pb::LeaseKeepAliveRequest { id });
    let mut answers = leases.lease_keep_alive(messages).await?.into_inner();
    Ok(answers.message().await?.context("no answer")?.ttl)
}
