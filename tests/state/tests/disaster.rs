//! Members that are gone for good, clusters that are, and damaged backups.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program};
use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;

/// One folder of three is left: everything acknowledged is in the new cluster, and watchers notice.
#[tokio::test]
async fn a_cluster_is_recovered_from_one_folder() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    put(&cluster, 0, 0..500).await;
    let grant = pb::LeaseGrantRequest { ttl: 600, id: 7 };
    LeaseClient::new(cluster.connect(0).await)
        .lease_grant(grant)
        .await
        .unwrap();
    // This member has everything that was acknowledged.
    put(&cluster, 1, 500..600).await;
    let (from, to) = (cluster.data(1), cluster.folder().join("recovered"));
    let url = cluster.peer_url(1).to_owned();
    let arguments = |to: &Path| {
        let mut arguments = vec!["recover".into(), from.clone().into_os_string()];
        arguments.extend(["--name", "m1", "--data-dir"].map(Into::into));
        arguments.push(to.as_os_str().to_owned());
        arguments.extend(["--initial-advertise-peer-urls".into(), (&url).into()]);
        arguments
    };
    let running = keelson(&arguments(&to));
    assert!(
        text(&running).contains("is its member running?"),
        "{running:?}"
    );
    for at in 0..3 {
        cluster.kill(at);
    }
    let occupied = keelson(&arguments(&cluster.data(0)));
    assert!(text(&occupied).contains("is not empty"), "{occupied:?}");
    fs::remove_dir_all(&to).unwrap_or_default();
    // What was broken off is not taken along.
    let left = ["incoming-0000000000000001", "damaged-keyspace.redb"];
    for name in left {
        fs::write(from.join(name), "half of something").unwrap();
    }
    let done = keelson(&arguments(&to));
    assert!(done.status.success(), "{done:?}");
    for name in left {
        assert!(!to.join(name).exists(), "{name}");
    }
    // One that waits to be rebuilt has nothing to begin from.
    let marked = cluster.folder().join("marked");
    fs::create_dir(&marked).unwrap();
    for entry in fs::read_dir(cluster.data(0)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, marked.join(path.file_name().unwrap())).unwrap();
    }
    fs::write(marked.join("damaged"), "it fell").unwrap();
    let mut of_marked = arguments(&cluster.folder().join("never"));
    of_marked[1] = marked.into_os_string();
    let refused = keelson(&of_marked);
    assert!(text(&refused).contains("(it fell)"), "{refused:?}");

    fs::rename(&from, cluster.folder().join("old")).unwrap();
    fs::rename(&to, cluster.data(1)).unwrap();
    cluster.run(1);
    cluster.wait_for(1).await;
    check(&cluster, 1, 600).await;
    let members = members(&cluster, 1).await;
    assert_eq!(members.len(), 1, "{members:?}");
    let mut leases = LeaseClient::new(cluster.connect(1).await);
    let request = pb::LeaseTimeToLiveRequest { id: 7, keys: false };
    assert!(
        leases
            .lease_time_to_live(request)
            .await
            .unwrap()
            .into_inner()
            .ttl
            > 0
    );
    // Who watched before has missed something, and is told.
    let create = pb::WatchCreateRequest {
        key: "key".into(),
        start_revision: 400,
        ..pb::WatchCreateRequest::default()
    };
    let request = pb::WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(create)),
    };
    let requests = futures::StreamExt::chain(tokio_stream::once(request), tokio_stream::pending());
    let mut watch = WatchClient::new(cluster.connect(1).await)
        .watch(requests)
        .await
        .unwrap()
        .into_inner();
    while let Some(response) = watch.message().await.unwrap() {
        if response.canceled {
            assert!(response.compact_revision > 1_000_000_000, "{response:?}");
            break;
        }
    }
    // It goes on, and after a restart.
    put(&cluster, 1, 600..610).await;
    cluster.kill(1);
    cluster.run(1);
    cluster.wait_for(1).await;
    check(&cluster, 1, 610).await;
}

/// A dead member is replaced by one command; nobody else can be by mistake.
#[tokio::test]
async fn a_dead_member_is_replaced() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    put(&cluster, 0, 0..100).await;
    until_described(&cluster, 0, 3).await;
    cluster.kill(2);
    cluster.wait_for(0).await;
    let (new, _) = cluster.make_room();
    for (wrong, told) in [("m1", "is there"), ("m9", "has not exactly one member")] {
        // The leader may still think so of who is gone, and notices within an election timeout.
        cluster.run_as(new, &["--replace", wrong]);
        let log = cluster.end_of(new).await;
        assert!(log.contains(told), "{log}");
        fs::remove_dir_all(cluster.data(new)).unwrap();
    }
    replace(&mut cluster, new, "m2").await;
    assert_eq!(until_described(&cluster, 0, 3).await, ["m0", "m1", "m3"]);
    check(&cluster, new, 100).await;
    // It has a vote.
    cluster.kill(1);
    cluster.wait_for(new).await;
    put(&cluster, new, 100..110).await;
    cluster.run(1);
    cluster.wait_for(1).await;

    // The same host with a new disk, under its old name.
    cluster.kill(1);
    fs::remove_dir_all(cluster.data(1)).unwrap();
    cluster.wait_for(0).await;
    replace(&mut cluster, 1, "m1").await;
    assert_eq!(until_described(&cluster, 0, 3).await, ["m0", "m1", "m3"]);
    check(&cluster, 1, 110).await;
    // The flag stays in its unit file.
    cluster.kill(1);
    cluster.run_as(1, &["--replace", "m1"]);
    cluster.wait_for(1).await;
    check(&cluster, 1, 110).await;
}

