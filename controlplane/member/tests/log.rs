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
        log.begin_install(snapshot).unwrap();
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
        // What is ahead of the log for no reason is not believed.
        assert!(matches!(
            open(&folder, snapshot),
            Err(MemberError::Corrupt(_))
        ));
        reopened(&folder).unwrap().begin_install(snapshot).unwrap();
        for _ in 0..2 {
            let log = open(&folder, snapshot).unwrap();
            assert_eq!(log.last(), snapshot);
            assert_eq!(log.hard_state().term, 4);
        }
    }
}

/// A log that lost its end, its votes, or a file in its middle.
#[test]
fn what_is_missing_is_told() {
    let lost = |what: &str, folder: &TempDir, applied: Position| {
        let error = open(folder, applied).unwrap_err();
        assert!(error.is_damage(), "{what}: {error}");
    };
    let begin = Position { index: 1, term: 1 };
    let folder = written(20);
    lost(
        "the keyspace is ahead",
        &folder,
        Position { index: 22, term: 1 },
    );
    lost("another term", &folder, Position { index: 9, term: 2 });
    fs::remove_file(folder.path().join("vote")).unwrap();
    lost("no vote", &folder, begin);

    let folder = written(20);
    let older = fs::read(folder.path().join("vote")).unwrap();
    let mut log = reopened(&folder).unwrap();
    log.append(&[], Some(&state(7))).unwrap();
    log.append(&[entry(22, 7, 10)], None).unwrap();
    drop(log);
    fs::write(folder.path().join("vote"), &older).unwrap();
    lost("an older vote", &folder, begin);

    let folder = written(20);
    let log = fs::OpenOptions::new()
        .write(true)
        .open(segment(&folder))
        .unwrap();
    log.set_len(10 * BLOCK as u64).unwrap();
    lost("cut off", &folder, begin);
    log.set_len(16 << 20).unwrap();
    lost("zeros at the end", &folder, begin);
    fs::remove_file(segment(&folder)).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(Folder::open(folder.path()).unwrap());
    let error = Log::open(
        disk,
        OWNER,
        begin,
        ConfState::default(),
        false,
        Limits::default(),
    )
    .unwrap_err();
    assert!(error.is_damage(), "{error}");
}

/// Preparing a file was broken off: it is not taken for a segment.
#[test]
fn a_prepared_file_that_is_too_short_is_not_used() {
    let folder = written(3);
    fs::write(folder.path().join("spare-0000000000000009"), [0; 5000]).unwrap();
    let mut log = reopened(&folder).unwrap();
    assert!(!folder.path().join("spare-0000000000000009").exists());
    let at = Position { index: 30, term: 1 };
    log.begin_install(at).unwrap();
    log.restart(at, &state(1)).unwrap();
    log.append(&[entry(31, 1, 100)], None).unwrap();
    drop(log);
    assert_eq!(open(&folder, at).unwrap().last().index, 31);
}

/// Files of another member, of the first format, of a newer one.
#[test]
fn files_of_others() {
    for file in ["vote", "log-0000000000000001"] {
        let folder = written(3);
        let disk: Arc<dyn Disk> = Arc::new(Folder::open(folder.path()).unwrap());
        let other = Owner {
            member_id: 3,
            ..OWNER
        };
        if file == "vote" {
            fs::remove_file(segment(&folder)).unwrap();
        } else {
            fs::remove_file(folder.path().join("vote")).unwrap();
        }
        let applied = Position { index: 1, term: 1 };
        let error = Log::open(
            disk,
            other,
            applied,
            ConfState::default(),
            false,
            Limits::default(),
        )
        .unwrap_err();
        let foreign = matches!(error, MemberError::Foreign(_));
        assert_eq!(foreign, file != "vote", "{error}");
    }
    for (format, newer) in [(1_u8, false), (9, true)] {
        let folder = written(3);
        let mut bytes = fs::read(segment(&folder)).unwrap();
        bytes[8] = format;
        let sum = crc32fast::hash(&bytes[..56]).to_le_bytes();
        bytes[56..60].copy_from_slice(&sum);
        fs::write(segment(&folder), &bytes).unwrap();
        let error = reopened(&folder).unwrap_err();
        match error {
            MemberError::Newer { found: 9, .. } => assert!(newer),
            MemberError::Older { found: 1, .. } => assert!(!newer),
            other => panic!("{other}"),
        }
    }
}

