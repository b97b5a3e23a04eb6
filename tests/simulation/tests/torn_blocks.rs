//! The keyspace on a disk that loses power in any call: what it tears is no damage, and nothing that
//! was flushed is lost.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{Command, Operation};
use keelson_member::keyspace::{FORMAT, Keyspace, Metadata};
use keelson_member::{Limits, MemberError};
use keelson_simulation::disk::{Loss, SimulatedDisk};
use keelson_simulation::random::Random;

fn open(disk: &SimulatedDisk) -> Result<Keyspace, MemberError> {
    let first = Metadata {
        format: FORMAT,
        revision: 1,
        compact_revision: -1,
        ..Metadata::default()
    };
    // So little that the engine writes some of its pages long before it commits.
    Keyspace::open(disk, 16 << 10, Some(first), Limits::default())
}

fn put(keyspace: &Keyspace, random: &mut Random, index: u64, keys: u64, length: usize) {
    let mut batch = keyspace.batch();
    for _ in 0..keys {
        let value = vec![u8::try_from(index % 251).unwrap(); random.index(length)];
        let put = pb::PutRequest {
            key: format!("key{}", random.below(300)).into(),
            value: value.into(),
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
}

fn flush(keyspace: &Keyspace) -> Result<(), MemberError> {
    keyspace.flush(keyspace.begin_flush().unwrap())?;
    Ok(())
}

fn verify(keyspace: &Keyspace) {
    let mut from = 0;
    loop {
        match keyspace.verify(from, 16) {
            Ok(0) => return,
            Ok(next) => from = next,
            Err(error) => panic!("a false alarm: {error}"),
        }
    }
}

/// Flushes until the power is lost, again and again; returns how often it was lost.
fn lose_power(seed: u64, rounds: u64, keys: u64, length: usize, calls: u64) -> u64 {
    let mut random = Random::new(seed);
    let disk = SimulatedDisk::new(random.fork());
    let mut losses = 0;
    let mut index = 0;
    let mut flushed = None;
    let mut loss = Loss::Nothing;
    for _ in 0..rounds {
        disk.boot(loss);
        let keyspace = open(&disk).unwrap();
        verify(&keyspace);
        let (hash, applied) = (
            keyspace.hash(0).unwrap().0,
            keyspace.metadata().applied_index,
        );
        if let Some((before, pending)) = flushed {
            assert!([before, pending].contains(&(hash, applied)), "seed {seed}");
        }
        let mut state = (hash, applied);
        index = index.max(applied);
        disk.set_fuse(random.below(calls));
        loop {
            index += 1;
            put(&keyspace, &mut random, index, keys, length);
            let next = (keyspace.hash(0).unwrap().0, index);
            flushed = Some((state, next));
            if flush(&keyspace).is_err() {
                break;
            }
            state = next;
            if random.percent(20) {
                verify(&keyspace);
            }
        }
        assert!(disk.is_stopped());
        losses += 1;
        loss = *random.pick(&[Loss::Some, Loss::Some, Loss::Unsynced, Loss::Nothing]);
        drop(keyspace);
    }
    losses
}

#[test]
fn blocks_that_a_power_loss_tore_are_no_damage() {
    for seed in 1..=5 {
        assert_eq!(lose_power(seed, 12, 40, 3000, 200), 12);
    }
}

/// Transactions of which more is written than waits in memory.
#[test]
fn so_are_those_of_large_transactions() {
    for seed in 1..=4 {
        assert_eq!(lose_power(seed, 8, 60, 400_000, 120), 8);
    }
}
