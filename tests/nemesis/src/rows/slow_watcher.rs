use std::path::Path;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tokio::time::{sleep, timeout};
use tonic::Streaming;

use super::Notes;
use super::data::Data;
use super::prober::{Probe, Prober};
use super::process::{Peak, resident};
use crate::admin;
use crate::cluster::{Cluster, Setup};

/// Watches that nobody reads.
const SLOW: usize = 50;

/// 100 MiB are written while 50 watches do not read; then one of them reads on.
pub async fn make(folder: &Path, setup: Setup, notes: &mut Notes) -> anyhow::Result<()> {
    let setup = Setup {
        members: 1,
        disk_mib: 3000,
        ..setup
    };
    let cluster = Cluster::start(folder, setup).await?;
    let urls = cluster.client_urls();
    let data = Data {
        keys: 25_000,
        bytes: 4096,
    };
    let process = cluster.process(0).unwrap_or(0);
    let mut slow = Vec::new();
    for _ in 0..SLOW {
        slow.push(watch(&urls[0]).await?);
    }
    let mut fast = watch(&urls[0]).await?;
    let before = resident(process);
    let peak = Peak::of(process);
    let writer = Prober::start(&urls, Probe::Put);
    let reader = tokio::spawn(async move { count(&mut fast, data).await });
    let begin = Instant::now();
    data.load(&urls[0]).await?;
    let written = Instant::now();
    let told = reader.await?;
    let delay = written.elapsed();
    sleep(Duration::from_secs(1)).await;
    let probed = writer.stop().await;
    notes.note("watches that do not read", SLOW);
    notes.mebibytes("memory before, MiB", before);
    notes.mebibytes("memory at most, MiB", peak.bytes());
    notes.seconds("slowest write meanwhile, s", probed.slowest(begin, written));
    notes.note("events of a watch that reads", told);
    notes.seconds("it had them after the last write by, s", delay);
    let late = match slow.first_mut() {
        Some((_, stream)) => count_stream(stream, data).await,
        None => 0,
    };
    notes.note("events of a slow one that reads on", late);
    notes.note("written", data.keys);
    Ok(())
}

type Watching = (
    tokio::sync::mpsc::Sender<pb::WatchRequest>,
    Streaming<pb::WatchResponse>,
);

async fn watch(url: &str) -> anyhow::Result<Watching> {
    let (sender, messages) = tokio::sync::mpsc::channel(1);
    let create = pb::WatchCreateRequest {
        key: "data/".into(),
        range_end: "data0".into(),
        ..pb::WatchCreateRequest::default()
    };
    let request_union = Some(RequestUnion::CreateRequest(create));
    sender.send(pb::WatchRequest { request_union }).await?;
    let mut client =
        WatchClient::new(admin::connect(url).await?).max_decoding_message_size(usize::MAX);
    let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
    let mut stream = client.watch(messages).await?.into_inner();
    // It is created.
    stream.message().await?;
    Ok((sender, stream))
}

async fn count(watching: &mut Watching, data: Data) -> u64 {
    count_stream(&mut watching.1, data).await
}

/// How many events come, until all are there or none comes for 20 s.
async fn count_stream(stream: &mut Streaming<pb::WatchResponse>, data: Data) -> u64 {
    let mut events = 0;
    while events < data.keys {
        match timeout(Duration::from_secs(20), stream.message()).await {
            Ok(Ok(Some(message))) => events += message.events.len() as u64,
            _ => break,
        }
    }
    events
}
