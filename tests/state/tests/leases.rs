//! Leases while leaders change: they end when their time is over, not before and not much later.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program};
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use tonic::Status;

/// Seconds of a lease that ends by itself only if something is wrong.
const LONG: i64 = 600;

/// What a lease has left, it has left when its leader is gone, also when the next leader was
/// restarted meanwhile.
#[tokio::test]
async fn a_lease_goes_on_where_it_was() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    let leader = cluster.leader().await;
    let begin = Instant::now();
    grant(&cluster, leader, 7, 60).await.unwrap();
    let granted = Instant::now();
    // As long as a lease of 60 s is between two checkpoints, and one second.
    tokio::time::sleep(Duration::from_secs(16)).await;
    let other = (leader + 1) % 3;
    cluster.kill(other);
    cluster.run(other);
    cluster.wait_for(other).await;
    cluster.kill((leader + 2) % 3);
    cluster.run((leader + 2) % 3);
    cluster.wait_for((leader + 2) % 3).await;
    let asked = granted.elapsed();
    cluster.kill(leader);
    cluster.wait_for(other).await;
    let left = time_left(&cluster, other, 7).await;
    let most = 60 - i64::try_from(asked.as_secs()).unwrap() + 8;
    assert!(left < most.min(50), "{left} s left after {asked:?}");
    let least = 60 - i64::try_from(begin.elapsed().as_secs()).unwrap() - 2;
    assert!(left >= least, "{left} s left after {:?}", begin.elapsed());
}

/// A client that keeps its lease alive never loses it, however often leaders change.
#[tokio::test]
async fn a_lease_that_is_kept_alive_stays() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    grant(&cluster, 0, 7, 20).await.unwrap();
    let put = pb::PutRequest {
        key: "key".into(),
        lease: 7,
        ..pb::PutRequest::default()
    };
    let mut kv = KvClient::new(cluster.connect(0).await);
    kv.put(put).await.unwrap();
    let mut renewed = Instant::now();
    for round in 0..6 {
        let leader = cluster.leader().await;
        cluster.kill(leader);
        let other = (leader + 1) % 3;
        loop {
            let sent = Instant::now();
            match keep_alive(&cluster, other, 7).await {
                Ok(ttl) => {
                    assert_eq!(
                        ttl,
                        20,
                        "round {round}, {:?} after it was renewed",
                        renewed.elapsed()
                    );
                    renewed = sent;
                    break;
                }
                Err(error) => {
                    let since = renewed.elapsed();
                    assert!(since < Duration::from_secs(19), "{error:?} for {since:?}");
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        cluster.run(leader);
        cluster.wait_for(leader).await;
    }
    let mut kv = KvClient::new(cluster.connect(0).await);
    let get = pb::RangeRequest {
        key: "key".into(),
        ..pb::RangeRequest::default()
    };
    assert_eq!(kv.range(get).await.unwrap().into_inner().count, 1);
}

/// A lease that is granted under an old id is another one; what ended is not ended again and again.
#[tokio::test]
async fn an_id_that_is_used_again() {
    let cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    for id in 1..20 {
        // Some end by themselves, about when they are revoked.
        grant(&cluster, 0, id, 2).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(1900)).await;
    for id in 1..20 {
        let at = usize::try_from(id % 3).unwrap();
        let _ = revoke(&cluster, at, id).await;
        grant(&cluster, at, id, LONG).await.unwrap();
    }
    grant(&cluster, 1, 99, 2).await.unwrap();
    let limit = Instant::now() + Duration::from_mins(1);
    while time_left(&cluster, 0, 99).await >= 0 {
        assert!(Instant::now() < limit, "a lease of 2 s does not end");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let before = applied(&cluster).await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!(
        applied(&cluster).await,
        before,
        "something is proposed for ever"
    );
    for id in 1..20 {
        let left = time_left(&cluster, 0, id).await;
        assert!(left > LONG / 2, "lease {id} has {left} s left");
    }
}

/// A leader that was held up does not acknowledge what another one has ended, and ends nothing.
#[tokio::test]
async fn a_leader_that_was_held_up() {
    let cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    let leader = cluster.leader().await;
    grant(&cluster, leader, 7, LONG).await.unwrap();
    grant(&cluster, leader, 8, 10).await.unwrap();
    let mut client = LeaseClient::new(cluster.connect(leader).await);
    assert_eq!(keep_alive_with(&mut client, 7).await.unwrap(), LONG);
    cluster.signal(leader, "STOP");
    let other = (leader + 1) % 3;
    cluster.wait_for(other).await;
    revoke(&cluster, other, 7).await.unwrap();
    let asking = tokio::spawn(async move { keep_alive_with(&mut client, 7).await });
    let kept = Instant::now();
    while kept.elapsed() < Duration::from_secs(11) {
        assert_eq!(keep_alive(&cluster, other, 8).await.unwrap(), 10);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    cluster.signal(leader, "CONT");
    let answer = asking.await.unwrap();
    assert!(!matches!(answer, Ok(1..)), "{answer:?}");
    cluster.wait_for(leader).await;
    assert!(time_left(&cluster, other, 8).await > 0);
}

async fn grant(cluster: &Cluster, at: usize, id: i64, ttl: i64) -> Result<(), Status> {
    let mut client = LeaseClient::new(cluster.connect(at).await);
    let request = pb::LeaseGrantRequest { ttl, id };
    client.lease_grant(request).await?;
    Ok(())
}

async fn revoke(cluster: &Cluster, at: usize, id: i64) -> Result<(), Status> {
    let mut client = LeaseClient::new(cluster.connect(at).await);
    client.lease_revoke(pb::LeaseRevokeRequest { id }).await?;
    Ok(())
}

async fn keep_alive(cluster: &Cluster, at: usize, id: i64) -> Result<i64, Status> {
    let mut client = LeaseClient::new(cluster.connect(at).await);
    keep_alive_with(&mut client, id).await
}

async fn keep_alive_with(
    client: &mut LeaseClient<tonic::transport::Channel>,
    id: i64,
) -> Result<i64, Status> {
    let requests = tokio_stream::once(pb::LeaseKeepAliveRequest { id });
    let mut answers = client.lease_keep_alive(requests).await?.into_inner();
    Ok(answers.message().await?.map_or(0, |answer| answer.ttl))
}

/// Seconds; -1 if the lease is gone.
async fn time_left(cluster: &Cluster, at: usize, id: i64) -> i64 {
    let mut client = LeaseClient::new(cluster.connect(at).await);
    let request = pb::LeaseTimeToLiveRequest { id, keys: false };
    let limit = Instant::now() + Duration::from_secs(30);
    loop {
        match client.lease_time_to_live(request).await {
            Ok(answer) => return answer.into_inner().ttl,
            Err(error) => assert!(Instant::now() < limit, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn applied(cluster: &Cluster) -> u64 {
    let mut client = MaintenanceClient::new(cluster.connect(0).await);
    let status = client.status(pb::StatusRequest {}).await.unwrap();
    status.into_inner().raft_applied_index
}
