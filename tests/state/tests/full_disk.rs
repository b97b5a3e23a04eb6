//! A disk that is full: reads go on, writes are refused with etcd's words, nothing is lost, and all
//! goes on by itself as soon as there is room.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program};
use pb::alarm_request::AlarmAction;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic::{Code, Status};

const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";

/// A tmpfs of some MiB.
struct Disk {
    folder: TempDir,
}

impl Disk {
    fn new(mib: u32) -> Self {
        let disk = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        disk.mount(&format!("size={mib}m"));
        disk
    }

    fn resize(&self, mib: u32) {
        self.mount(&format!("remount,size={mib}m"));
    }

    fn mount(&self, options: &str) {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "none"])
            .arg(self.folder.path())
            .status()
            .unwrap();
        assert!(status.success(), "mount -o {options}: are you root?");
    }

    /// Fills all that is left with one file.
    fn fill(&self) -> PathBuf {
        let path = self.folder.path().join("junk");
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .unwrap();
        for size in [1 << 20, 4096] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
        path
    }

    /// Where a member is to have its data.
    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.folder.path())
            .status();
    }
}

fn link(data: &Path, disk: &Disk) {
    fs::create_dir_all(disk.data()).unwrap();
    std::os::unix::fs::symlink(disk.data(), data).unwrap();
}

/// The only member writes until its disk is full; then something else takes the rest of it.
#[tokio::test]
async fn the_only_member_goes_on_when_there_is_room() {
    let disk = Disk::new(192);
    let mut cluster =
        Cluster::start_on(Program::KeelsonState, 1, &[], |_, data| link(data, &disk)).await;
    let mut kv = KvClient::new(cluster.connect(0).await);
    let written = fill_by_writing(&mut kv, 0).await;
    assert!(written > 20, "{written} values of 100 kB in 192 MiB");
    still_reads(&cluster, 0, written).await;

    // A flush may have made room again, which is taken now.
    let junk = disk.fill();
    let written = fill_by_writing(&mut kv, written).await;
    until_alarms(&cluster, 0, 1).await;
    still_reads(&cluster, 0, written).await;
    let refused = put(&mut kv, 0).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::ResourceExhausted, NO_SPACE)
    );
    let grant = pb::LeaseGrantRequest { ttl: 60, id: 5 };
    let refused = LeaseClient::new(cluster.connect(0).await)
        .lease_grant(grant)
        .await
        .unwrap_err();
    assert_eq!(refused.message(), NO_SPACE);
    // What makes room is allowed.
    let delete = pb::DeleteRangeRequest {
        key: key(0).into(),
        ..pb::DeleteRangeRequest::default()
    };
    kv.delete_range(delete).await.unwrap();

    fs::remove_file(junk).unwrap();
    disk.resize(600);
    until_written(&cluster, 0, written).await;
    until_alarms(&cluster, 0, 0).await;
    cluster.kill(0);
    cluster.run(0);
    cluster.wait_for(0).await;
    still_reads(&cluster, 0, written + 1).await;
}

