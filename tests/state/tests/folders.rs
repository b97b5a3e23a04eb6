//! A data folder with something wrong about one of its files, in a cluster that serves: the member is
//! right again by itself, or ends with a clear error and is right once the file is back. It never
//! answers wrongly. (`damage.rs` has what disks do to files, with data written in between.)

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program};
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;

/// Machines that run tests are slow.
const PATIENCE: Duration = Duration::from_mins(2);
/// The member whose folder it is.
const VICTIM: usize = 1;
const KEYS: usize = 20;

/// What is wrong with a file.
#[derive(Debug, Clone, Copy)]
enum Wrong {
    Missing,
    /// Half of what it should be.
    Truncated,
    Zeroed,
    /// That of another member of the cluster.
    Swapped,
    /// Of the format after this one, with right checksums.
    Newer,
}

/// What comes of it.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    /// It is right again.
    Right,
    /// It ends, and says this.
    Says(&'static str),
}
use Outcome::{Right, Says};
use Wrong::{Missing, Newer, Swapped, Truncated, Zeroed};

/// Files by how their names begin, what is wrong with all of those, and what comes of it.
const CASES: [(&str, Wrong, Outcome); 22] = [
    ("identity", Missing, Right),
    ("identity", Truncated, Right),
    ("identity", Zeroed, Right),
    ("identity", Swapped, Says("belongs to member")),
    ("identity", Newer, Says("use a newer keelson-state")),
    ("identity.copy", Missing, Right),
    ("identity.copy", Truncated, Right),
    ("identity.copy", Zeroed, Right),
    ("vote", Missing, Right),
    ("vote", Truncated, Right),
    ("vote", Zeroed, Right),
    ("vote", Swapped, Says("belongs to member")),
    ("vote", Newer, Says("use a newer keelson-state")),
    ("log-", Missing, Right),
    ("log-", Truncated, Right),
    ("log-", Zeroed, Right),
    ("log-", Swapped, Says("belongs to member")),
    ("log-", Newer, Says("use a newer keelson-state")),
    ("keyspace.redb", Missing, Right),
    ("keyspace.redb", Truncated, Right),
    ("keyspace.redb", Zeroed, Right),
    ("keyspace.redb", Newer, Says("use a newer keelson-state")),
];

#[tokio::test]
async fn every_file_may_be_wrong() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    fill(&cluster).await;
    let kept = cluster.folder().join("kept");
    for (name, wrong, outcome) in CASES {
        flush(&cluster).await;
        cluster.kill(VICTIM);
        copy(&cluster.data(VICTIM), &kept);
        let files = files(&cluster.data(VICTIM), name);
        assert!(!files.is_empty(), "there is no {name}");
        for file in &files {
            spoil(file, wrong, &cluster.data(0));
        }
        let before = cluster.log_of(VICTIM).len();
        cluster.run(VICTIM);
        let log = match outcome {
            Right => {
                cluster.wait_for(VICTIM).await;
                cluster.log_of(VICTIM).split_off(before)
            }
            Says(what) => {
                let log = cluster.end_of(VICTIM).await.split_off(before);
                assert!(log.contains(what), "{name} {wrong:?}: {log}");
                copy(&kept, &cluster.data(VICTIM));
                cluster.run(VICTIM);
                log
            }
        };
        assert!(!log.contains("panicked"), "{name} {wrong:?}: {log}");
        check(&cluster).await;
        let rebuilt = log.contains("this member is whole again");
        println!("{name} {wrong:?}: {outcome:?}, rebuilt from the others: {rebuilt}");
    }
}

/// A whole folder that is another member's: that one runs, and would be there twice.
#[tokio::test]
async fn the_folder_of_another_member_is_refused() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    fill(&cluster).await;
    flush(&cluster).await;
    described(&cluster).await;
    let own = cluster.folder().join("own");
    cluster.kill(VICTIM);
    cluster.kill(0);
    fs::rename(cluster.data(VICTIM), &own).unwrap();
    copy(&cluster.data(0), &cluster.data(VICTIM));
    cluster.run(0);
    cluster.wait_for(0).await;
    cluster.run(VICTIM);
    let log = cluster.end_of(VICTIM).await;
    assert!(log.contains("is the data of member \"m0\""), "{log}");
    fs::remove_dir_all(cluster.data(VICTIM)).unwrap();
    fs::rename(own, cluster.data(VICTIM)).unwrap();
    cluster.run(VICTIM);
    check(&cluster).await;
}

