//! etcd's own client, unchanged.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::v3electionpb::election_client::ElectionClient;
use keelson_etcd_api::v3electionpb::{
    CampaignRequest, LeaderRequest, ProclaimRequest, ResignRequest,
};
use keelson_etcd_api::v3lockpb::lock_client::LockClient;
use keelson_etcd_api::v3lockpb::{LockRequest, UnlockRequest};
use keelson_state_tests::{Cluster, Program, etcdctl};
use pb::lease_client::LeaseClient;

/// A backup that `etcdctl` takes is checked and restored, with everything in it.
#[tokio::test]
async fn a_backup_is_restored() {
    let mut cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    for number in 0..20 {
        run(
            &cluster,
            &["put", &format!("key{number}"), &"v".repeat(1000)],
        );
    }
    run(&cluster, &["del", "key3"]);
    let lease = run(&cluster, &["lease", "grant", "10000"]);
    let lease = lease.split_whitespace().nth(1).unwrap();
    run(&cluster, &["put", "--lease", lease, "leased", "v"]);
    let backup = cluster.folder().join("backup");
    let path = backup.to_str().unwrap();
    let said = run(&cluster, &["snapshot", "save", path]);
    assert!(said.contains("Snapshot saved"), "{said}");
    run(&cluster, &["put", "after", "the backup"]);

    let status = keelson(&["snapshot", "status", path, "-o", "json"]);
    assert!(status.contains("\"revision\":23"), "{status}");
    let keys = ["get", "--prefix", "", "--keys-only"];
    let before = run(&cluster, &keys);

    cluster.kill(0);
    std::fs::remove_dir_all(cluster.data(0)).unwrap();
    let data = cluster.data(0);
    keelson(&[
        "snapshot",
        "restore",
        path,
        "--name",
        "m0",
        "--data-dir",
        data.to_str().unwrap(),
        "--initial-advertise-peer-urls",
        cluster.peer_url(0),
        "--bump-revision",
        "1000",
        "--mark-compacted",
    ]);
    cluster.run(0);
    cluster.wait_for(0).await;
    assert_eq!(run(&cluster, &keys), before.replace("after\n\n", ""));
    let put = run(&cluster, &["put", "next", "v", "-w", "json"]);
    assert!(put.contains("\"revision\":1024"), "{put}");
    let old = output(&cluster, &["get", "key1", "--rev", "10"]);
    assert!(
        String::from_utf8_lossy(&old.stderr).contains("required revision has been compacted"),
        "{old:?}"
    );
    let keys = run(&cluster, &["lease", "timetolive", lease, "--keys"]);
    assert!(keys.contains("attached keys([leased])"), "{keys}");

    // A damaged one is refused, wherever it is damaged.
    let mut bytes = std::fs::read(&backup).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&backup, &bytes).unwrap();
    let refusal = Command::new(Program::KeelsonState.path())
        .args(["snapshot", "status", path])
        .output()
        .unwrap();
    assert!(!refusal.status.success(), "{refusal:?}");
}

#[tokio::test]
async fn the_members_are_listed() {
    let cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    let endpoints: Vec<&str> = (0..3).map(|at| cluster.client_url(at)).collect();
    let endpoints = endpoints.join(",");
    let list = run(&cluster, &["member", "list"]);
    assert_eq!(list.matches("started").count(), 3, "{list}");
    let status = run(&cluster, &["endpoint", "status", "--endpoints", &endpoints]);
    assert_eq!(status.lines().count(), 3, "{status}");
    let health = output(&cluster, &["endpoint", "health", "--endpoints", &endpoints]);
    assert!(health.status.success(), "{health:?}");
    let hashes = run(&cluster, &["endpoint", "hashkv", "--endpoints", &endpoints]);
    assert_eq!(hashes.lines().count(), 3, "{hashes}");
}

fn output(cluster: &Cluster, arguments: &[&str]) -> Output {
    Command::new(etcdctl())
        .env("ETCDCTL_API", "3")
        .args(arguments)
        .args(if arguments.contains(&"--endpoints") {
            Vec::new()
        } else {
            vec!["--endpoints", cluster.client_url(0)]
        })
        .output()
        .unwrap_or_else(|error| panic!("run etcdctl: {error}: `./test` fetches it"))
}