/// An entry that is damaged while the log is open is not given out.
#[test]
fn a_damaged_entry_is_not_read() {
    let folder = TempDir::new().unwrap();
    let mut log = reopened(&folder).unwrap();
    // More than is in memory.
    for index in 2..20 {
        log.append(&[entry(index, 1, 400_000)], Some(&state(1)))
            .unwrap();
    }
    let first = |log: &Log| {
        log.entries(2, 3, None, raft::GetEntriesContext::empty(false))
            .unwrap()
    };
    assert_eq!(first(&log), [entry(2, 1, 400_000)]);
    let mut bytes = fs::read(segment(&folder)).unwrap();
    bytes[2 * BLOCK + 70_000] ^= 4;
    fs::write(segment(&folder), &bytes).unwrap();
    assert_eq!(first(&log), []);
    assert!(log.damage().unwrap().is_damage());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// A bit in any frame: what was synced was there.
    #[test]
    fn a_flipped_bit_is_told(
        frame in 1_usize..=12,
        byte in 0_usize..512,
        bit in 0_u8..8,
        marked in any::<bool>(),
    ) {
        let folder = written(12);
        if !marked {
            let vote = folder.path().join("vote");
            let mut bytes = fs::read(&vote).unwrap();
            for slot in [2, 5] {
                bytes[slot * BLOCK..][..512.min(BLOCK - 1)].fill(0);
            }
            fs::write(&vote, &bytes).unwrap();
        }
        let path = segment(&folder);
        let mut bytes = fs::read(&path).unwrap();
        // The log's own beginning is the first frame.
        bytes[(1 + frame) * BLOCK + byte] ^= 1 << bit;
        fs::write(&path, &bytes).unwrap();
        match reopened(&folder) {
            Err(error) => prop_assert!(error.is_damage()),
            Ok(_) => return Err(TestCaseError::fail("it is not told")),
        }
    }

    /// A bit in the file of votes: the other copy is there.
    #[test]
    fn a_vote_survives_a_flipped_bit(slot in 0_usize..6, byte in 0_usize..92, bit in 0_u8..8) {
        let folder = written(3);
        let mut log = reopened(&folder).unwrap();
        log.append(&[], Some(&state(5))).unwrap();
        drop(log);
        let path = folder.path().join("vote");
        let mut bytes = fs::read(&path).unwrap();
        bytes[slot * BLOCK + byte] ^= 1 << bit;
        fs::write(&path, &bytes).unwrap();
        for _ in 0..2 {
            let log = reopened(&folder).unwrap();
            prop_assert_eq!((log.hard_state().term, log.hard_state().vote), (5, 1));
        }
    }

    /// A write that was torn, in any way: what was synced before is there, and the log goes on.
    #[test]
    fn a_torn_tail_is_cut(kept in prop::collection::vec(any::<bool>(), 7)) {
        let folder = written(4);
        let vote = folder.path().join("vote");
        let before = fs::read(&vote).unwrap();
        let mut log = reopened(&folder).unwrap();
        log.append(&[entry(6, 1, 3000)], None).unwrap();
        drop(log);
        let path = segment(&folder);
        let mut bytes = fs::read(&path).unwrap();
        for (at, kept) in kept.iter().enumerate() {
            if !kept {
                bytes[6 * BLOCK + at * 512..][..512].fill(0);
            }
        }
        let whole = kept.iter().all(|kept| *kept);
        fs::write(&path, &bytes).unwrap();
        if !whole {
            // If it is known that it was synced, it is not torn.
            prop_assert!(reopened(&folder).unwrap_err().is_damage());
        }
        fs::write(&vote, &before).unwrap();
        let mut log = reopened(&folder).unwrap();
        prop_assert_eq!(log.last().index, if whole { 6 } else { 5 });
        let next = log.last().index + 1;
        log.append(&[entry(next, 1, 700)], None).unwrap();
        drop(log);
        prop_assert_eq!(reopened(&folder).unwrap().last().index, next);
    }

    #[test]
    fn garbage_is_no_log(bytes in prop::collection::vec(any::<u8>(), 1..20_000), long in any::<bool>()) {
        let folder = TempDir::new().unwrap();
        fs::write(segment(&folder), bytes).unwrap();
        if long {
            let file = fs::OpenOptions::new().write(true).open(segment(&folder)).unwrap();
            file.set_len(16 << 20).unwrap();
        }
        prop_assert!(reopened(&folder).unwrap_err().is_damage());
    }
}
