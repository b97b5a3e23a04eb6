//! Damaged files of the embedded backend: a clear error or the right data, nothing else.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use keelson_controlplane::embedded::{EmbeddedOptions, EmbeddedStore};
use keelson_controlplane::{
    KeyValue, LeaseGrantRequest, PutRequest, StateError, StateStore, StateStoreExt,
};
use tempfile::TempDir;

const DATABASE: &str = "state.redb";
const CASES: u64 = 60;

/// What a whole store says.
#[derive(Debug, PartialEq)]
struct Contents {
    now: Vec<KeyValue>,
    before: Vec<Option<KeyValue>>,
}

async fn read(store: &EmbeddedStore) -> Result<Contents, StateError> {
    let snapshot = store.list(b"").await?;
    let mut before = Vec::new();
    for number in (0..200).step_by(20) {
        let key = format!("k{number}");
        before.push(store.get_at(key.as_bytes(), 150).await?);
    }
    Ok(Contents {
        now: snapshot.kvs,
        before,
    })
}

async fn open(directory: &Path) -> Result<EmbeddedStore, StateError> {
    EmbeddedStore::open(EmbeddedOptions::new(directory)).await
}

async fn filled() -> (TempDir, Contents) {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).await.unwrap();
    let grant = LeaseGrantRequest::new(Duration::from_hours(1)).id(9);
    store.lease_grant(grant).await.unwrap();
    for number in 0..200 {
        let value = vec![b'v'; number * 5];
        let put =
            PutRequest::new(format!("k{number}"), value).lease(9 * i64::from(number % 2 == 0));
        store.put(put).await.unwrap();
    }
    let contents = read(&store).await.unwrap();
    store.close().await.unwrap();
    (directory, contents)
}

fn copy(from: &Path) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.path().join(entry.file_name())).unwrap();
    }
    to
}

/// Different in each case, the same in each run.
fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    }
}

/// Opens, reads, writes, and says whether all was right.
async fn right_or_refused(directory: &Path, whole: &Contents, case: &str) -> bool {
    let outcome = async {
        let store = open(directory).await?;
        let contents = read(&store).await?;
        assert_eq!(&contents, whole, "{case}: wrong data");
        store.lease_keep_alive(9).await?;
        store.set(b"new", b"value").await?;
        store.close().await
    };
    match outcome.await {
        Ok(()) => true,
        Err(StateError::Corrupt(_)) => false,
        Err(StateError::Storage(reason)) if !reason.contains("ended early") => false,
        Err(error) => panic!("{case}: {error:?}"),
    }
}

#[tokio::test]
async fn flipped_bytes() {
    let (original, whole) = filled().await;
    let mut refused = 0;
    for case in 0..CASES {
        let directory = copy(original.path());
        let path = directory.path().join(DATABASE);
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut random = random(case + 1);
        let size = file.metadata().unwrap().len();
        // A third hits the header, where each byte matters.
        let offset = random(if case % 3 == 0 { 512 } else { size });
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        byte[0] ^= 1 << random(8);
        file.write_all_at(&byte, offset).unwrap();
        let case = format!("byte {offset}");
        refused += i32::from(!right_or_refused(directory.path(), &whole, &case).await);
    }
    assert!(refused > 0, "no damage was found");
}

#[tokio::test]
async fn truncated() {
    let (original, whole) = filled().await;
    for case in 0..CASES / 2 {
        let directory = copy(original.path());
        let path = directory.path().join(DATABASE);
        let file = File::options().write(true).open(path).unwrap();
        let size = random(case + 1)(file.metadata().unwrap().len());
        file.set_len(size).unwrap();
        let right = right_or_refused(directory.path(), &whole, &format!("{size} bytes")).await;
        assert!(!right, "{size} bytes are enough");
    }
}
