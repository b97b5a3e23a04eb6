//! Members that come, lag and go.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program};
use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// More than one flush of the keyspace, and more entries than are kept for followers.
const MANY: usize = 14_000;
const LARGE: usize = 2048;

/// A member that missed more than the log has is sent a snapshot.
#[tokio::test]
async fn a_member_far_behind_catches_up() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    put(&cluster, 0, "early", 100).await;
    cluster.kill(2);
    // If it led, what is sent before there is another leader may be lost on its way.
    cluster.wait_for(0).await;
    put(&cluster, 0, "late", MANY).await;
    // A backup flushes the keyspace, and the log gives up what is flushed.
    for at in [0, 1] {
        let mut client = MaintenanceClient::new(cluster.connect(at).await);
        let backup = client.snapshot(pb::SnapshotRequest {}).await.unwrap();
        let mut parts = backup.into_inner();
        while parts.message().await.unwrap().is_some() {}
    }
    cluster.run(2);
    cluster.wait_for(2).await;
    same_hashes(&cluster, &[0, 1, 2]).await;
    assert!(
        cluster.log_of(2).contains("installed a snapshot"),
        "{}",
        cluster.log_of(2)
    );
    // And it goes on from there, also after it was killed.
    put(&cluster, 2, "after", 100).await;
    cluster.kill(2);
    cluster.run(2);
    cluster.wait_for(2).await;
    same_hashes(&cluster, &[0, 1, 2]).await;
}

/// A learner joins a cluster that has forgotten its first entries, is promoted, and carries the
/// cluster when another member is gone for good.
#[tokio::test]
async fn a_learner_becomes_a_voter() {
    let mut cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    put(&cluster, 0, "before", MANY).await;
    let (new, url) = cluster.make_room();
    let added = add(&cluster, &url, true).await.unwrap();
    let id = added.member.unwrap().id;
    let another = add(&cluster, "http://127.0.0.9:1", true).await.unwrap_err();
    assert_eq!(
        another.message(),
        "etcdserver: too many learner members in cluster"
    );

    cluster.join(new);
    promote(&cluster, id).await;
    cluster.wait_for(new).await;
    put(&cluster, new, "through-the-new-one", 100).await;
    same_hashes(&cluster, &[0, new]).await;

    // It is restarted without the flag that it joined with.
    cluster.kill(new);
    cluster.run(new);
    cluster.wait_for(new).await;
    same_hashes(&cluster, &[0, new]).await;
}

/// What a learner refuses, with etcd's words.
#[tokio::test]
async fn a_learner_serves_only_stale_reads() {
    let mut cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    put(&cluster, 0, "key", 1).await;
    let (new, url) = cluster.make_room();
    let id = add(&cluster, &url, true).await.unwrap().member.unwrap().id;
    cluster.join(new);
    let limit = Instant::now() + Duration::from_mins(2);
    let stale = pb::RangeRequest {
        key: "key-0".into(),
        serializable: true,
        ..pb::RangeRequest::default()
    };
    loop {
        let channel = tonic::transport::Endpoint::from_shared(cluster.client_url(new).to_owned())
            .unwrap()
            .connect()
            .await;
        if let Ok(channel) = channel {
            let found = KvClient::new(channel).range(stale.clone()).await;
            if found.is_ok_and(|found| found.into_inner().count == 1) {
                break;
            }
        }
        assert!(Instant::now() < limit, "{}", cluster.log_of(new));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut maintenance = MaintenanceClient::new(cluster.connect(new).await);
    while !is_learner(&mut maintenance).await {
        // It has what it was sent, and is about to know what it is.
        assert!(Instant::now() < limit, "{}", cluster.log_of(new));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut learner = KvClient::new(cluster.connect(new).await);
    let fresh = pb::RangeRequest {
        serializable: false,
        ..stale
    };
    for refusal in [
        learner.range(fresh).await.unwrap_err(),
        learner.put(pair("key", 0, 1)).await.unwrap_err(),
    ] {
        assert_eq!(
            refusal.message(),
            "etcdserver: rpc not supported for learner"
        );
        assert_eq!(refusal.code(), Code::Unavailable);
    }
    promote(&cluster, id).await;
    cluster.wait_for(new).await;
}

/// A removed member ends, and says why, also when it was down and comes back.
#[tokio::test]
async fn a_removed_member_ends() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    let ids = member_ids(&cluster).await;
    remove(&cluster, 0, ids[1]).await.unwrap();
    let log = cluster.end_of(1).await;
    assert!(log.contains("this member was removed"), "{log}");

    // Two are left, of which one may be down when it is removed only if the other one can go on.
    cluster.kill(2);
    let refusal = remove(&cluster, 0, ids[0]).await.unwrap_err();
    assert!(
        refusal.message().contains("etcdserver:"),
        "{}",
        refusal.message()
    );
    cluster.run(2);
    cluster.wait_for(2).await;
    cluster.wait_for(0).await;
    put(&cluster, 2, "goes-on", 10).await;

    cluster.run(1);
    let log = cluster.end_of(1).await;
    assert_eq!(log.matches("this member was removed").count(), 2, "{log}");
}

/// A member that lost its data is rebuilt from the others; what it promised is not forgotten, for the
/// others commit that it comes back before it does.
#[tokio::test]
async fn a_member_without_its_data_is_rebuilt() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    put(&cluster, 0, "key", 10).await;
    for join in [true, false] {
        cluster.kill(1);
        std::fs::remove_dir_all(cluster.data(1)).unwrap();
        if join {
            cluster.join(1);
        } else {
            // As a founder: it must not found the cluster anew.
            cluster.run(1);
        }
        cluster.wait_for(1).await;
        assert!(cluster.log_of(1).contains("this member is whole again"));
        same_hashes(&cluster, &[0, 1, 2]).await;
    }
    // It counts again.
    cluster.kill(0);
    cluster.wait_for(1).await;
    put(&cluster, 1, "goes-on", 10).await;
}

