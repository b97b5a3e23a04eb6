//! Members that hold something else than the others, though every checksum is right: as after a defect
//! of the program, a fault of memory, a folder that someone edited.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command as Process;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::Limits;
use keelson_member::command::{Command, Operation};
use keelson_member::disk::Folder;
use keelson_member::keyspace::Keyspace;
use keelson_state_tests::{Cluster, Program};
use pb::alarm_request::AlarmAction;
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use tonic::{Code, Status};

/// Machines that run tests are slow.
const PATIENCE: Duration = Duration::from_mins(2);
const KEY: &str = "key";

/// One that differs from most is told by its leader, cut off from clients, and rebuilt.
#[tokio::test]
async fn a_divergent_follower_is_rebuilt() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    put(&cluster, 0, "right").await.unwrap();
    stop_with_everything(&mut cluster).await;
    diverge(&cluster.data(1), "wrong");
    cluster.run(0);
    cluster.run(2);
    cluster.wait_for(0).await;
    cluster.run(1);
    rebuilt(&cluster, 1).await;
}

/// The leader itself may be the one that is wrong: it finds out by comparing, and is rebuilt.
#[tokio::test]
async fn a_divergent_leader_is_rebuilt() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    put(&cluster, 0, "right").await.unwrap();
    stop_with_everything(&mut cluster).await;
    diverge(&cluster.data(1), "wrong");
    // Two that differ can't tell who is right: one of them leads until the third is there.
    cluster.run(0);
    cluster.run(1);
    cluster.wait_for(1).await;
    lead(&cluster, 1).await;
    cluster.run(2);
    let log = rebuilt(&cluster, 1).await;
    assert!(log.contains("a member differs from the others"), "{log}");
}

/// All differ: nobody can tell what is right, so an operator has to. The cluster says so, changes
/// nothing more, and answers no read that is to be relied on; one member's data becomes a new cluster.
#[tokio::test]
async fn members_that_all_differ_raise_an_alarm() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    put(&cluster, 0, "right").await.unwrap();
    stop_with_everything(&mut cluster).await;
    diverge(&cluster.data(1), "wrong");
    diverge(&cluster.data(2), "also wrong");
    for at in 0..3 {
        cluster.run(at);
    }
    let alarm = until_alarm(&cluster, 0).await;
    assert_eq!(alarm, pb::AlarmType::Corrupt);
    let told = |error: Status| {
        assert_eq!(
            (error.code(), error.message()),
            (Code::DataLoss, "etcdserver: corrupt cluster")
        );
    };
    told(put(&cluster, 0, "more").await.unwrap_err());
    told(read(&cluster, 0, false).await.unwrap_err());
    // To look for the odd one.
    let stale = [
        read(&cluster, 0, true).await.unwrap(),
        read(&cluster, 1, true).await.unwrap(),
        read(&cluster, 2, true).await.unwrap(),
    ];
    assert_eq!(stale, ["right", "wrong", "also wrong"]);
    for at in 0..3 {
        cluster.kill(at);
    }
    let recovered = cluster.folder().join("recovered");
    let output = Process::new(Program::KeelsonState.path())
        .arg("recover")
        .arg(cluster.data(0))
        .args(["--name", "m0", "--data-dir"])
        .arg(&recovered)
        .args(["--initial-advertise-peer-urls", cluster.peer_url(0)])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    std::fs::rename(cluster.data(0), cluster.folder().join("old")).unwrap();
    std::fs::rename(recovered, cluster.data(0)).unwrap();
    cluster.run(0);
    cluster.wait_for(0).await;
    assert_eq!(read(&cluster, 0, false).await.unwrap(), "right");
    put(&cluster, 0, "more").await.unwrap();
}

/// Has all members apply and flush everything (a backup does), and kills them.
async fn stop_with_everything(cluster: &mut Cluster) {
    for at in 0..3 {
        cluster.wait_for(at).await;
        let mut client = MaintenanceClient::new(cluster.connect(at).await);
        let parts = client.snapshot(pb::SnapshotRequest {}).await;
        let mut parts = parts.unwrap().into_inner();
        while parts.message().await.unwrap().is_some() {}
    }
    for at in 0..3 {
        cluster.kill(at);
    }
}

