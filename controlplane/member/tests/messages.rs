//! Whatever another member sends: no panic, and nothing that was committed changes.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::sync::Arc;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{Command, Operation};
use keelson_member::disk::{Disk, Folder};
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::{Limits, Member, MemberOptions, PeerMessage, Start};
use proptest::prelude::*;
use prost::Message as _;
use raft::eraftpb::{Entry, EntryType, MessageType};
use tempfile::TempDir;

const OWN: u64 = 1;

/// What the member is when messages come.
#[derive(Debug, Clone, Copy)]
enum Role {
    Follower,
    Candidate,
    Leader,
}

fn put(number: u64) -> Vec<u8> {
    let put = pb::PutRequest {
        key: format!("key{number}").into(),
        value: "value".into(),
        ..pb::PutRequest::default()
    };
    Command {
        id: number,
        operation: Some(Operation::Put(put)),
        ..Command::default()
    }
    .encode_to_vec()
}

fn message(kind: MessageType, from: u64, term: u64) -> PeerMessage {
    PeerMessage {
        msg_type: kind.into(),
        from,
        to: OWN,
        term,
        ..PeerMessage::default()
    }
}

fn entry(index: u64, term: u64) -> Entry {
    Entry {
        index,
        term,
        data: put(index),
        ..Entry::default()
    }
}

/// A member of three at term 3, with entries up to 8, of which those up to 6 are committed.
fn member(role: Role) -> (TempDir, Member) {
    let folder = TempDir::new().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(Folder::open(folder.path()).unwrap());
    let members = (1..=3).map(|id| MemberInfo {
        id,
        ..MemberInfo::default()
    });
    let options = MemberOptions {
        cluster_id: 1,
        id: OWN,
        start: Start::New(members.collect()),
        election_ticks: 10,
        seed: 1,
        cache_bytes: 64 << 10,
        limits: Limits {
            segment_bytes: 64 << 10,
            ..Limits::default()
        },
    };
    let mut member = Member::open(&disk, &options).unwrap();
    member.step(PeerMessage {
        index: 1,
        log_term: 1,
        commit: 6,
        entries: (2..=8).map(|index| entry(index, 3)).collect(),
        ..message(MessageType::MsgAppend, 2, 3)
    });
    member.advance(&mut |_| {}).unwrap();
    assert_eq!((member.status().term, member.status().applied), (3, 6));
    if matches!(role, Role::Candidate | Role::Leader) {
        while member.status().leader != 0 {
            member.tick();
            member.advance(&mut |_| {}).unwrap();
        }
        let term = member.status().term;
        member.step(message(MessageType::MsgRequestPreVoteResponse, 2, term + 1));
        member.advance(&mut |_| {}).unwrap();
    }
    if matches!(role, Role::Leader) {
        let term = member.status().term;
        member.step(message(MessageType::MsgRequestVoteResponse, 2, term));
        member.advance(&mut |_| {}).unwrap();
        assert!(member.status().is_leader);
    }
    (folder, member)
}

fn small() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0_u64..12, 1 => any::<u64>(), 1 => Just(u64::MAX)]
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let data = prop_oneof![
        3 => (0_u64..9).prop_map(put),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    (small(), small(), data, 0..4_i32).prop_map(|(index, term, data, kind)| Entry {
        index,
        term,
        data,
        entry_type: kind,
        ..Entry::default()
    })
}

prop_compose! {
    fn any_message()(
        kind in 0..21_i32,
        ids in (prop_oneof![5 => 2..=3_u64, 1 => small()], prop_oneof![9 => Just(OWN), 1 => small()]),
        numbers in (small(), small(), small(), small(), small(), small()),
        entries in prop::collection::vec(any_entry(), 0..4),
        line_up in any::<bool>(),
        flags in (any::<bool>(), 0..3_u64),
        context in prop::collection::vec(any::<u8>(), 0..10),
    ) -> PeerMessage {
        let mut entries = entries;
        if line_up {
            for (at, entry) in (1..).zip(&mut entries) {
                entry.index = numbers.1.wrapping_add(at);
                entry.term = numbers.0;
                entry.entry_type = EntryType::EntryNormal.into();
                entry.data = put(at);
            }
        }
        PeerMessage {
            msg_type: kind,
            from: ids.0,
            to: ids.1,
            term: numbers.0,
            index: numbers.1,
            log_term: numbers.2,
            commit: numbers.3,
            commit_term: numbers.4,
            reject_hint: numbers.5,
            reject: flags.0,
            request_snapshot: flags.1 / 2,
            entries,
            context,
            ..PeerMessage::default()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_message_makes_a_member_panic(
        role in prop_oneof![Just(Role::Follower), Just(Role::Candidate), Just(Role::Leader)],
        messages in prop::collection::vec(any_message(), 1..20),
    ) {
        let (_folder, mut member) = member(role);
        let applied = member.status().applied;
        for message in messages {
            member.step(message);
            match member.advance(&mut |_| {}) {
                Ok(_) => {}
                // Told by its leader that it lost entries; or an entry that no member proposes, which
                // most of the cluster would have had to commit.
                Err(error) => {
                    prop_assert!(error.is_damage(), "{error}");
                    return Ok(());
                }
            }
            member.tick();
            prop_assert!(member.status().applied >= applied);
            let request = pb::RangeRequest { key: "key4".into(), ..pb::RangeRequest::default() };
            let read = member.keyspace().range(&keelson_member::command::Authority::default(), &request);
            prop_assert_eq!(&read.unwrap().kvs[0].value[..], b"value");
        }
    }
}

/// A leader that lies about its term, or is not the one of its term, is not followed.
#[test]
fn lies_are_not_followed() {
    let (_folder, mut member) = member(Role::Follower);
    let append = |from, term, index| PeerMessage {
        index: 8,
        log_term: 3,
        commit: 9,
        entries: vec![entry(index, term)],
        ..message(MessageType::MsgAppend, from, term)
    };
    for lie in [append(3, 3, 9), append(2, u64::MAX, 9), append(2, 3, 7)] {
        member.step(lie);
        member.advance(&mut |_| {}).unwrap();
        let status = member.status();
        assert_eq!((status.term, status.leader, status.applied), (3, 2, 6));
    }
    member.step(append(2, 3, 9));
    member.advance(&mut |_| {}).unwrap();
    assert_eq!(member.status().applied, 9);
    // Its leader knows more of it than it has itself.
    member.step(PeerMessage {
        commit: 12,
        ..message(MessageType::MsgHeartbeat, 2, 3)
    });
    let error = member.advance(&mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("older copies"), "{error}");
}
