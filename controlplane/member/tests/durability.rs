//! What others rely on is durable first: a member that loses power right then has not forgotten it.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

mod lossy;

use std::sync::Arc;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{Command, Operation};
use keelson_member::disk::Disk;
use keelson_member::keyspace::{FORMAT, Keyspace, Member as MemberInfo, Metadata};
use keelson_member::replica::{Job, Maintenance, Wanted};
use keelson_member::{
    ChangeKind, Limits, Member, MemberOptions, MembershipChange, PeerMessage, Start,
};
use lossy::LossyDisk;

const NOTHING_WANTED: Wanted = Wanted {
    spares: 0,
    flush: false,
};

fn open_keyspace(disk: &LossyDisk, first: Option<Metadata>) -> Keyspace {
    Keyspace::open(disk, 64 << 10, first, Limits::default()).unwrap()
}

fn new_keyspace(disk: &LossyDisk) -> Keyspace {
    let first = Metadata {
        format: FORMAT,
        revision: 1,
        compact_revision: -1,
        ..Metadata::default()
    };
    open_keyspace(disk, Some(first))
}

fn apply(keyspace: &Keyspace, index: u64, operation: Operation) {
    let mut batch = keyspace.batch();
    let command = Command {
        operation: Some(operation),
        ..Command::default()
    };
    batch.apply(command).unwrap().unwrap();
    batch.applied(index, 1);
    batch.finish();
}

/// Writes one key again and again, with one log index and one revision each.
fn write(keyspace: &Keyspace, indices: std::ops::RangeInclusive<u64>) {
    for index in indices {
        let put = pb::PutRequest {
            key: "key".into(),
            value: format!("value {index}").into(),
            ..pb::PutRequest::default()
        };
        apply(keyspace, index, Operation::Put(put));
    }
}

fn compact(keyspace: &Keyspace, index: u64, revision: i64) {
    let compaction = pb::CompactionRequest {
        revision,
        physical: false,
    };
    apply(keyspace, index, Operation::Compact(compaction));
}

fn flush(keyspace: &Keyspace) {
    let flush = keyspace.begin_flush().unwrap();
    keyspace.flush(flush).unwrap().unwrap();
}

/// Revisions of all events that the engine has, as a watch from the beginning would be told.
fn events(keyspace: &Keyspace) -> Vec<i64> {
    let mut revisions = Vec::new();
    let mut from = 2;
    while from <= keyspace.revision() {
        let history = keyspace.history(from, |_| true).unwrap();
        revisions.extend(history.events.iter().map(|event| event.kv.mod_revision));
        assert!(history.revision >= from, "it does not go on");
        from = history.revision + 1;
    }
    revisions
}

/// A compaction that only memory knows of removes nothing: after a loss of power it has not happened,
/// and a watch from before it is owed every event.
#[test]
fn history_stays_until_its_compaction_is_durable() {
    let disk = LossyDisk::default();
    let keyspace = new_keyspace(&disk);
    write(&keyspace, 1..=20);
    flush(&keyspace);
    compact(&keyspace, 21, 15);
    while keyspace.clear_compacted().unwrap() {}
    let after = open_keyspace(&disk.after_power_loss(), None);
    assert_eq!(after.revisions(), (21, -1));
    assert_eq!(events(&after), (2..=21).collect::<Vec<i64>>());
    // Once it is durable, history may go.
    flush(&keyspace);
    while keyspace.clear_compacted().unwrap() {}
    let after = open_keyspace(&disk.after_power_loss(), None);
    assert_eq!(after.revisions(), (21, 15));
    assert!(after.history(2, |_| true).is_err());
}