/// Changes the key of a member that is not running.
fn diverge(folder: &Path, value: &'static str) {
    let disk = Folder::open(folder).unwrap();
    let keyspace = Keyspace::open(&disk, 1 << 20, None, Limits::default()).unwrap();
    let metadata = keyspace.metadata();
    let mut batch = keyspace.batch();
    let put = pb::PutRequest {
        key: KEY.into(),
        value: value.into(),
        ..pb::PutRequest::default()
    };
    let command = Command {
        operation: Some(Operation::Put(put)),
        ..Command::default()
    };
    batch.apply(command).unwrap().unwrap();
    batch.applied(metadata.applied_index, metadata.applied_term);
    batch.finish();
    let flush = keyspace.begin_flush().unwrap();
    keyspace.flush(flush).unwrap().unwrap();
}

/// Waits until a member was rebuilt because it differs, and holds what the others hold; what it logged.
async fn rebuilt(cluster: &Cluster, at: usize) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = cluster.log_of(at);
        if log.contains("this member is whole again") {
            assert!(log.contains("differs from that of most members"), "{log}");
            break;
        }
        assert!(Instant::now() < deadline, "it is not found:\n{log}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.wait_for(at).await;
    assert_eq!(read(cluster, at, false).await.unwrap(), "right");
    assert_eq!(read(cluster, at, true).await.unwrap(), "right");
    let mut client = MaintenanceClient::new(cluster.connect(at).await);
    let alarms = client.alarm(pb::AlarmRequest::default()).await.unwrap();
    assert!(alarms.into_inner().alarms.is_empty());
    // By the process that started anew.
    for (metric, value) in [
        ("keelson_state_damage_found_total", "1"),
        ("keelson_state_rebuild_duration_seconds_count", "1"),
    ] {
        assert_eq!(metric_of(cluster, at, metric), value, "{metric}");
    }
    let others = (0..3).filter(|other| *other != at);
    let served =
        others.map(|other| metric_of(cluster, other, "keelson_state_rebuilds_served_total"));
    assert!(served.into_iter().any(|count| count == "1"));
    cluster.log_of(at)
}

fn metric_of(cluster: &Cluster, at: usize, name: &str) -> String {
    let address = cluster.client_url(at).trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let mut lines = answer.lines();
    let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found
        .unwrap_or_else(|| panic!("{name} in {answer}"))
        .to_owned()
}

async fn until_alarm(cluster: &Cluster, at: usize) -> pb::AlarmType {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(channel) = cluster.try_connect(at).await {
            let request = pb::AlarmRequest {
                action: AlarmAction::Get.into(),
                ..pb::AlarmRequest::default()
            };
            let answer = MaintenanceClient::new(channel).alarm(request).await;
            let alarms = answer.map(|answer| answer.into_inner().alarms);
            if let Some(alarm) = alarms.unwrap_or_default().first() {
                return alarm.alarm();
            }
        }
        assert!(Instant::now() < deadline, "{}", cluster.log_of(at));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn lead(cluster: &Cluster, at: usize) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let leader = cluster.leader().await;
        if leader == at {
            return;
        }
        assert!(Instant::now() < deadline, "member {leader} goes on leading");
        let mut client = MaintenanceClient::new(cluster.connect(at).await);
        let status = client.status(pb::StatusRequest {}).await.unwrap();
        let target_id = status.into_inner().header.unwrap().member_id;
        let mut client = MaintenanceClient::new(cluster.connect(leader).await);
        // It is tried again if leadership was just lost.
        let _ = client
            .move_leader(pb::MoveLeaderRequest { target_id })
            .await;
    }
}

async fn put(cluster: &Cluster, at: usize, value: &'static str) -> Result<(), Status> {
    let put = pb::PutRequest {
        key: KEY.into(),
        value: value.into(),
        ..pb::PutRequest::default()
    };
    let mut kv = KvClient::new(cluster.connect(at).await);
    kv.put(put).await.map(drop)
}

async fn read(cluster: &Cluster, at: usize, serializable: bool) -> Result<String, Status> {
    let request = pb::RangeRequest {
        key: KEY.into(),
        serializable,
        ..pb::RangeRequest::default()
    };
    let mut kv = KvClient::new(cluster.connect(at).await);
    let answer = kv.range(request).await?.into_inner();
    Ok(String::from_utf8(answer.kvs[0].value.to_vec()).unwrap())
}
