//! Snapshots as streams: whole ones are loaded however they are cut, others are refused.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::sync::Arc;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{Command, Operation};
use keelson_member::disk::{Disk, Folder};
use keelson_member::keyspace::{FORMAT, Keyspace, Metadata, SnapshotWriter};
use keelson_member::{Limits, MemberError};
use proptest::prelude::*;
use tempfile::TempDir;

fn folder() -> (TempDir, Arc<dyn Disk>) {
    let folder = TempDir::new().unwrap();
    let disk = Folder::open(folder.path()).unwrap();
    (folder, Arc::new(disk))
}

fn empty(disk: &dyn Disk) -> Keyspace {
    let first = Metadata {
        format: FORMAT,
        revision: 1,
        compact_revision: -1,
        ..Metadata::default()
    };
    Keyspace::open(disk, 1 << 20, Some(first), Limits::default()).unwrap()
}

/// A keyspace with history, leases and attachments, as a stream; and its hash.
fn stream() -> (Vec<u8>, u32) {
    let (_folder, disk) = folder();
    let keyspace = empty(&*disk);
    let mut batch = keyspace.batch();
    let mut apply = |operation| {
        let command = Command {
            operation: Some(operation),
            ..Command::default()
        };
        batch.apply(command).unwrap().unwrap();
    };
    apply(Operation::LeaseGrant(pb::LeaseGrantRequest {
        ttl: 60,
        id: 7,
    }));
    for number in 0..40_u8 {
        apply(Operation::Put(pb::PutRequest {
            key: format!("key{}", number % 10).into(),
            value: vec![number; 40].into(),
            lease: if number % 3 == 0 { 7 } else { 0 },
            ..pb::PutRequest::default()
        }));
    }
    apply(Operation::DeleteRange(pb::DeleteRangeRequest {
        key: "key4".into(),
        ..pb::DeleteRangeRequest::default()
    }));
    batch.applied(42, 3);
    batch.finish();
    let flush = keyspace.begin_flush().unwrap();
    keyspace.flush(flush).unwrap().unwrap();
    let mut reader = keyspace.snapshot().unwrap();
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.next_chunk().unwrap() {
        bytes.extend(chunk);
    }
    (bytes, keyspace.hash(0).unwrap().0)
}

/// Loads a stream, cut into pieces, and installs it: the hash and the keys of the lease.
fn load(bytes: &[u8], cut: usize) -> Result<(u32, usize), MemberError> {
    let (_folder, disk) = folder();
    let mut writer = SnapshotWriter::new(Arc::clone(&disk), 1)?;
    for piece in bytes.chunks(cut) {
        writer.push(piece)?;
    }
    let staged = writer.finish()?;
    assert_eq!(staged.metadata().applied_index, 42);
    let keyspace = empty(&*disk);
    keyspace.install(&*disk, staged)?;
    let (_, keys) = keyspace.lease(7).unwrap();
    let hash = keyspace.hash(0).unwrap().0;
    // It is what is opened from now on.
    drop(keyspace);
    let keyspace = Keyspace::open(&*disk, 1 << 20, None, Limits::default())?;
    assert_eq!(keyspace.hash(0).unwrap().0, hash);
    Ok((hash, keys.len()))
}

#[test]
fn any_cut_gives_the_same() {
    let (bytes, hash) = stream();
    for cut in [1, 7, 100, bytes.len()] {
        let (loaded, keys) = load(&bytes, cut).unwrap();
        assert_eq!(loaded, hash);
        assert_eq!(keys, 4);
    }
    let mut padded = bytes.clone();
    padded.extend([0; 500]);
    assert_eq!(load(&padded, 64).unwrap().0, hash);
}

#[test]
fn what_is_cut_off_is_refused() {
    let (bytes, _) = stream();
    for length in (0..bytes.len()).step_by(97) {
        assert!(load(&bytes[..length], 64).is_err(), "{length} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_flipped_bit_is_refused(place in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let (mut bytes, _) = stream();
        let at = place.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(load(&bytes, 512).is_err());
    }

    #[test]
    fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(load(&bytes, 100).is_err());
    }
}
