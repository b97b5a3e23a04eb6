//! The embedded backend's process is killed while it writes, again and again.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use keelson_controlplane::embedded::{EmbeddedOptions, EmbeddedStore, Retention};
use keelson_controlplane::{
    LeaseGrantRequest, PutRequest, Revision, StateStore, StateStoreExt, Txn, WatchRequest,
};

const DIRECTORY: &str = "KEELSON_CRASH_TEST_DIRECTORY";
const ROUND: &str = "KEELSON_CRASH_TEST_ROUND";
const ROUNDS: i64 = 12;
const TASKS: i64 = 4;
const PARTS: [&str; 3] = ["a", "b", "c"];

async fn open(directory: &Path) -> EmbeddedStore {
    let mut options = EmbeddedOptions::new(directory);
    options.retention = Retention::Everything;
    EmbeddedStore::open(options).await.unwrap()
}

/// What the child acknowledged: which step, at which revision.
#[derive(Debug)]
struct Acknowledged {
    id: i64,
    revision: Revision,
}

#[tokio::test]
#[ignore = "the process that the crash test runs and kills"]
async fn writer() {
    let directory = std::env::var(DIRECTORY).unwrap();
    let round: i64 = std::env::var(ROUND).unwrap().parse().unwrap();
    let store = Arc::new(open(directory.as_ref()).await);
    let tasks = (0..TASKS).map(|task| {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for step in 0.. {
                let id = (round * TASKS + task) * 1_000_000 + step + 1;
                let revision = write(&store, id).await;
                println!("\n@ {id} {revision}");
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

/// One step: a put, a transaction, or a lease with a key, in turn.
async fn write(store: &EmbeddedStore, id: i64) -> Revision {
    match id % 3 {
        0 => {
            let key = format!("put/{id}");
            store.set(key.as_bytes(), key.as_bytes()).await.unwrap()
        }
        1 => {
            let puts = PARTS.map(|part| PutRequest::new(format!("txn/{id}/{part}"), "v").into());
            store.txn(Txn::new().then(puts)).await.unwrap().revision
        }
        _ => {
            let grant = LeaseGrantRequest::new(Duration::from_hours(1)).id(id);
            store.lease_grant(grant).await.unwrap();
            let put = PutRequest::new(format!("lease/{id}"), "v").lease(id);
            store.put(put).await.unwrap().revision
        }
    }
}

#[tokio::test]
async fn everything_acknowledged_survives_a_kill() {
    let directory = tempfile::tempdir().unwrap();
    let mut acknowledged = Vec::new();
    for round in 0..ROUNDS {
        acknowledged.extend(run_and_kill(directory.path(), round));
        let store = open(directory.path()).await;
        verify(&store, &acknowledged).await;
        if round % 2 == 0 {
            store.close().await.unwrap();
        }
    }
}

/// Kills the writer some time after its tenth acknowledgement.
fn run_and_kill(directory: &Path, round: i64) -> Vec<Acknowledged> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer", "--ignored", "--nocapture"])
        .env(DIRECTORY, directory)
        .env(ROUND, round.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let mut acknowledged = Vec::new();
    let mut running = Some(child);
    let mut killed = None;
    for line in output.lines() {
        let line = line.unwrap();
        let Some(line) = line.strip_prefix("@ ") else {
            continue;
        };
        // A line that the kill cut short has no revision, or no end that anyone waited for.
        let Some((id, revision)) = line.split_once(' ') else {
            continue;
        };
        acknowledged.push(Acknowledged {
            id: id.parse().unwrap(),
            revision: revision.parse().unwrap(),
        });
        if acknowledged.len() < 10 {
            continue;
        }
        if let Some(mut child) = running.take() {
            killed = Some(std::thread::spawn(move || {
                // Anywhere in a commit of a few milliseconds.
                let pause = rand_u64() % 60_000;
                std::thread::sleep(Duration::from_micros(pause));
                child.kill().unwrap();
                child.wait().unwrap();
            }));
        }
    }
    killed.expect("the writer ended by itself").join().unwrap();
    acknowledged
}

fn rand_u64() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

async fn verify(store: &EmbeddedStore, acknowledged: &[Acknowledged]) {
    let state = store.list(b"").await.unwrap();
    let keys: BTreeMap<_, _> = state.kvs.iter().map(|kv| (&kv.key[..], kv)).collect();
    let newest = acknowledged.iter().map(|one| one.revision).max().unwrap();
    assert!(state.revision >= newest);
    for Acknowledged { id, revision } in acknowledged {
        let names = match id % 3 {
            0 => vec![format!("put/{id}")],
            1 => PARTS.map(|part| format!("txn/{id}/{part}")).to_vec(),
            _ => vec![format!("lease/{id}")],
        };
        for name in names {
            let kv = keys.get(name.as_bytes());
            let kv = kv.unwrap_or_else(|| panic!("{name} of revision {revision} is lost"));
            assert_eq!((kv.mod_revision, kv.version), (*revision, 1), "{name}");
        }
        if id % 3 == 2 {
            let status = store.lease_status(*id, true).await.unwrap();
            assert_eq!(status.keys, [format!("lease/{id}")]);
        }
    }
    // Transactions are whole, acknowledged or not.
    let mut parts: BTreeMap<_, Vec<Revision>> = BTreeMap::new();
    for kv in store.list(b"txn/").await.unwrap().kvs {
        let name = String::from_utf8(kv.key.to_vec()).unwrap();
        let id = name.split('/').nth(1).unwrap().to_owned();
        parts.entry(id).or_default().push(kv.mod_revision);
    }
    for (id, revisions) in parts {
        assert_eq!(revisions, [revisions[0]; 3], "{id}");
    }
    // History has every revision once, up to the current one.
    let request = WatchRequest::prefix("").from_revision(2);
    let mut history = store.watch(request).await.unwrap();
    for revision in 2..=state.revision {
        assert_eq!(history.next().await.unwrap().unwrap().revision, revision);
    }
}
