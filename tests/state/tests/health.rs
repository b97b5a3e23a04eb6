//! What load balancers and Kubernetes ask: health, beside etcd; and automatic compaction.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program};
use pb::alarm_request::AlarmAction;
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;

/// Status and lines, in no order: etcd's checks are in none.
fn get(cluster: &Cluster, path: &str) -> (u16, BTreeSet<String>) {
    let address = cluster.client_url(0).trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = if head.to_lowercase().contains("transfer-encoding: chunked") {
        body.lines().nth(1).unwrap_or_default()
    } else {
        body
    };
    let lines = body.lines().filter(|line| !line.is_empty());
    (status, lines.map(str::to_owned).collect())
}

#[tokio::test]
async fn health_is_told_as_etcd_tells_it() {
    let etcd = Cluster::start(Program::Etcd, 1, &[]).await;
    let keelson = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let paths = [
        "/health",
        "/health?serializable=true",
        "/health?exclude=NOSPACE",
        "/health?exclude=CORRUPT",
        "/livez",
        "/livez?verbose",
        "/livez/serializable_read",
        "/livez/serializable_read?verbose",
        "/readyz",
        "/readyz?verbose",
        "/readyz?verbose&exclude=data_corruption",
        "/readyz?verbose&exclude=data_corruption&exclude=linearizable_read",
        "/readyz?verbose&exclude=nonsense",
        "/readyz/data_corruption",
        "/readyz/non_learner?verbose",
    ];
    for alarm in [
        None,
        Some(pb::AlarmType::Nospace),
        Some(pb::AlarmType::Corrupt),
    ] {
        if let Some(alarm) = alarm {
            for cluster in [&etcd, &keelson] {
                let request = pb::AlarmRequest {
                    action: AlarmAction::Activate as i32,
                    member_id: 7,
                    alarm: alarm as i32,
                };
                let mut client = MaintenanceClient::new(cluster.connect(0).await);
                client.alarm(request).await.unwrap();
            }
        }
        for path in paths {
            if alarm == Some(pb::AlarmType::Corrupt) && path.starts_with("/health") {
                continue; // which of two alarms is told depends
            }
            assert_eq!(get(&etcd, path), get(&keelson, path), "{alarm:?} {path}");
        }
    }
    for path in ["/livez/nonsense", "/readyz/nonsense"] {
        assert_eq!(get(&keelson, path).0, 404);
    }
}

#[tokio::test]
async fn history_is_compacted_by_itself() {
    let flags = [
        "--auto-compaction-mode",
        "revision",
        "--auto-compaction-retention",
        "100",
    ];
    let by_revisions = Cluster::start(Program::KeelsonState, 3, &flags).await;
    let by_time = Cluster::start(
        Program::KeelsonState,
        1,
        &["--auto-compaction-retention", "2s"],
    )
    .await;
    for cluster in [&by_revisions, &by_time] {
        let mut kv = KvClient::new(cluster.connect(0).await);
        for number in 0..300 {
            let put = pb::PutRequest {
                key: "key".into(),
                value: number.to_string().into(),
                ..pb::PutRequest::default()
            };
            kv.put(put).await.unwrap();
        }
        let old = pb::RangeRequest {
            key: "key".into(),
            revision: 150,
            ..pb::RangeRequest::default()
        };
        let limit = Instant::now() + Duration::from_mins(1);
        loop {
            match kv.range(old.clone()).await {
                Ok(_) => assert!(Instant::now() < limit, "nothing is compacted"),
                Err(error) => {
                    assert!(error.message().contains("has been compacted"), "{error:?}");
                    break;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    // What is to be kept is there.
    let kept = pb::RangeRequest {
        key: "key".into(),
        revision: 250,
        ..pb::RangeRequest::default()
    };
    let mut kv = KvClient::new(by_revisions.connect(0).await);
    kv.range(kept).await.unwrap();
}
