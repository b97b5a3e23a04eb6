//! The log under what disks do: torn tails are cut, a corrupt middle is told.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use keelson_member::disk::{BLOCK, Disk, Folder};
use keelson_member::log::{Log, Owner, Position};
use keelson_member::{Limits, MemberError};
use proptest::prelude::*;
use raft::Storage as _;
use raft::eraftpb::{ConfState, Entry, HardState};
use tempfile::TempDir;

const OWNER: Owner = Owner {
    cluster_id: 1,
    member_id: 2,
};

fn open(folder: &TempDir, applied: Position) -> Result<Log, MemberError> {
    let disk: Arc<dyn Disk> = Arc::new(Folder::open(folder.path()).unwrap());
    Log::open(
        disk,
        OWNER,
        applied,
        ConfState::default(),
        true,
        Limits::default(),
    )
}

fn entry(index: u64, term: u64, length: usize) -> Entry {
    Entry {
        index,
        term,
        data: vec![u8::try_from(index % 251).unwrap(); length],
        ..Entry::default()
    }
}

fn state(term: u64) -> HardState {
    HardState {
        term,
        vote: 1,
        commit: 0,
    }
}

/// A log of `frames` frames of one entry, one block each, behind index 1.
fn written(frames: u64) -> TempDir {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder, Position { index: 1, term: 1 }).unwrap();
    for index in 2..2 + frames {
        log.append(&[entry(index, 1, 100)], Some(&state(1)))
            .unwrap();
    }
    folder
}

fn segment(folder: &TempDir) -> PathBuf {
    folder.path().join(format!("log-{:016x}", 1))
}

fn reopened(folder: &TempDir) -> Result<Log, MemberError> {
    open(folder, Position { index: 1, term: 1 })
}

#[test]
fn entries_survive() {
    let folder = written(20);
    let log = reopened(&folder).unwrap();
    assert_eq!(log.last().index, 21);
    let entries = log
        .entries(2, 22, None, raft::GetEntriesContext::empty(false))
        .unwrap();
    assert_eq!(entries[7], entry(9, 1, 100));
    assert_eq!(log.hard_state().vote, 1);
}

/// Behind a snapshot, the log has nothing of before, also if what came before conflicts.
#[test]
fn a_restart_voids_what_was_before() {
    let folder = written(20);
    let snapshot = Position { index: 10, term: 4 };
    {
        let mut log = reopened(&folder).unwrap();
        log.restart(snapshot, &state(4)).unwrap();
        assert_eq!(log.last(), snapshot);
        log.append(&[entry(11, 4, 10)], None).unwrap();
    }
    let log = open(&folder, snapshot).unwrap();
    assert_eq!(log.last(), Position { index: 11, term: 4 });
    assert_eq!(log.hard_state().term, 4);
    assert!(log.term(9).is_err());
    assert_eq!(log.term(10).unwrap(), 4);
}

/// The member ended after the keyspace had the snapshot and before the log knew of it.
#[test]
fn a_snapshot_that_the_log_was_not_told_of_voids_it() {
    for snapshot in [
        Position { index: 10, term: 4 },
        Position { index: 90, term: 4 },
    ] {
        let folder = written(20);
        let log = open(&folder, snapshot).unwrap();
        assert_eq!(log.last(), snapshot);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever happens to the last frame, only that is lost; to one before it: an error.
    #[test]
    fn damage_is_cut_at_the_end_and_told_in_the_middle(
        frame in 1_usize..=12,
        byte in 0_usize..150,
        bit in 0_u8..8,
    ) {
        let folder = written(12);
        let path = segment(&folder);
        let mut bytes = fs::read(&path).unwrap();
        bytes[frame * BLOCK + byte] ^= 1 << bit;
        fs::write(&path, &bytes).unwrap();
        match reopened(&folder) {
            Ok(log) => {
                prop_assert_eq!(frame, 12, "what was synced before was lost silently");
                prop_assert_eq!(log.last().index, frame as u64);
            }
            Err(MemberError::Corrupt(_)) => prop_assert!(frame < 12),
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        }
    }

    /// A write that was torn, anywhere: what was synced before is there.
    #[test]
    fn a_torn_tail_is_cut(kept in 0_usize..BLOCK) {
        let folder = written(5);
        let path = segment(&folder);
        let mut bytes = fs::read(&path).unwrap();
        let tail = 5 * BLOCK;
        let whole = bytes.clone();
        bytes[tail + kept..tail + BLOCK].fill(0);
        fs::write(&path, &bytes).unwrap();
        let log = reopened(&folder).unwrap();
        // What is torn off may have been zeros: then nothing is missing.
        let expected = if bytes == whole { 6 } else { 5 };
        prop_assert_eq!(log.last().index, expected);
    }

    #[test]
    fn garbage_is_no_log(bytes in prop::collection::vec(any::<u8>(), 0..20_000)) {
        let folder = TempDir::new().unwrap();
        fs::write(segment(&folder), bytes).unwrap();
        // It was never a segment: the log begins.
        prop_assert_eq!(reopened(&folder).unwrap().last().index, 1);
    }
}
