//! What a disk does to the files of one member of three: it is found, never served, and repaired from
//! the others without an operator.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Cluster, Program, Random};
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;

const BLOCK: u64 = 4096;
/// Machines that run tests are slow.
const PATIENCE: Duration = Duration::from_mins(2);
/// The member whose files are damaged.
const VICTIM: usize = 1;

/// What is done to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    Missing,
    Empty,
    Halved,
    Zeroed,
    /// A flipped bit in the block at this many permille of what is written.
    Flipped(u64),
    /// As it was some time ago.
    Older,
    /// Another member's.
    Swapped,
}

#[tokio::test]
async fn a_damaged_log_is_repaired() {
    let harms = [
        Harm::Missing,
        Harm::Empty,
        Harm::Halved,
        Harm::Zeroed,
        Harm::Flipped(0),
        Harm::Flipped(500),
        Harm::Flipped(999),
        Harm::Older,
    ];
    repaired("log-", &harms).await;
}

#[tokio::test]
async fn a_damaged_keyspace_is_repaired() {
    let harms = [
        Harm::Missing,
        Harm::Empty,
        Harm::Halved,
        Harm::Zeroed,
        Harm::Flipped(30),
        Harm::Flipped(300),
        Harm::Flipped(700),
        Harm::Older,
        Harm::Swapped,
    ];
    repaired("keyspace.redb", &harms).await;
}

#[tokio::test]
async fn a_damaged_vote_and_identity_are_repaired() {
    repaired("vote", &[Harm::Missing, Harm::Empty, Harm::Zeroed]).await;
    let harms = [Harm::Missing, Harm::Empty, Harm::Zeroed, Harm::Flipped(10)];
    repaired("identity", &harms).await;
}

/// Blocks that are damaged while the member serves: a read that needs one fails, nothing wrong is
/// answered, and the member is rebuilt.
#[tokio::test]
async fn damage_is_found_while_serving() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &["--cache-mib", "1"]).await;
    // More than is in memory.
    let count = 250;
    fill(&cluster, 0..count).await;
    settle(&mut cluster).await;
    let before = cluster.log_of(VICTIM).len();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(cluster.data(VICTIM).join("keyspace.redb"))
        .unwrap();
    let mut random = Random::new(3);
    for block in 6..file.metadata().unwrap().len() / BLOCK {
        flip(&file, block * BLOCK + random.below(BLOCK));
    }
    let deadline = Instant::now() + PATIENCE;
    for number in (0..count).cycle() {
        let log = cluster.log_of(VICTIM).split_off(before);
        if log.contains("this member is whole again") {
            break;
        }
        assert!(Instant::now() < deadline, "it is not found:\n{log}");
        // An answer is right, or there is none.
        match try_read(&cluster, VICTIM, number).await {
            Ok(found) => assert_eq!(found, Some(value(number))),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    check(&cluster, count).await;
}

/// A single member has nobody to be repaired from: it says so, and serves nothing wrong.
#[tokio::test]
async fn a_single_member_says_what_to_do() {
    let mut cluster = Cluster::start(Program::KeelsonState, 1, &[]).await;
    fill(&cluster, 0..5).await;
    cluster.kill(0);
    let log = files(&cluster.data(0), "log-").remove(0);
    harm(&log, Harm::Flipped(500), None, None);
    cluster.run(0);
    let told = cluster.end_of(0).await;
    assert!(told.contains("restore a backup"), "{told}");
    assert!(told.contains("is damaged at byte"), "{told}");
}

/// Without a quorum beside it, a damaged member waits, and says for what.
#[tokio::test]
async fn without_a_quorum_a_damaged_member_waits() {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    fill(&cluster, 0..5).await;
    cluster.kill(VICTIM);
    cluster.kill(2);
    harm(
        &cluster.data(VICTIM).join("keyspace.redb"),
        Harm::Zeroed,
        None,
        None,
    );
    cluster.run(VICTIM);
    let deadline = Instant::now() + PATIENCE;
    while !cluster
        .log_of(VICTIM)
        .contains("cannot rebuild this member yet")
    {
        assert!(Instant::now() < deadline, "{}", cluster.log_of(VICTIM));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What it had is kept until it has something else.
    assert!(cluster.data(VICTIM).join("damaged-keyspace.redb").exists());
    cluster.run(2);
    cluster.wait_for(VICTIM).await;
    assert!(!cluster.data(VICTIM).join("damaged-keyspace.redb").exists());
    check(&cluster, 5).await;
}

/// Each harm in turn, to the files whose names begin with `prefix`, while the member is down.
async fn repaired(prefix: &str, harms: &[Harm]) {
    let mut cluster = Cluster::start(Program::KeelsonState, 3, &[]).await;
    fill(&cluster, 0..10).await;
    settle(&mut cluster).await;
    let mut written = 10;
    for kind in harms {
        let older = cluster.folder().join("older");
        cluster.kill(VICTIM);
        let names = files(&cluster.data(VICTIM), prefix);
        fs::copy(names.last().unwrap(), &older).unwrap();
        cluster.run(VICTIM);
        cluster.wait_for(VICTIM).await;
        fill(&cluster, written..written + 10).await;
        written += 10;
        settle(&mut cluster).await;
        cluster.kill(VICTIM);
        let other = files(&cluster.data(0), prefix);
        for file in files(&cluster.data(VICTIM), prefix) {
            harm(
                &file,
                *kind,
                Some(&older),
                other.last().map(PathBuf::as_path),
            );
            if prefix != "log-" {
                break;
            }
        }
        let before = cluster.log_of(VICTIM).len();
        cluster.run(VICTIM);
        cluster.wait_for(VICTIM).await;
        check(&cluster, written).await;
        let log = cluster.log_of(VICTIM).split_off(before);
        println!(
            "{prefix} {kind:?}: {}",
            log.contains("this member is whole again")
        );
        assert!(!log.contains("panicked"), "{log}");
        // It has its vote: one of the others is not needed.
        cluster.kill(2);
        cluster.wait_for(VICTIM).await;
        cluster.run(2);
        cluster.wait_for(2).await;
    }
}

fn harm(file: &Path, kind: Harm, older: Option<&Path>, other: Option<&Path>) {
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(file)
            .unwrap()
    };
    let length = fs::metadata(file).unwrap().len();
    match kind {
        Harm::Missing => fs::remove_file(file).unwrap(),
        Harm::Empty => open().set_len(0).unwrap(),
        Harm::Halved => open().set_len(written(file) / 2).unwrap(),
        Harm::Zeroed => {
            open().set_len(0).unwrap();
            open().set_len(length).unwrap();
        }
        Harm::Flipped(permille) => flip(&open(), written(file) * permille / 1000),
        Harm::Older => drop(fs::copy(older.unwrap(), file).unwrap()),
        Harm::Swapped => drop(fs::copy(other.unwrap(), file).unwrap()),
    }
}

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    if file.read_exact_at(&mut byte, at).is_ok() {
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }
}