/// A member that was added and never started has to start before another one is added.
#[tokio::test]
async fn members_are_added_one_after_the_other() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    let ids = member_ids(&cluster).await;
    cluster.kill(1);
    remove(&cluster, 0, ids[1]).await.unwrap();
    let url = cluster.peer_url(1).to_owned();
    add(&cluster, &url, false).await.unwrap();
    let refusal = add(&cluster, "http://127.0.0.9:1", false)
        .await
        .unwrap_err();
    assert_eq!(
        refusal.message(),
        "etcdserver: re-configuration failed due to not enough started members"
    );
    std::fs::remove_dir_all(cluster.data(1)).unwrap();
    cluster.join(1);
    cluster.wait_for(1).await;
    same_hashes(&cluster, &[0, 1, 2]).await;
}

/// Missing files are a clear error, never an empty member.
#[tokio::test]
async fn missing_files_are_told() {
    let mut cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    put(&cluster, 0, "key", 10).await;
    for (missing, told) in [
        ("keyspace.redb", "keyspace.redb is missing"),
        ("log-", "the log's files are missing"),
    ] {
        cluster.kill(0);
        let mut moved = Vec::new();
        for entry in std::fs::read_dir(cluster.data(0)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name.starts_with(missing) {
                let away = cluster.folder().join(&name);
                std::fs::rename(&path, &away).unwrap();
                moved.push((away, path));
            }
        }
        assert!(!moved.is_empty(), "there is no {missing}");
        cluster.run(0);
        let log = cluster.end_of(0).await;
        assert!(log.contains(told), "{log}");
        for (away, path) in moved {
            std::fs::rename(away, path).unwrap();
        }
        cluster.run(0);
        cluster.wait_for(0).await;
    }
}

async fn is_learner(client: &mut MaintenanceClient<Channel>) -> bool {
    let status = client.status(pb::StatusRequest {}).await.unwrap();
    status.into_inner().is_learner
}

async fn put(cluster: &Cluster, at: usize, prefix: &str, count: usize) {
    let channel = cluster.connect(at).await;
    let writers = (0..64).map(|writer| {
        let mut kv = KvClient::new(channel.clone());
        let prefix = prefix.to_owned();
        tokio::spawn(async move {
            for number in (writer..count).step_by(64) {
                kv.put(pair(&prefix, number, LARGE)).await.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
}

fn pair(prefix: &str, number: usize, length: usize) -> pb::PutRequest {
    pb::PutRequest {
        key: format!("{prefix}-{number}").into(),
        value: vec![b'v'; length].into(),
        ..pb::PutRequest::default()
    }
}

async fn add(cluster: &Cluster, url: &str, learner: bool) -> Result<pb::MemberAddResponse, Status> {
    let request = pb::MemberAddRequest {
        peer_ur_ls: vec![url.to_owned()],
        is_learner: learner,
    };
    let mut client = ClusterClient::new(cluster.connect(0).await);
    Ok(client.member_add(request).await?.into_inner())
}

async fn remove(cluster: &Cluster, at: usize, id: u64) -> Result<(), Status> {
    let mut client = ClusterClient::new(cluster.connect(at).await);
    client.member_remove(pb::MemberRemoveRequest { id }).await?;
    Ok(())
}

/// Promotes a learner as soon as it has caught up.
async fn promote(cluster: &Cluster, id: u64) {
    let limit = Instant::now() + Duration::from_mins(2);
    let mut client = ClusterClient::new(cluster.connect(0).await);
    while let Err(error) = client.member_promote(pb::MemberPromoteRequest { id }).await {
        assert_eq!(
            error.message(),
            "etcdserver: can only promote a learner member which is in sync with leader"
        );
        assert!(Instant::now() < limit, "the learner does not catch up");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Ids in the order of the members' names.
async fn member_ids(cluster: &Cluster) -> Vec<u64> {
    let limit = Instant::now() + Duration::from_mins(2);
    let mut client = ClusterClient::new(cluster.connect(0).await);
    loop {
        let request = pb::MemberListRequest { linearizable: true };
        let mut members = client
            .member_list(request)
            .await
            .unwrap()
            .into_inner()
            .members;
        members.sort_by(|a, b| a.name.cmp(&b.name));
        if members.iter().all(|member| !member.client_ur_ls.is_empty()) {
            return members.into_iter().map(|member| member.id).collect();
        }
        assert!(Instant::now() < limit, "{members:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until members have the same keys at the same revision.
async fn same_hashes(cluster: &Cluster, members: &[usize]) {
    let limit = Instant::now() + Duration::from_mins(2);
    loop {
        let mut hashes = Vec::new();
        for &at in members {
            hashes.push(cluster.hash(at).await);
        }
        if hashes.iter().all(|hash| *hash == hashes[0]) {
            return;
        }
        assert!(Instant::now() < limit, "{hashes:x?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
