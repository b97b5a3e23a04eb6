//! etcd's own client, unchanged.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::path::Path;
use std::process::{Command, Output};

use keelson_state_tests::{Cluster, Program, etcdctl};

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
