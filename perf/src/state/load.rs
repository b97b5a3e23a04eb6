//! The work: the same client code for every peer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::request_op::Request;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::server::Cluster;
use crate::process;

/// Bytes of a value.
const VALUE_BYTES: usize = 256;
/// Keys that are written and read.
const KEYS: u64 = 10_000;
/// Connections, shared by clients as etcd's own tool does.
const CONNECTIONS: usize = 8;

/// One kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Puts, one after the other in each client.
    Put,
    /// Transactions of one put.
    TxnPut,
    /// Half transactions that read, half that write.
    TxnMixed,
    /// Reads of one key that see everything acknowledged.
    Range,
    /// Reads of one key that may be stale.
    SerializableRange,
    /// 90% updates that compare the key's revision, 5% creations, 5% deletions.
    Kubernetes,
    /// Leases kept alive.
    KeepAlive,
    /// Puts, each delivered to this many watches: what is counted is deliveries.
    WatchFanOut(usize),
    /// From a put to its event.
    WatchLatency,
}

impl Work {
    pub fn name(self) -> String {
        match self {
            Self::Put => "put".into(),
            Self::TxnPut => "txn-put".into(),
            Self::TxnMixed => "txn-mixed".into(),
            Self::Range => "range".into(),
            Self::SerializableRange => "range serializable".into(),
            Self::Kubernetes => "kubernetes".into(),
            Self::KeepAlive => "lease keepalive".into(),
            Self::WatchFanOut(watches) => format!("watch fan-out {watches}"),
            Self::WatchLatency => "watch latency".into(),
        }
    }
}

/// Does `work` with `clients` at once for about `duration`; figures by name.
pub async fn measure(
    cluster: &Cluster,
    work: Work,
    clients: usize,
    duration: Duration,
) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    let channels = cluster.connect(CONNECTIONS.min(clients)).await?;
    let before = process::usage(&cluster.members)?;
    let start = Instant::now();
    let deadline = start + duration;
    let mut latencies: Vec<u32> = match work {
        Work::WatchFanOut(watches) => {
            let delivered = fan_out(&channels, clients, watches, deadline).await?;
            vec![0; delivered]
        }
        Work::WatchLatency => watch_latency(&channels[0], deadline).await?,
        Work::KeepAlive => {
            all(&channels, clients, |channel, _| {
                keep_alive(channel, deadline)
            })
            .await?
        }
        _ => {
            all(&channels, clients, |channel, client| {
                requests(channel, client, work, deadline)
            })
            .await?
        }
    };
    let seconds = start.elapsed().as_secs_f64();
    let after = process::usage(&cluster.members)?;
    latencies.sort_unstable();
    Ok(figures(&latencies, seconds, before, after))
}

fn figures(
    latencies: &[u32],
    seconds: f64,
    before: process::Usage,
    after: process::Usage,
) -> BTreeMap<&'static str, f64> {
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let count = latencies.len() as f64;
    let at = |share: f64| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let index = (share * (count - 1.0).max(0.0)) as usize;
        latencies.get(index).copied().map_or(f64::NAN, f64::from)
    };
    #[allow(clippy::cast_precision_loss)]
    let written = (after.written_bytes - before.written_bytes) as f64;
    #[allow(clippy::cast_precision_loss)]
    let memory = after.peak_memory as f64 / 1024.0 / 1024.0;
    #[allow(clippy::cast_precision_loss)]
    let value_bytes = VALUE_BYTES as f64;
    BTreeMap::from([
        ("operations_per_s", count / seconds),
        ("p50_us", at(0.5)),
        ("p99_us", at(0.99)),
        ("p99.9_us", at(0.999)),
        (
            "cpu_us_per_operation",
            (after.cpu_seconds - before.cpu_seconds) * 1e6 / count,
        ),
        (
            "written_bytes_per_value_byte",
            written / (count * value_bytes),
        ),
        ("peak_memory_mib", memory),
    ])
}