/// The same where a flush is under way that began before the compaction: what is removed then, and
/// that there is still something to remove.
#[test]
fn a_flush_that_began_before_a_compaction_does_not_make_it_durable() {
    let disk = LossyDisk::default();
    let keyspace = new_keyspace(&disk);
    write(&keyspace, 1..=20);
    let under_way = keyspace.begin_flush().unwrap();
    compact(&keyspace, 21, 15);
    let mut maintenance = Maintenance::new(1);
    let jobs = maintenance.plan(NOTHING_WANTED, &keyspace);
    keyspace.flush(under_way).unwrap().unwrap();
    for job in jobs {
        maintenance.run(job, &keyspace, &disk).unwrap();
    }
    let after = open_keyspace(&disk.after_power_loss(), None);
    assert_eq!(after.revisions(), (21, -1));
    assert_eq!(events(&after), (2..=21).collect::<Vec<i64>>());
    // It is not forgotten either: history goes with the next flush, which is wanted now.
    let jobs = maintenance.plan(NOTHING_WANTED, &keyspace);
    assert!(matches!(jobs[..], [Job::Flush(_), Job::ClearCompacted(15)]));
    for job in jobs {
        maintenance.run(job, &keyspace, &disk).unwrap();
    }
    let jobs = maintenance.plan(NOTHING_WANTED, &keyspace);
    assert!(!jobs.iter().any(|job| matches!(job, Job::ClearCompacted(_))));
    let after = open_keyspace(&disk.after_power_loss(), None);
    assert_eq!(after.revisions(), (21, 15));
}

/// A member of a cluster of two on a disk of its own.
fn member(disk: &LossyDisk, id: u64, start: Start) -> Member {
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let options = MemberOptions {
        cluster_id: 1,
        id,
        start,
        election_ticks: 10,
        seed: id,
        cache_bytes: 64 << 10,
        limits: Limits {
            segment_bytes: 64 << 10,
            ..Limits::default()
        },
    };
    Member::open(&disk, &options).unwrap()
}

/// Who hears of its removal ends, and is no help any more. So before it hears, the leader knows it for
/// good: one that loses power in this very moment leads again, alone.
#[test]
fn a_removal_is_durable_before_anybody_hears_of_it() {
    let disks = [LossyDisk::default(), LossyDisk::default()];
    let infos = [1, 2].map(|id| MemberInfo {
        id,
        ..MemberInfo::default()
    });
    let mut first = member(&disks[0], 1, Start::New(infos.to_vec()));
    let mut second = member(&disks[1], 2, Start::New(infos.to_vec()));
    while !first.status().is_leader {
        first.tick();
        exchange(&mut first, &mut second, |_| {});
    }
    let change = MembershipChange {
        id: 1,
        kind: ChangeKind::Remove.into(),
        member: Some(infos[1].clone()),
    };
    first.propose_change(&change).unwrap();
    let removal = first.status().committed + 1;
    // What the leader's disk would keep when the other one first hears that it is committed.
    let mut kept = None;
    for _ in 0..5 {
        exchange(&mut first, &mut second, |message| {
            if message.to == 2 && message.commit >= removal && kept.is_none() {
                kept = Some(disks[0].after_power_loss());
            }
        });
        first.tick();
    }
    let kept = kept.expect("it never heard");
    drop(first);
    let mut alone = member(&kept, 1, Start::Continue);
    for _ in 0..100 {
        alone.tick();
        alone.advance(&mut |_| {}).unwrap();
    }
    let status = alone.status();
    assert!(status.is_leader && status.is_alone, "{status:?}");
}

/// Messages go back and forth until there are none; `seen` is shown each as it is sent.
fn exchange(first: &mut Member, second: &mut Member, mut seen: impl FnMut(&PeerMessage)) {
    loop {
        let mut messages = Vec::new();
        for member in [&mut *first, &mut *second] {
            let mut send = |message: PeerMessage| {
                seen(&message);
                messages.push(message);
            };
            member.advance(&mut send).unwrap();
        }
        if messages.is_empty() {
            return;
        }
        for message in messages {
            if message.to == 1 {
                first.step(message);
            } else {
                second.step(message);
            }
        }
    }
}