/// Something else takes all room at once, while the member writes as fast as it can.
#[tokio::test]
async fn a_disk_that_is_suddenly_full() {
    let disk = Disk::new(256);
    let mut cluster =
        Cluster::start_on(Program::KeelsonState, 1, &[], |_, data| link(data, &disk)).await;
    let channel = cluster.connect(0).await;
    let writer = tokio::spawn({
        let mut kv = KvClient::new(channel.clone());
        async move { fill_by_writing(&mut kv, 0).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let junk = disk.fill();
    let written = tokio::time::timeout(Duration::from_mins(1), writer)
        .await
        .unwrap()
        .unwrap();
    still_reads(&cluster, 0, written).await;
    // Also what had to wait for room, did.
    tokio::time::sleep(Duration::from_secs(3)).await;
    still_reads(&cluster, 0, written).await;
    fs::remove_file(junk).unwrap();
    disk.resize(600);
    until_written(&cluster, 0, written).await;
    cluster.kill(0);
    cluster.run(0);
    cluster.wait_for(0).await;
    still_reads(&cluster, 0, written + 1).await;
}

/// One of three disks is full: the cluster goes on, led by a member with room.
#[tokio::test]
async fn one_full_disk_of_three() {
    let disk = Disk::new(192);
    let cluster = Cluster::start_on(Program::KeelsonState, 3, &[], |at, data| {
        if at == 1 {
            link(data, &disk);
        }
    })
    .await;
    // It is led by the member that will have no room.
    let leader = cluster.leader().await;
    if leader != 1 {
        let mut client = MaintenanceClient::new(cluster.connect(1).await);
        let status = client
            .status(pb::StatusRequest {})
            .await
            .unwrap()
            .into_inner();
        let target_id = status.header.unwrap().member_id;
        let mut client = MaintenanceClient::new(cluster.connect(leader).await);
        client
            .move_leader(pb::MoveLeaderRequest { target_id })
            .await
            .unwrap();
    }
    let junk = disk.fill();
    let limit = Instant::now() + Duration::from_mins(1);
    while cluster.leader().await == 1 {
        assert!(Instant::now() < limit, "the member without room leads on");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut kv = KvClient::new(cluster.connect(0).await);
    for number in 0..100 {
        let limit = Instant::now() + Duration::from_secs(30);
        while let Err(error) = put(&mut kv, number).await {
            assert!(Instant::now() < limit, "{error:?}");
        }
    }
    until_alarms(&cluster, 0, 1).await;
    fs::remove_file(junk).unwrap();
    disk.resize(600);
    until_alarms(&cluster, 0, 0).await;
    cluster.wait_for(1).await;
    still_reads(&cluster, 1, 100).await;
}

fn key(number: usize) -> String {
    format!("key-{number:05}")
}

async fn put(kv: &mut KvClient<Channel>, number: usize) -> Result<(), Status> {
    let value: Vec<u8> = (0..100_000_usize)
        .map(|at| u8::try_from((at * 31 + number * 7) % 251).unwrap())
        .collect();
    let request = pb::PutRequest {
        key: key(number).into(),
        value: value.into(),
        ..pb::PutRequest::default()
    };
    kv.put(request).await.map(drop)
}

/// Writes until a write is refused for lack of room; how many were acknowledged.
async fn fill_by_writing(kv: &mut KvClient<Channel>, from: usize) -> usize {
    let limit = Instant::now() + Duration::from_mins(2);
    let mut number = from;
    loop {
        match put(kv, number).await {
            Ok(()) => number += 1,
            Err(error) if error.message() == NO_SPACE => {
                assert_eq!(error.code(), Code::ResourceExhausted);
                return number;
            }
            // The flush falls behind, or the log waits for room: try again.
            Err(error) => assert!(Instant::now() < limit, "{error:?}"),
        }
    }
}

/// Waits until a write succeeds.
async fn until_written(cluster: &Cluster, at: usize, number: usize) {
    let mut kv = KvClient::new(cluster.connect(at).await);
    let limit = Instant::now() + Duration::from_mins(1);
    while let Err(error) = put(&mut kv, number).await {
        assert!(Instant::now() < limit, "{error:?}\n{}", cluster.log_of(at));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Everything that was acknowledged is there, to linearizable reads; but for the first key, which a
/// test deletes.
async fn still_reads(cluster: &Cluster, at: usize, count: usize) {
    let mut kv = KvClient::new(cluster.connect(at).await);
    for number in 1..count {
        let request = pb::RangeRequest {
            key: key(number).into(),
            keys_only: number % 10 > 0,
            ..pb::RangeRequest::default()
        };
        let answer = tokio::time::timeout(Duration::from_secs(30), kv.range(request)).await;
        let answer = answer.expect("a read hangs").unwrap().into_inner();
        assert_eq!(answer.count, 1, "{} is missing", key(number));
    }
}

/// Waits until there are as many alarms.
async fn until_alarms(cluster: &Cluster, at: usize, count: usize) {
    let limit = Instant::now() + Duration::from_mins(1);
    loop {
        let raised = alarms(cluster, at).await;
        if raised == count {
            return;
        }
        assert!(
            Instant::now() < limit,
            "{raised} alarms\n{}",
            cluster.log_of(at)
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn alarms(cluster: &Cluster, at: usize) -> usize {
    let mut client = MaintenanceClient::new(cluster.connect(at).await);
    let request = pb::AlarmRequest {
        action: AlarmAction::Get as i32,
        ..pb::AlarmRequest::default()
    };
    client
        .alarm(request)
        .await
        .unwrap()
        .into_inner()
        .alarms
        .len()
}