async fn all<F>(
    channels: &[Channel],
    clients: usize,
    client: impl Fn(Channel, u64) -> F,
) -> anyhow::Result<Vec<u32>>
where
    F: Future<Output = anyhow::Result<Vec<u32>>> + Send + 'static,
{
    let tasks = (0..clients)
        .map(|at| tokio::spawn(client(channels[at % channels.len()].clone(), at as u64)));
    let mut latencies = Vec::new();
    for outcome in join_all(tasks).await {
        latencies.extend(outcome??);
    }
    Ok(latencies)
}

async fn requests(
    channel: Channel,
    client: u64,
    work: Work,
    deadline: Instant,
) -> anyhow::Result<Vec<u32>> {
    let mut kv = KvClient::new(channel);
    let mut random = client.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut latencies = Vec::new();
    let mut known = BTreeMap::new();
    loop {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let begin = Instant::now();
        if begin >= deadline {
            return Ok(latencies);
        }
        match work {
            Work::Range | Work::SerializableRange => {
                let request = read(random % KEYS, work == Work::SerializableRange);
                kv.range(request).await?;
            }
            Work::TxnMixed if random.is_multiple_of(2) => {
                drop(
                    kv.txn(txn(Request::RequestRange(read(random % KEYS, false))))
                        .await?,
                );
            }
            Work::TxnPut | Work::TxnMixed => {
                drop(kv.txn(txn(Request::RequestPut(put(random % KEYS)))).await?);
            }
            Work::Kubernetes => kubernetes(&mut kv, client, random, &mut known).await?,
            _ => drop(kv.put(put(random % KEYS)).await?),
        }
        latencies.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
    }
}

/// What kube-apiserver does to an object: every write compares the object's revision.
async fn kubernetes(
    kv: &mut KvClient<Channel>,
    client: u64,
    random: u64,
    known: &mut BTreeMap<u64, i64>,
) -> anyhow::Result<()> {
    let object = (client << 32) | (random % 64);
    let revision = known.get(&object).copied().unwrap_or(0);
    let key = format!("/registry/pods/{object:016x}");
    let compare = pb::Compare {
        result: pb::compare::CompareResult::Equal as i32,
        target: pb::compare::CompareTarget::Mod as i32,
        key: key.clone().into(),
        range_end: bytes_of(""),
        target_union: Some(pb::compare::TargetUnion::ModRevision(revision)),
    };
    let deletes = revision != 0 && (random >> 32).is_multiple_of(20);
    let operation = if deletes {
        Request::RequestDeleteRange(pb::DeleteRangeRequest {
            key: key.clone().into(),
            ..pb::DeleteRangeRequest::default()
        })
    } else {
        let mut put = put(0);
        put.key = key.clone().into();
        Request::RequestPut(put)
    };
    let mut request = txn(operation);
    request.compare.push(compare);
    let response = kv.txn(request).await?.into_inner();
    anyhow::ensure!(
        response.succeeded,
        "a compare of {key} failed: nobody else writes it"
    );
    if deletes {
        known.remove(&object);
    } else {
        known.insert(object, response.header.map_or(0, |header| header.revision));
    }
    Ok(())
}

async fn keep_alive(channel: Channel, deadline: Instant) -> anyhow::Result<Vec<u32>> {
    let mut client = LeaseClient::new(channel);
    let grant = pb::LeaseGrantRequest { ttl: 60, id: 0 };
    let id = client.lease_grant(grant).await?.into_inner().id;
    let (requests, sent) = mpsc::channel(1);
    requests.send(pb::LeaseKeepAliveRequest { id }).await?;
    let mut answers = client
        .lease_keep_alive(ReceiverStream::new(sent))
        .await?
        .into_inner();
    let mut latencies = Vec::new();
    let mut begin = Instant::now();
    while let Some(answer) = answers.message().await? {
        anyhow::ensure!(answer.ttl == 60, "a lease was not renewed");
        latencies.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
        begin = Instant::now();
        if begin >= deadline {
            break;
        }
        requests.send(pb::LeaseKeepAliveRequest { id }).await?;
    }
    client.lease_revoke(pb::LeaseRevokeRequest { id }).await?;
    Ok(latencies)
}

