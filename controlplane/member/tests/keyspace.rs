//! The engine's file under what disks do: what is read is what was written, or an error.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{Command, Operation};
use keelson_member::disk::{Disk, Folder};
use keelson_member::keyspace::{ENGINE_FILE, FORMAT, Keyspace, Metadata};
use keelson_member::{Limits, MemberError};
use proptest::prelude::*;
use tempfile::TempDir;

const BLOCK: usize = 4096;

fn first() -> Metadata {
    Metadata {
        format: FORMAT,
        revision: 1,
        compact_revision: -1,
        ..Metadata::default()
    }
}

fn open(folder: &Path, first: Option<Metadata>) -> Result<Keyspace, MemberError> {
    let disk: Arc<dyn Disk> = Arc::new(Folder::open(folder).unwrap());
    Keyspace::open(&*disk, 64 << 10, first, Limits::default())
}

fn put(keyspace: &Keyspace, index: u64, keys: u64, length: usize) {
    let mut batch = keyspace.batch();
    for number in 0..keys {
        let key = (number * 7919 + index) % 1000;
        let put = pb::PutRequest {
            key: format!("key{key}").into(),
            value: vec![u8::try_from(index % 251).unwrap(); length].into(),
            ..pb::PutRequest::default()
        };
        let command = Command {
            operation: Some(Operation::Put(put)),
            ..Command::default()
        };
        batch.apply(command).unwrap().unwrap();
    }
    batch.applied(index, 1);
    batch.finish();
    let flush = keyspace.begin_flush().unwrap();
    keyspace.flush(flush).unwrap().unwrap();
}

/// A file with several flushes and a compaction, and its hash.
static WRITTEN: LazyLock<(Vec<u8>, u32)> = LazyLock::new(|| {
    let folder = TempDir::new().unwrap();
    let keyspace = open(folder.path(), Some(first())).unwrap();
    for index in 1..=4 {
        put(&keyspace, index, 200, 700);
    }
    let hash = keyspace.hash(0).unwrap().0;
    drop(keyspace);
    (fs::read(folder.path().join(ENGINE_FILE)).unwrap(), hash)
});

fn damaged(change: impl FnOnce(&mut Vec<u8>)) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let mut bytes = WRITTEN.0.clone();
    change(&mut bytes);
    let path = folder.path().join(ENGINE_FILE);
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

/// Reads everything: whether it is as it was written. Anything but that and damage is a failure.
fn is_whole(folder: &Path) -> bool {
    let told = |error: &MemberError| assert!(error.is_damage(), "{error}");
    let keyspace = match open(folder, None) {
        Ok(keyspace) => keyspace,
        Err(error) => {
            told(&error);
            return false;
        }
    };
    let (hash, _, _) = match keyspace.hash(0) {
        Ok(hash) => hash,
        Err(error) => {
            let damage = keyspace.damage();
            told(&damage.unwrap_or_else(|| panic!("{error} without damage")));
            return false;
        }
    };
    assert_eq!(hash, WRITTEN.1, "a wrong answer");
    let mut from = 0;
    loop {
        match keyspace.verify(from, 16) {
            Ok(0) => return true,
            Ok(next) => from = next,
            Err(error) => {
                told(&error);
                return false;
            }
        }
    }
}

#[test]
fn it_is_whole_when_nothing_happened() {
    let (folder, _) = damaged(|_| {});
    assert!(is_whole(folder.path()));
    // And after a crash at any sync: what was not synced is lost.
    let keyspace = open(folder.path(), None).unwrap();
    put(&keyspace, 5, 100, 500);
    let hash = keyspace.hash(0).unwrap().0;
    let crashed = TempDir::new().unwrap();
    fs::copy(
        folder.path().join(ENGINE_FILE),
        crashed.path().join(ENGINE_FILE),
    )
    .unwrap();
    let again = open(crashed.path(), None).unwrap();
    assert_eq!(again.hash(0).unwrap().0, hash);
    assert_eq!(again.metadata().applied_index, 5);
}

#[test]
fn other_files_are_told() {
    let (folder, _) = damaged(|bytes| bytes[..4].copy_from_slice(b"redb"));
    let error = open(folder.path(), None).unwrap_err();
    assert!(
        matches!(error, MemberError::Older { found: 1, .. }),
        "{error}"
    );
    let (folder, _) = damaged(|bytes| {
        for slot in 0..4 {
            let block = &mut bytes[slot * BLOCK..][..BLOCK];
            block[8] = 9;
            block[48..52].fill(0);
            let sum = crc32fast::hash(block);
            block[48..52].copy_from_slice(&sum.to_le_bytes());
        }
    });
    let error = open(folder.path(), None).unwrap_err();
    assert!(
        matches!(error, MemberError::Newer { found: 9, .. }),
        "{error}"
    );
    for length in [0, 100, BLOCK, 3 * BLOCK, 20 * BLOCK] {
        let (folder, _) = damaged(|bytes| bytes.truncate(length));
        assert!(!is_whole(folder.path()), "{length} bytes");
    }
    fs::remove_file(folder.path().join(ENGINE_FILE)).unwrap();
    assert!(open(folder.path(), None).unwrap_err().is_damage());
}

