use std::path::Path;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use pb::maintenance_client::MaintenanceClient;
use tokio::time::sleep;

use super::Notes;
use super::data::Data;
use super::prober::{Probe, Prober};
use crate::admin;
use crate::cluster::{Cluster, Setup};

/// 300 MiB of data on one member, which is defragmented while clients write and read.
pub async fn make(folder: &Path, setup: Setup, notes: &mut Notes) -> anyhow::Result<()> {
    let setup = Setup {
        members: 1,
        disk_mib: 4000,
        ..setup
    };
    let cluster = Cluster::start(folder, setup).await?;
    let urls = cluster.client_urls();
    let data = Data {
        keys: 75_000,
        bytes: 4096,
    };
    data.load(&urls[0]).await?;
    sleep(Duration::from_secs(2)).await;
    let (puts, ranges) = (
        Prober::start(&urls, Probe::Put),
        Prober::start(&urls, Probe::Range),
    );
    let quiet = Instant::now();
    sleep(Duration::from_secs(2)).await;
    let begin = Instant::now();
    let channel = admin::connect(&urls[0]).await?;
    let answer = MaintenanceClient::new(channel)
        .defragment(pb::DefragmentRequest {})
        .await;
    let end = Instant::now();
    sleep(Duration::from_secs(2)).await;
    let (puts, ranges) = (puts.stop().await, ranges.stop().await);
    notes.note("it was defragmented", answer.is_ok());
    notes.seconds("time that it took, s", end - begin);
    notes.seconds("median write before, s", puts.median(quiet, begin));
    notes.seconds(
        "longest time without a write, s",
        puts.longest_gap(begin, end),
    );
    notes.seconds(
        "longest time without a read, s",
        ranges.longest_gap(begin, end),
    );
    Ok(())
}
