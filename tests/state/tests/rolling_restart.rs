//! Members are restarted one after the other, as for an upgrade, while clients go on.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program};
use pb::kv_client::KvClient;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

const WRITERS: usize = 8;

/// Clients that try again elsewhere when a member says that it can't serve are never told more than
/// that: no outcome is unknown, no request fails for good. Members end by themselves, with leadership
/// handed over.
#[tokio::test]
async fn clients_go_on() {
    let build = Program::KeelsonState.path();
    let cluster = Cluster::start_build(&build, 3).await;
    clients_go_on_while_all_become(&build, cluster).await;
}

/// The same while every member becomes one of this version.
#[tokio::test]
#[ignore = "needs an older keelson-state: its path in KEELSON_STATE_BEFORE"]
async fn clients_go_on_through_an_upgrade() {
    let before = std::env::var_os("KEELSON_STATE_BEFORE");
    let before = before.expect("KEELSON_STATE_BEFORE is not the path of an older keelson-state");
    let cluster = Cluster::start_build(Path::new(&before), 3).await;
    clients_go_on_while_all_become(&Program::KeelsonState.path(), cluster).await;
}

async fn clients_go_on_while_all_become(build: &Path, mut cluster: Cluster) {
    cluster.use_build(build);
    let channels: Vec<Channel> = (0..3)
        .map(|at| {
            Endpoint::from_shared(cluster.client_url(at).to_owned())
                .unwrap()
                .connect_lazy()
        })
        .collect();
    let done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| tokio::spawn(write(channels.clone(), writer, Arc::clone(&done))))
        .collect();
    let watching = tokio::spawn(watch(channels.clone()));
    for round in 0..2 {
        let leader = cluster.leader().await;
        for at in [leader, (leader + 1) % 3, (leader + 2) % 3] {
            let leads = cluster.leader().await == at;
            cluster.signal(at, "TERM");
            let log = cluster.end_of(at).await;
            assert!(!log.contains("not answered in time"), "{log}");
            assert!(!leads || log.contains("hands over leadership"), "{log}");
            tokio::time::sleep(Duration::from_millis(300)).await;
            cluster.run(at);
            cluster.wait_for(at).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        assert!(
            writers.iter().all(|writer| !writer.is_finished()),
            "round {round}"
        );
    }
    done.store(true, Ordering::Relaxed);
    let mut written = 0;
    let mut slowest = Duration::ZERO;
    for writer in writers {
        let (count, longest) = writer.await.unwrap();
        written += count;
        slowest = slowest.max(longest);
    }
    println!("{written} writes, the slowest took {slowest:?} with its retries");
    let mut kv = KvClient::new(cluster.connect(0).await);
    let all = pb::RangeRequest {
        key: "writer".into(),
        range_end: "writes".into(),
        ..pb::RangeRequest::default()
    };
    let answer = kv.range(all).await.unwrap().into_inner();
    // Each write is one version: none was lost, none happened twice.
    let versions: i64 = answer.kvs.iter().map(|kv| kv.version).sum();
    assert_eq!(versions, i64::try_from(written).unwrap());
    let end = pb::PutRequest {
        key: "end".into(),
        ..pb::PutRequest::default()
    };
    kv.put(end).await.unwrap();
    let seen = tokio::time::timeout(Duration::from_mins(1), watching).await;
    assert_eq!(seen.unwrap().unwrap(), written);
}

/// Puts one key again and again until `done`, on one member after the other if need be: how many
/// were acknowledged, and the longest one.
async fn write(channels: Vec<Channel>, writer: usize, done: Arc<AtomicBool>) -> (usize, Duration) {
    let mut at = writer % channels.len();
    let mut count = 0;
    let mut longest = Duration::ZERO;
    while !done.load(Ordering::Relaxed) {
        let begin = Instant::now();
        loop {
            let put = pb::PutRequest {
                key: format!("writer{writer}").into(),
                value: count.to_string().into(),
                ..pb::PutRequest::default()
            };
            match KvClient::new(channels[at].clone()).put(put).await {
                Ok(_) => break,
                Err(error) => {
                    assert!(
                        is_refusal(&error),
                        "the outcome is unknown after {:?}: {error:?}",
                        begin.elapsed()
                    );
                    assert!(begin.elapsed() < Duration::from_secs(20), "{error:?}");
                    at = (at + 1) % channels.len();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
        longest = longest.max(begin.elapsed());
        count += 1;
    }
    (count, longest)
}

/// Whether the request has surely done nothing: nobody was there, or who was there refused it.
fn is_refusal(error: &Status) -> bool {
    let text = format!("{error:?}");
    let unsent = [
        "ConnectError",
        "tcp connect error",
        "Connection refused",
        "GoAway",
        "REFUSED_STREAM",
        // Sent behind the server's GOAWAY, which tonic does not tell: that it did nothing is counted
        // at the end.
        "stream closed because of a broken pipe",
    ];
    let refused = [
        "etcdserver: no leader",
        "etcdserver: server stopped",
        "operation was canceled",
    ];
    error.code() != Code::DeadlineExceeded
        && unsent
            .iter()
            .chain(&refused)
            .any(|known| text.contains(known))
}

/// Watches every writer's key, going on elsewhere after the last revision it has seen; how many
/// events there were until the end, each one once and in order.
async fn watch(channels: Vec<Channel>) -> usize {
    let mut next = 1;
    let mut seen = 0;
    let mut last = (0, 0);
    for at in (0..channels.len()).cycle() {
        let create = pb::WatchCreateRequest {
            key: "end".into(),
            range_end: "writes".into(),
            start_revision: next,
            ..pb::WatchCreateRequest::default()
        };
        let request = pb::WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(create)),
        };
        let requests =
            futures::StreamExt::chain(tokio_stream::once(request), tokio_stream::pending());
        let Ok(stream) = WatchClient::new(channels[at].clone()).watch(requests).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let mut stream = stream.into_inner();
        while let Ok(Some(response)) = stream.message().await {
            for event in response.events {
                let kv = event.kv.unwrap();
                let place = (kv.mod_revision, seen);
                assert!(place.0 > last.0, "{place:?} after {last:?}");
                last = place;
                next = kv.mod_revision + 1;
                if kv.key == "end" {
                    return seen;
                }
                seen += 1;
            }
        }
    }
    seen
}