/// What etcdctl says; it must succeed.
fn run(cluster: &Cluster, arguments: &[&str]) -> String {
    check(&output(cluster, arguments), "etcdctl", arguments)
}

fn keelson(arguments: &[&str]) -> String {
    let output = Command::new(Program::KeelsonState.path())
        .args(arguments)
        .output()
        .unwrap();
    check(&output, "keelson-state", arguments)
}

fn check(output: &Output, program: impl AsRef<Path>, arguments: &[&str]) -> String {
    assert!(
        output.status.success(),
        "{} {arguments:?}: {}{}",
        program.as_ref().display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Locks wait for each other, whether the server or the client makes them, and elections too.
#[tokio::test]
async fn locks_and_elections() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let folder = cluster.folder().join("order");
    std::fs::create_dir(&folder).unwrap();
    let script = format!(
        "mkdir {0}/held || exit 1; sleep 0.3; rmdir {0}/held",
        folder.display()
    );
    let mut lockers: Vec<_> = (0..3)
        .map(|_| {
            Command::new(etcdctl())
                .args(["--endpoints", cluster.client_url(0), "lock", "door", "--"])
                .args(["sh", "-c", &script])
                .spawn()
                .unwrap()
        })
        .collect();
    for locker in &mut lockers {
        assert!(locker.wait().unwrap().success());
    }

    let channel = cluster.connect(0).await;
    let mut lock = LockClient::new(channel.clone());
    let mut lease = LeaseClient::new(channel.clone());
    for id in [1, 2] {
        let grant = pb::LeaseGrantRequest { ttl: 100, id };
        lease.lease_grant(grant).await.unwrap();
    }
    let request = |lease| LockRequest {
        name: "door".into(),
        lease,
    };
    let first = lock.lock(request(1)).await.unwrap().into_inner().key;
    assert_eq!(first, "door/1");
    let mut second = LockClient::new(channel.clone());
    let waiting = tokio::spawn(async move { second.lock(request(2)).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished(), "two hold one lock");
    // Who waits no longer does not stand in the way.
    let mut third = LockClient::new(channel.clone());
    let gave_up = tokio::time::timeout(Duration::from_millis(200), third.lock(request(0))).await;
    assert!(gave_up.is_err());
    lock.unlock(UnlockRequest { key: first }).await.unwrap();
    let second = waiting.await.unwrap().unwrap().into_inner().key;
    lock.unlock(UnlockRequest { key: second }).await.unwrap();
    let again = tokio::time::timeout(Duration::from_secs(10), lock.lock(request(1))).await;
    again.expect("the one that gave up holds the lock").unwrap();
    let missing = lock.lock(request(77)).await.unwrap_err();
    assert_eq!(missing.message(), "etcdserver: requested lease not found");

    let mut election = ElectionClient::new(channel.clone());
    let nobody = LeaderRequest {
        name: "chair".into(),
    };
    let none = election.leader(nobody.clone()).await.unwrap_err();
    assert_eq!(none.message(), "election: no leader");
    let mut observed = election.observe(nobody.clone()).await.unwrap().into_inner();
    let campaign = CampaignRequest {
        name: "chair".into(),
        lease: 1,
        value: "one".into(),
    };
    let won = election.campaign(campaign).await.unwrap().into_inner();
    let leader = won.leader.unwrap();
    let seen = observed.message().await.unwrap().unwrap();
    assert_eq!(seen.kv.unwrap().value, "one");
    let proclaim = ProclaimRequest {
        leader: Some(leader.clone()),
        value: "two".into(),
    };
    election.proclaim(proclaim.clone()).await.unwrap();
    let seen = observed.message().await.unwrap().unwrap();
    assert_eq!(seen.kv.unwrap().value, "two");
    let resign = ResignRequest {
        leader: Some(leader),
    };
    election.resign(resign).await.unwrap();
    let gone = election.proclaim(proclaim).await.unwrap_err();
    assert_eq!(gone.message(), "election: not leader");
}

/// Transactions and watches, as etcd's client writes and prints them.
#[tokio::test]
async fn transactions_and_watches() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    run(&cluster, &["put", "key", "one"]);
    let mut txn = Command::new(etcdctl())
        .args(["--endpoints", cluster.client_url(0), "txn"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = txn.stdin.take().unwrap();
    input
        .write_all(b"value(\"key\") = \"one\"\n\nput key two\n\nget key\n\n")
        .unwrap();
    drop(input);
    let said = txn.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&said.stdout), "SUCCESS\n\nOK\n");
    run(&cluster, &["del", "key"]);

    let mut watch = Command::new(etcdctl())
        .args(["--endpoints", cluster.client_url(0), "watch", "key"])
        .args(["--rev", "2", "--prev-kv"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let lines: Vec<String> = lines.take(13).map(Result::unwrap).collect();
    watch.kill().unwrap();
    watch.wait().unwrap();
    let told = lines.join("|");
    assert_eq!(told, "PUT|key|one|PUT|key|one|key|two|DELETE|key|two|key|");
}

/// What etcd's dashboards ask for is there, under its names.
#[tokio::test]
async fn metrics_have_etcds_names() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    run(&cluster, &["put", "key", "value"]);
    run(&cluster, &["put", "key", "value"]);
    let fetched = Command::new("curl")
        .args(["-sf", &format!("{}/metrics", cluster.client_url(0))])
        .output()
        .unwrap();
    let page = check(&fetched, "curl", &["/metrics"]);
    for line in [
        "etcd_server_has_leader 1",
        "etcd_server_leader_changes_seen_total 1",
        "etcd_server_proposals_pending 0",
        "etcd_server_proposals_failed_total 0",
        "etcd_debugging_mvcc_current_revision 3",
        "grpc_server_started_total{grpc_method=\"Put\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"} 2",
        "grpc_server_handled_total{grpc_code=\"OK\",grpc_method=\"Put\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"} 2",
    ] {
        assert!(page.lines().any(|other| other == line), "{line}:\n{page}");
    }
    for name in [
        "etcd_disk_wal_fsync_duration_seconds_bucket",
        "etcd_disk_backend_commit_duration_seconds_bucket",
        "etcd_mvcc_db_total_size_in_bytes",
        "process_resident_memory_bytes",
    ] {
        assert!(page.contains(name), "{name}:\n{page}");
    }
}

