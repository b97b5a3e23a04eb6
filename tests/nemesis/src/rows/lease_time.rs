use std::path::Path;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use tokio::time::sleep;

use super::Notes;
use crate::admin;
use crate::cluster::{Cluster, Setup};

/// A lease of 12 s is never kept alive, and the leader dies after 4 s and again after 8 s.
pub async fn make(folder: &Path, setup: Setup, notes: &mut Notes) -> anyhow::Result<()> {
    const TTL: u64 = 12;
    let mut cluster = Cluster::start(folder, setup).await?;
    let urls = cluster.client_urls();
    let leader = admin::wait_for_leader(&urls, Duration::from_secs(10)).await?;
    let channel = admin::connect(&urls[leader]).await?;
    let grant = pb::LeaseGrantRequest {
        ttl: TTL.cast_signed(),
        id: 77,
    };
    let begin = Instant::now();
    LeaseClient::new(channel.clone()).lease_grant(grant).await?;
    let put = pb::PutRequest {
        key: "leased".into(),
        lease: 77,
        ..pb::PutRequest::default()
    };
    KvClient::new(channel).put(put).await?;
    for death in [4, 8] {
        sleep(Duration::from_secs(death).saturating_sub(begin.elapsed())).await;
        let leader = admin::wait_for_leader(&urls, Duration::from_secs(10)).await?;
        cluster.kill(leader)?;
        cluster.run(leader)?;
    }
    let limit = Duration::from_secs(5 * TTL);
    while begin.elapsed() < limit && is_there(&urls).await.unwrap_or(true) {
        sleep(Duration::from_millis(100)).await;
    }
    notes.note("time-to-live, s", TTL);
    notes.note("leaders killed", 2);
    notes.seconds("it lived for, s", begin.elapsed());
    Ok(())
}

async fn is_there(urls: &[String]) -> anyhow::Result<bool> {
    for url in urls {
        let Ok(channel) = admin::connect(url).await else {
            continue;
        };
        let request = pb::RangeRequest {
            key: "leased".into(),
            ..pb::RangeRequest::default()
        };
        let mut kv = KvClient::new(channel);
        let answer = tokio::time::timeout(Duration::from_secs(1), kv.range(request)).await;
        if let Ok(Ok(answer)) = answer {
            return Ok(answer.into_inner().count > 0);
        }
    }
    anyhow::bail!("nobody answers")
}
