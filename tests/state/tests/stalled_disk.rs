//! A leader whose disk stands still: others lead, clients are told to go there, leases stay.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program};
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use tempfile::TempDir;
use tonic::Code;
use tonic::transport::Channel;

/// An ext4 file system of its own, which can be frozen: every write to it hangs then.
struct Disk {
    folder: TempDir,
}

impl Disk {
    fn new() -> Self {
        let disk = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let (image, at) = (disk.folder.path().join("image"), disk.place());
        std::fs::create_dir(&at).unwrap();
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(256 << 20).unwrap();
        run(
            "mkfs.ext4",
            &["-q", "-O", "^has_journal", image.to_str().unwrap()],
        );
        run(
            "mount",
            &["-o", "loop", image.to_str().unwrap(), at.to_str().unwrap()],
        );
        disk
    }

    fn place(&self) -> std::path::PathBuf {
        self.folder.path().join("mounted")
    }

    fn freeze(&self) -> Frozen<'_> {
        run("fsfreeze", &["-f", self.place().to_str().unwrap()]);
        Frozen(self)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.place()).status();
    }
}

/// It is thawed when this is dropped: a process that hangs in a write can't be killed.
struct Frozen<'a>(&'a Disk);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        run("fsfreeze", &["-u", self.0.place().to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

fn link(data: &Path, disk: &Disk) {
    let place = disk.place().join("data");
    std::fs::create_dir(&place).unwrap();
    std::os::unix::fs::symlink(place, data).unwrap();
}

#[tokio::test]
async fn others_lead_while_the_disk_hangs() {
    let disk = Disk::new();
    let cluster = Cluster::start_on(Program::KeelsonState, 3, &[], |at, data| {
        if at == 1 {
            link(data, &disk);
        }
    })
    .await;
    lead(&cluster, 1).await;
    let mut stalled = KvClient::new(cluster.connect(1).await);
    let mut other = KvClient::new(cluster.connect(0).await);
    let mut leases = LeaseClient::new(cluster.connect(0).await);
    for (id, ttl) in [(7, 600), (8, 20)] {
        let grant = pb::LeaseGrantRequest { ttl, id };
        leases.lease_grant(grant).await.unwrap();
    }
    put(&mut stalled, 0, 7).await.unwrap();
    let frozen = disk.freeze();
    // It is on its way when the disk hangs: who sent it does not wait for ever.
    let hanging = put(&mut stalled, 1, 0).await.unwrap_err();
    assert_eq!(hanging.code(), Code::Unavailable, "{hanging:?}");

    let limit = Instant::now() + Duration::from_mins(1);
    let stalled_at = Instant::now();
    while let Err(error) = put(&mut other, 2, 8).await {
        assert!(Instant::now() < limit, "{error:?}");
    }
    println!("another member led after {:?}", stalled_at.elapsed());
    assert_ne!(cluster.leader().await, 1);
    // From now on the stalled member refuses at once what needs its thread, and serves the rest.
    let refused = put(&mut stalled, 3, 0).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::Unavailable, "etcdserver: no leader")
    );
    let stale = pb::RangeRequest {
        key: "key-0".into(),
        serializable: true,
        ..pb::RangeRequest::default()
    };
    assert_eq!(stalled.range(stale).await.unwrap().into_inner().count, 1);
    // For as long as the lease of 20 s would be, it is kept alive elsewhere.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(22) {
        let requests = tokio_stream::once(pb::LeaseKeepAliveRequest { id: 8 });
        let answers = leases.lease_keep_alive(requests).await.unwrap();
        let answer = answers.into_inner().message().await.unwrap().unwrap();
        assert_eq!(answer.ttl, 20);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    drop(frozen);
    cluster.wait_for(1).await;
    put(&mut stalled, 4, 0).await.unwrap();
    for id in [7, 8] {
        let request = pb::LeaseTimeToLiveRequest { id, keys: true };
        let answer = leases
            .lease_time_to_live(request)
            .await
            .unwrap()
            .into_inner();
        assert!(answer.ttl > 0 && answer.keys.len() == 1, "{answer:?}");
    }
}

/// A disk that answers, but slowly: its leader hands over, before others would find that it is gone.
#[tokio::test]
async fn a_leader_with_a_slow_disk_hands_over() {
    let disk = Disk::new();
    // So that no other member stands for election because of a pause, or of a machine that is busy.
    let flags = ["--heartbeat-interval", "200", "--election-timeout", "2000"];
    let cluster = Cluster::start_on(Program::KeelsonState, 3, &flags, |at, data| {
        if at == 1 {
            link(data, &disk);
        }
    })
    .await;
    lead(&cluster, 1).await;
    let mut kv = KvClient::new(cluster.connect(1).await);
    let limit = Instant::now() + Duration::from_mins(2);
    for number in 0.. {
        if cluster
            .log_of(1)
            .contains("this member's disk is slow: hands over leadership")
        {
            break;
        }
        assert!(Instant::now() < limit, "{}", cluster.log_of(1));
        // The sync of this put takes longer than a quarter of the election timeout.
        let frozen = disk.freeze();
        let thaw = async {
            tokio::time::sleep(Duration::from_millis(800)).await;
            drop(frozen);
        };
        let (done, ()) = tokio::join!(put(&mut kv, number, 0), thaw);
        done.unwrap();
    }
    let limit = Instant::now() + Duration::from_mins(1);
    while cluster.leader().await == 1 {
        assert!(Instant::now() < limit, "{}", cluster.log_of(1));
    }
    put(&mut kv, 0, 0).await.unwrap();
}

async fn lead(cluster: &Cluster, at: usize) {
    let leader = cluster.leader().await;
    if leader == at {
        return;
    }
    let mut client = MaintenanceClient::new(cluster.connect(at).await);
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

async fn put(kv: &mut KvClient<Channel>, number: u32, lease: i64) -> Result<(), tonic::Status> {
    let request = pb::PutRequest {
        key: format!("key-{number}").into(),
        value: "value".into(),
        lease,
        ..pb::PutRequest::default()
    };
    let put = tokio::time::timeout(Duration::from_secs(30), kv.put(request)).await;
    put.expect("a request hangs").map(drop)
}