/// A byte that is flipped anywhere in a backup, or a cut anywhere, is found.
#[tokio::test]
async fn a_damaged_backup_is_refused() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    put(&cluster, 0, 0..300).await;
    let grant = pb::LeaseGrantRequest { ttl: 600, id: 7 };
    LeaseClient::new(cluster.connect(0).await)
        .lease_grant(grant)
        .await
        .unwrap();
    let mut client = MaintenanceClient::new(cluster.connect(0).await);
    let mut stream = client
        .snapshot(pb::SnapshotRequest {})
        .await
        .unwrap()
        .into_inner();
    let mut backup = Vec::new();
    while let Some(part) = stream.message().await.unwrap() {
        backup.extend_from_slice(&part.blob);
    }
    let path = cluster.folder().join("backup");
    let refused = |bytes: &[u8], what: &str| {
        fs::write(&path, bytes).unwrap();
        let status = keelson(&[
            "snapshot".into(),
            "status".into(),
            path.clone().into_os_string(),
        ]);
        assert!(!status.status.success(), "{what}: {status:?}");
        let told = text(&status);
        assert!(
            told.contains("checksum") || told.contains("can't be used"),
            "{what}: {told}"
        );
    };
    let length = backup.len();
    let regions = (0..64)
        .step_by(4)
        .chain((64..length - 600).step_by(length / 40));
    // The last records, the end, the padding, the checksum of all.
    let regions: Vec<usize> = regions.chain((length - 600..length).step_by(23)).collect();
    for at in regions {
        let mut damaged = backup.clone();
        damaged[at] ^= 0x10;
        refused(&damaged, &format!("byte {at} of {length} is flipped"));
    }
    for cut in [0, 1, 512, length / 2, length - 33, length - 32, length - 1] {
        refused(&backup[..cut], &format!("{cut} of {length} bytes"));
    }
    fs::write(&path, &backup).unwrap();
    let whole = keelson(&["snapshot".into(), "status".into(), path.into_os_string()]);
    assert!(whole.status.success(), "{whole:?}");
}

/// Runs a new member in the place of one that is gone, until the cluster believes that it is.
async fn replace(cluster: &mut Cluster, new: usize, gone: &str) {
    let limit = Instant::now() + Duration::from_mins(1);
    loop {
        cluster.run_as(new, &["--replace", gone]);
        tokio::time::sleep(Duration::from_secs(2)).await;
        if fs::exists(cluster.data(new).join("identity")).unwrap() {
            break;
        }
        assert!(Instant::now() < limit, "{}", cluster.log_of(new));
        cluster.kill(new);
    }
    cluster.wait_for(new).await;
}

async fn put(cluster: &Cluster, at: usize, numbers: std::ops::Range<usize>) {
    let mut kv = KvClient::new(cluster.connect(at).await);
    for number in numbers {
        let put = pb::PutRequest {
            key: format!("key-{number}").into(),
            value: number.to_string().into(),
            ..pb::PutRequest::default()
        };
        kv.put(put).await.unwrap();
    }
}

async fn check(cluster: &Cluster, at: usize, count: usize) {
    let mut kv = KvClient::new(cluster.connect(at).await);
    let all = pb::RangeRequest {
        key: "key-".into(),
        range_end: "key.".into(),
        ..pb::RangeRequest::default()
    };
    let answer = kv.range(all).await.unwrap().into_inner();
    assert_eq!(answer.kvs.len(), count);
    for kv in answer.kvs {
        let key = String::from_utf8(kv.key.to_vec()).unwrap();
        assert_eq!(kv.value, key.trim_start_matches("key-"), "{key}");
    }
}

async fn members(cluster: &Cluster, at: usize) -> Vec<pb::Member> {
    let mut client = ClusterClient::new(cluster.connect(at).await);
    let request = pb::MemberListRequest { linearizable: true };
    client
        .member_list(request)
        .await
        .unwrap()
        .into_inner()
        .members
}

/// Waits until there are as many voters that have said their names; the names.
async fn until_described(cluster: &Cluster, at: usize, count: usize) -> Vec<String> {
    let limit = Instant::now() + Duration::from_mins(1);
    loop {
        let members = members(cluster, at).await;
        let ready = members
            .iter()
            .filter(|member| !member.is_learner && !member.name.is_empty());
        if members.len() == count && ready.count() == count {
            let mut names: Vec<_> = members.into_iter().map(|member| member.name).collect();
            names.sort();
            return names;
        }
        assert!(Instant::now() < limit, "{members:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn keelson(arguments: &[std::ffi::OsString]) -> Output {
    Command::new(Program::KeelsonState.path())
        .args(arguments)
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