/// Users with etcd's own commands: who may do what, and what root alone may.
#[tokio::test]
async fn users_and_roles() {
    let cluster = Cluster::start(Program::KeelsonState, 1, &["--bcrypt-cost", "4"]).await;
    run(&cluster, &["user", "add", "root:secret"]);
    run(&cluster, &["role", "add", "reader"]);
    run(
        &cluster,
        &[
            "role",
            "grant-permission",
            "reader",
            "read",
            "--prefix=true",
            "a/",
        ],
    );
    run(&cluster, &["user", "add", "anne:1234"]);
    run(&cluster, &["user", "grant-role", "anne", "reader"]);
    run(&cluster, &["user", "grant-role", "root", "root"]);
    run(&cluster, &["put", "a/key", "v"]);
    run(&cluster, &["auth", "enable"]);
    let denied = output(&cluster, &["get", "a/key"]);
    assert!(!denied.status.success());
    let read = run(&cluster, &["--user", "anne:1234", "get", "--prefix", "a/"]);
    assert_eq!(read, "a/key\nv\n");
    for forbidden in [["put", "a/key", "x"], ["get", "--prefix", "b"]] {
        let arguments = [&["--user", "anne:1234"], &forbidden[..]].concat();
        let denied = output(&cluster, &arguments);
        let text = String::from_utf8_lossy(&denied.stderr).into_owned();
        assert!(text.contains("permission denied"), "{text}");
    }
    let wrong = output(&cluster, &["--user", "anne:4321", "get", "a/key"]);
    let text = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(text.contains("invalid user ID or password"), "{text}");
    let list = run(&cluster, &["--user", "root:secret", "user", "list"]);
    assert_eq!(list, "anne\nroot\n");
    run(&cluster, &["--user", "root:secret", "auth", "disable"]);
    run(&cluster, &["get", "a/key"]);
}
