use std::path::Path;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use tokio::time::{sleep, timeout};

use super::Notes;
use super::data::Data;
use super::prober::{Probe, Prober};
use super::process::{Peak, resident};
use crate::admin;
use crate::cluster::{Cluster, Setup};

/// Clients that ask at once.
const CLIENTS: usize = 8;

/// 200 MiB of data, and clients that ask for all of it in one request, without a limit.
pub async fn make(folder: &Path, setup: Setup, notes: &mut Notes) -> anyhow::Result<()> {
    let setup = Setup {
        members: 1,
        disk_mib: 3000,
        ..setup
    };
    let cluster = Cluster::start(folder, setup).await?;
    let urls = cluster.client_urls();
    let data = Data {
        keys: 20_000,
        bytes: 10_240,
    };
    data.load(&urls[0]).await?;
    sleep(Duration::from_secs(3)).await;
    let process = cluster.process(0).unwrap_or(0);
    notes.mebibytes("data, MiB", data.keys * data.bytes as u64);
    notes.mebibytes("memory before, MiB", resident(process));
    let peak = Peak::of(process);
    let writer = Prober::start(&urls, Probe::Put);
    let begin = Instant::now();
    let asked = (0..CLIENTS).map(|_| tokio::spawn(ask(urls[0].clone())));
    let mut bytes = Vec::new();
    for asked in asked.collect::<Vec<_>>() {
        bytes.push(asked.await?);
    }
    let end = Instant::now();
    let probed = writer.stop().await;
    notes.note("clients", CLIENTS);
    notes.mebibytes("memory at most, MiB", peak.bytes());
    notes.seconds("slowest write meanwhile, s", probed.slowest(begin, end));
    notes.seconds("time, s", end - begin);
    notes.note("answers", bytes);
    Ok(())
}

async fn ask(url: String) -> String {
    let asked = async {
        let mut kv =
            KvClient::new(admin::connect(&url).await?).max_decoding_message_size(usize::MAX);
        let request = pb::RangeRequest {
            key: "data/".into(),
            range_end: "data0".into(),
            ..pb::RangeRequest::default()
        };
        anyhow::Ok(kv.range(request).await?.into_inner().kvs.len())
    };
    match timeout(Duration::from_mins(1), asked).await {
        Ok(Ok(keys)) => format!("{keys} keys"),
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => "none within a minute".to_owned(),
    }
}
