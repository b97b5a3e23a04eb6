use std::path::Path;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use tokio::time::sleep;

use super::Notes;
use super::data::Data;
use super::prober::{Probe, Prober};
use crate::admin;
use crate::cluster::{Cluster, Setup};

/// How often each key is written.
const VERSIONS: usize = 10;

/// 200,000 versions of 1 KiB in a cluster of three, all but the last of each key compacted while
/// clients write and read.
pub async fn make(folder: &Path, setup: Setup, notes: &mut Notes) -> anyhow::Result<()> {
    let setup = Setup {
        disk_mib: 3000,
        ..setup
    };
    let cluster = Cluster::start(folder, setup).await?;
    let urls = cluster.client_urls();
    let data = Data {
        keys: 20_000,
        bytes: 1024,
    };
    for _ in 0..VERSIONS {
        data.load(&urls[0]).await?;
    }
    sleep(Duration::from_secs(3)).await;
    let (puts, ranges) = (
        Prober::start(&urls, Probe::Put),
        Prober::start(&urls, Probe::Range),
    );
    let quiet = Instant::now();
    sleep(Duration::from_secs(5)).await;
    let mut kv = KvClient::new(admin::connect(&urls[0]).await?);
    let now = kv
        .range(pb::RangeRequest {
            key: "probe".into(),
            ..pb::RangeRequest::default()
        })
        .await?;
    let revision = now.into_inner().header.map_or(0, |header| header.revision);
    let begin = Instant::now();
    // It answers when history is gone, or at once and lets it go later.
    kv.compact(pb::CompactionRequest {
        revision,
        physical: true,
    })
    .await?;
    let answered = Instant::now();
    sleep(Duration::from_secs(10)).await;
    let end = Instant::now();
    let (puts, ranges) = (puts.stop().await, ranges.stop().await);
    notes.note("revisions", revision);
    notes.seconds("answered after, s", answered - begin);
    notes.seconds("slowest write in 5 s before, s", puts.slowest(quiet, begin));
    notes.seconds("slowest write in 10 s after, s", puts.slowest(begin, end));
    notes.seconds("slowest read in 10 s after, s", ranges.slowest(begin, end));
    Ok(())
}