/// Blocks of the same file, or of another one, in each other's place.
#[test]
fn blocks_in_the_wrong_place_are_told() {
    let other = TempDir::new().unwrap();
    let keyspace = open(other.path(), Some(first())).unwrap();
    for index in 1..=4 {
        put(&keyspace, index + 10, 200, 700);
    }
    drop(keyspace);
    let other = fs::read(other.path().join(ENGINE_FILE)).unwrap();
    let written =
        |bytes: &[u8], block: usize| bytes[block * BLOCK..][..BLOCK].iter().any(|b| *b != 0);
    let blocks = (WRITTEN.0.len().min(other.len())) / BLOCK;
    let mut tried = 0;
    for block in (6..blocks - 1).step_by(5) {
        if !written(&WRITTEN.0, block) || !written(&WRITTEN.0, block + 1) {
            continue;
        }
        tried += 1;
        let (folder, _) = damaged(|bytes| {
            let (from, to) = (block * BLOCK, (block + 1) * BLOCK);
            bytes.copy_within(to..to + BLOCK, from);
        });
        assert!(!is_whole(folder.path()), "block {block} of the same file");
        let place = block * BLOCK..(block + 1) * BLOCK;
        if written(&other, block) && other[place.clone()] != WRITTEN.0[place.clone()] {
            let (folder, _) =
                damaged(|bytes| bytes[place.clone()].copy_from_slice(&other[place.clone()]));
            assert!(!is_whole(folder.path()), "block {block} of another file");
        }
    }
    assert!(tried > 10, "{tried}");
}

/// Of the two slots of a group's checksums, one counts. If it is damaged, the other one, which is
/// older, must not be taken for it: what was written since would read as zeros.
#[test]
fn older_checksums_are_not_taken_for_those_that_are_lost() {
    for flushes in 1..=4 {
        let folder = TempDir::new().unwrap();
        let keyspace = open(folder.path(), Some(first())).unwrap();
        for index in 1..=flushes {
            put(&keyspace, index, 30, 400);
        }
        let hash = keyspace.hash(0).unwrap().0;
        // As a crash leaves it, without what an orderly end writes.
        let bytes = fs::read(folder.path().join(ENGINE_FILE)).unwrap();
        let mut told = 0;
        for slot in [4, 5] {
            let crashed = TempDir::new().unwrap();
            let mut bytes = bytes.clone();
            bytes[slot * BLOCK + 700] ^= 1;
            fs::write(crashed.path().join(ENGINE_FILE), bytes).unwrap();
            match open(crashed.path(), None) {
                Ok(keyspace) => assert_eq!(keyspace.hash(0).unwrap().0, hash),
                Err(error) => {
                    assert!(error.is_damage(), "{error}");
                    told += 1;
                }
            }
        }
        assert_eq!(told, 1, "{flushes} flushes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// In a block that was written, it is told; elsewhere it does no harm.
    #[test]
    fn a_flipped_bit_is_never_served(place in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let at = place.index(WRITTEN.0.len());
        let (folder, _) = damaged(|bytes| bytes[at] ^= 1 << bit);
        let whole = is_whole(folder.path());
        let block = at / BLOCK;
        let was_written = WRITTEN.0[block * BLOCK..][..BLOCK].iter().any(|byte| *byte != 0);
        // Header and checksums are there more than once.
        prop_assert!(whole != (was_written && block >= 6) || block < 6, "block {}", block);
    }

    #[test]
    fn a_zeroed_range_is_never_served(
        place in any::<prop::sample::Index>(),
        length in 1_usize..200_000,
    ) {
        let at = place.index(WRITTEN.0.len());
        let (folder, _) = damaged(|bytes| {
            let end = (at + length).min(bytes.len());
            bytes[at..end].fill(0);
        });
        is_whole(folder.path());
    }

    #[test]
    fn garbage_is_no_keyspace(bytes in prop::collection::vec(any::<u8>(), 1..30_000)) {
        let (folder, _) = damaged(|file| *file = bytes);
        prop_assert!(!is_whole(folder.path()));
    }
}