/// Puts from `clients`, each event to `watches` watches; how many events were delivered. Ends when
/// all of them are.
async fn fan_out(
    channels: &[Channel],
    clients: usize,
    watches: usize,
    deadline: Instant,
) -> anyhow::Result<usize> {
    let delivered = Arc::new(AtomicU64::new(0));
    let mut readers = Vec::new();
    for at in 0..watches {
        let mut events = watch(channels[at % channels.len()].clone(), "fan").await?;
        let delivered = Arc::clone(&delivered);
        readers.push(tokio::spawn(async move {
            while let Ok(Some(response)) = events.message().await {
                delivered.fetch_add(response.events.len() as u64, Ordering::Relaxed);
            }
        }));
    }
    let writers = (0..clients).map(|at| {
        let mut kv = KvClient::new(channels[at % channels.len()].clone());
        tokio::spawn(async move {
            let mut puts = 0_u64;
            while Instant::now() < deadline {
                let mut put = put(puts % KEYS);
                put.key = format!("fan{at}").into();
                kv.put(put).await?;
                puts += 1;
            }
            Ok::<u64, anyhow::Error>(puts)
        })
    });
    let mut expected = 0;
    for outcome in join_all(writers).await {
        expected += outcome?? * watches as u64;
    }
    let patience = Instant::now() + Duration::from_mins(1);
    while delivered.load(Ordering::Relaxed) < expected {
        anyhow::ensure!(
            Instant::now() < patience,
            "events were not delivered within 60 s"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    for reader in readers {
        reader.abort();
    }
    Ok(usize::try_from(expected)?)
}

async fn watch_latency(channel: &Channel, deadline: Instant) -> anyhow::Result<Vec<u32>> {
    let mut events = watch(channel.clone(), "late").await?;
    let mut kv = KvClient::new(channel.clone());
    let mut latencies = Vec::new();
    loop {
        let begin = Instant::now();
        if begin >= deadline {
            return Ok(latencies);
        }
        let mut put = put(0);
        put.key = "late".into();
        let answer = tokio::spawn({
            let mut kv = kv.clone();
            async move { kv.put(put).await }
        });
        events.message().await?;
        latencies.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
        answer.await??;
        let _ = &mut kv;
    }
}

/// Watches keys that begin with `prefix`; the watch is established when this returns.
async fn watch(
    channel: Channel,
    prefix: &str,
) -> anyhow::Result<tonic::Streaming<pb::WatchResponse>> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    let create = pb::WatchCreateRequest {
        key: prefix.to_owned().into(),
        range_end: end.into(),
        ..pb::WatchCreateRequest::default()
    };
    let request = pb::WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(create)),
    };
    // The stream of requests stays open: its end would be the watch's.
    let requests = futures::StreamExt::chain(tokio_stream::once(request), tokio_stream::pending());
    let mut events = WatchClient::new(channel)
        .watch(requests)
        .await?
        .into_inner();
    let created = events.message().await?;
    anyhow::ensure!(
        created.is_some_and(|response| response.created),
        "a watch was refused"
    );
    Ok(events)
}

fn put(key: u64) -> pb::PutRequest {
    pb::PutRequest {
        key: format!("key-{key:012}").into(),
        value: vec![b'v'; VALUE_BYTES].into(),
        ..pb::PutRequest::default()
    }
}

fn read(key: u64, serializable: bool) -> pb::RangeRequest {
    pb::RangeRequest {
        key: format!("key-{key:012}").into(),
        serializable,
        ..pb::RangeRequest::default()
    }
}

fn txn(operation: Request) -> pb::TxnRequest {
    pb::TxnRequest {
        success: vec![pb::RequestOp {
            request: Some(operation),
        }],
        ..pb::TxnRequest::default()
    }
}

fn bytes_of(text: &str) -> tonic::codegen::Bytes {
    text.to_owned().into()
}