/// Bytes up to the last one that is not zero.
fn written(file: &Path) -> u64 {
    let bytes = fs::read(file).unwrap();
    let last = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0);
    last as u64 + 1
}

fn files(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with(prefix) && name != "identity.copy"
        })
        .collect();
    files.sort();
    files
}

fn key(number: usize) -> String {
    format!("key-{number:06}")
}

fn value(number: usize) -> Vec<u8> {
    format!("value of {number} ").into_bytes().repeat(1000)
}

async fn fill(cluster: &Cluster, numbers: std::ops::Range<usize>) {
    for number in numbers {
        let put = pb::PutRequest {
            key: key(number).into(),
            value: value(number).into(),
            ..pb::PutRequest::default()
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut kv = KvClient::new(cluster.connect(0).await);
            match kv.put(put.clone()).await {
                Ok(_) => break,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        }
    }
}

/// Has the member flush: a backup does.
async fn settle(cluster: &mut Cluster) {
    cluster.wait_for(VICTIM).await;
    let mut client = MaintenanceClient::new(cluster.connect(VICTIM).await);
    let mut parts = client
        .snapshot(pb::SnapshotRequest {})
        .await
        .unwrap()
        .into_inner();
    while parts.message().await.unwrap().is_some() {}
}

async fn try_read(
    cluster: &Cluster,
    at: usize,
    number: usize,
) -> Result<Option<Vec<u8>>, Box<dyn std::error::Error>> {
    let channel = tokio::time::timeout(Duration::from_secs(5), cluster.try_connect(at)).await??;
    let request = pb::RangeRequest {
        key: key(number).into(),
        ..pb::RangeRequest::default()
    };
    let answer = KvClient::new(channel).range(request).await?.into_inner();
    Ok(answer.kvs.into_iter().next().map(|kv| kv.value.to_vec()))
}

/// The member has everything, and the same as the others.
async fn check(cluster: &Cluster, written: usize) {
    cluster.wait_for(VICTIM).await;
    for number in 0..written {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match try_read(cluster, VICTIM, number).await {
                Ok(found) => {
                    assert_eq!(found, Some(value(number)), "{}", key(number));
                    break;
                }
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let mut hashes = Vec::new();
    for at in [VICTIM, 0] {
        cluster.wait_for(at).await;
        hashes.push(cluster.hash(at).await);
    }
    assert_eq!(hashes[0], hashes[1]);
}
