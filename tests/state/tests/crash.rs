//! Members that are killed: what was acknowledged is there afterwards.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program};
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// Writers at once.
const WRITERS: u64 = 8;
/// How long they write; members are killed in the middle.
const WRITING: Duration = Duration::from_millis(600);

#[tokio::test]
async fn one_member_loses_nothing() {
    let mut cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let mut acknowledged = Vec::new();
    for round in 0..5 {
        let end = Instant::now() + WRITING;
        let writers = write(&cluster.connect(0).await, round, end);
        tokio::time::sleep(WRITING / 2).await;
        cluster.kill(0);
        acknowledged.extend(ends(writers).await);
        cluster.run(0);
        cluster.wait_for(0).await;
        check(&cluster, 0, &acknowledged).await;
    }
}

#[tokio::test]
async fn three_members_go_on_without_one() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    let mut acknowledged = Vec::new();
    for round in 0..4 {
        let leader = leader(&cluster).await;
        let other = (leader + 1) % 3;
        let end = Instant::now() + WRITING;
        let writers = write(&cluster.connect(other).await, round, end);
        tokio::time::sleep(WRITING / 2).await;
        cluster.kill(leader);
        acknowledged.extend(ends(writers).await);
        cluster.wait_for(other).await;
        check(&cluster, other, &acknowledged).await;
        cluster.run(leader);
        cluster.wait_for(leader).await;
        // It has caught up with what it missed.
        check(&cluster, leader, &acknowledged).await;
    }
    let mut hashes = Vec::new();
    for at in 0..3 {
        cluster.wait_for(at).await;
        hashes.push(cluster.hash(at).await);
    }
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:x?}");
}

/// A second process on a folder is refused, and the first one is not harmed.
#[tokio::test]
async fn a_folder_has_one_member() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let output = std::process::Command::new(Program::KeelsonState.path())
        .args([
            "--name",
            "m0",
            "--listen-client-urls",
            "http://127.0.0.1:1",
            "--data-dir",
        ])
        .arg(cluster.data(0))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && text.contains("is in use by another process"),
        "{text}"
    );
    cluster.wait_for(0).await;
}

/// Writes numbers under keys of their own until the server is gone, or until `end`; the last key and number that was
/// acknowledged to each writer.
fn write(channel: &Channel, round: u64, end: Instant) -> Vec<JoinHandle<Option<(String, u64)>>> {
    let writer = |writer: u64| {
        let mut kv = KvClient::new(channel.clone());
        tokio::spawn(async move {
            let mut last = None;
            for number in 1.. {
                if Instant::now() >= end {
                    break;
                }
                let key = format!("round{round}-writer{writer}");
                let put = pb::PutRequest {
                    key: key.clone().into(),
                    value: number.to_string().into(),
                    ..pb::PutRequest::default()
                };
                let answer = tokio::time::timeout(Duration::from_secs(2), kv.put(put)).await;
                if !matches!(answer, Ok(Ok(_))) {
                    break;
                }
                last = Some((key, number));
            }
            last
        })
    };
    (0..WRITERS).map(writer).collect()
}

async fn ends(writers: Vec<JoinHandle<Option<(String, u64)>>>) -> Vec<(String, u64)> {
    let mut ends = Vec::new();
    for writer in writers {
        ends.extend(writer.await.unwrap());
    }
    assert!(
        !ends.is_empty(),
        "nothing was written before the member was killed"
    );
    ends
}

async fn check(cluster: &Cluster, at: usize, acknowledged: &[(String, u64)]) {
    let mut kv = KvClient::new(cluster.connect(at).await);
    for (key, number) in acknowledged {
        let request = pb::RangeRequest {
            key: key.clone().into(),
            ..pb::RangeRequest::default()
        };
        let answer = kv.range(request).await.unwrap().into_inner();
        let value = String::from_utf8(answer.kvs[0].value.to_vec()).unwrap();
        let found: u64 = value.parse().unwrap();
        // The write after the last acknowledged one may have happened, too.
        assert!(
            found == *number || found == number + 1,
            "{key}: {number} was acknowledged, {found} is there"
        );
    }
}

/// The member that leads.
async fn leader(cluster: &Cluster) -> usize {
    for _ in 0..100 {
        for at in 0..3 {
            let mut client = MaintenanceClient::new(cluster.connect(at).await);
            let status = client
                .status(pb::StatusRequest {})
                .await
                .unwrap()
                .into_inner();
            if status.leader == status.header.unwrap().member_id {
                return at;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("there is no leader");
}