fn spoil(file: &Path, wrong: Wrong, other: &Path) {
    let bytes = fs::read(file).unwrap();
    match wrong {
        Missing => fs::remove_file(file).unwrap(),
        Truncated => fs::write(file, &bytes[..bytes.len() / 2]).unwrap(),
        Zeroed => fs::write(file, vec![0; bytes.len()]).unwrap(),
        Swapped => {
            let name = file.file_name().unwrap().to_str().unwrap();
            // Segments are not of the same age everywhere.
            let prefix = if name.starts_with("log-") {
                "log-"
            } else {
                name
            };
            let theirs = files(other, prefix).pop().unwrap();
            fs::copy(theirs, file).unwrap();
        }
        Newer => fs::write(file, newer(file, bytes)).unwrap(),
    }
}

/// The file as the next version could have written it: with the next number for its format, and
/// checksums that are right.
fn newer(file: &Path, mut bytes: Vec<u8>) -> Vec<u8> {
    const BLOCK: usize = 4096;
    let name = file.file_name().unwrap().to_str().unwrap();
    if name == "identity" {
        // A message whose first field is the format.
        assert_eq!(bytes[..2], [8, 2]);
        bytes[1] = 3;
        let sum = bytes.len() - 4;
        let checksum = crc32fast::hash(&bytes[..sum]).to_le_bytes();
        bytes[sum..].copy_from_slice(&checksum);
        return bytes;
    }
    for block in bytes.chunks_mut(BLOCK).take(6) {
        // Other blocks are data, or were never written.
        if !block.starts_with(b"KEEL") {
            continue;
        }
        assert_eq!(block[8..16], 2_u64.to_le_bytes(), "{name}");
        block[8] = 3;
        // Where the checksum stands, and over what it goes.
        let (sum, over) = match name {
            "vote" => (88, 88),
            "keyspace.redb" => (48, BLOCK),
            _ => (56, 56),
        };
        block[sum..sum + 4].fill(0);
        let checksum = crc32fast::hash(&block[..over]).to_le_bytes();
        block[sum..sum + 4].copy_from_slice(&checksum);
    }
    bytes
}

fn files(folder: &Path, name: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let found = path.file_name().unwrap().to_str().unwrap();
            found == name || (name.ends_with('-') && found.starts_with(name))
        })
        .collect();
    files.sort();
    files
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

async fn fill(cluster: &Cluster) {
    let mut kv = KvClient::new(cluster.connect(0).await);
    for number in 0..KEYS {
        let put = pb::PutRequest {
            key: format!("key-{number:02}").into(),
            value: number.to_string().repeat(100).into(),
            ..pb::PutRequest::default()
        };
        kv.put(put).await.unwrap();
    }
}

/// Has the member flush: a backup does.
async fn flush(cluster: &Cluster) {
    cluster.wait_for(VICTIM).await;
    let mut client = MaintenanceClient::new(cluster.connect(VICTIM).await);
    let parts = client.snapshot(pb::SnapshotRequest {}).await;
    let mut parts = parts.unwrap().into_inner();
    while parts.message().await.unwrap().is_some() {}
}

/// Waits until the cluster knows everybody's name.
async fn described(cluster: &Cluster) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let channel = cluster.connect(0).await;
        let mut client = pb::cluster_client::ClusterClient::new(channel);
        let request = pb::MemberListRequest { linearizable: true };
        let members = client.member_list(request).await.unwrap().into_inner();
        if members.members.iter().all(|member| !member.name.is_empty()) {
            return;
        }
        assert!(Instant::now() < deadline, "{members:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The member has everything, and the same as another one.
async fn check(cluster: &Cluster) {
    cluster.wait_for(VICTIM).await;
    let mut kv = KvClient::new(cluster.connect(VICTIM).await);
    let all = pb::RangeRequest {
        key: "key-".into(),
        range_end: "key.".into(),
        ..pb::RangeRequest::default()
    };
    let found = kv.range(all).await.unwrap().into_inner().kvs;
    assert_eq!(found.len(), KEYS);
    for (number, kv) in found.iter().enumerate() {
        assert_eq!(kv.key, format!("key-{number:02}"));
        assert_eq!(kv.value, number.to_string().repeat(100));
    }
    let mut hashes = Vec::new();
    for at in [VICTIM, 0] {
        cluster.wait_for(at).await;
        hashes.push(cluster.hash(at).await);
    }
    assert_eq!(hashes[0], hashes[1]);
}
