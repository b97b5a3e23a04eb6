//! What other members send: any messages, to a member of three in any role. None makes it panic, and
//! what was applied stays. It may end because it was told, as a leader would, that it lost something.
#![no_main]

use std::sync::Arc;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{Authority, Command, Operation};
use keelson_member::disk::{Disk, Folder};
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::{
    Limits, Member, MemberOptions, PeerMessage, Start, decode_message, encode_message,
};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use raft::eraftpb::{Entry, MessageType};

const OWN: u64 = 1;

/// What happens to the member.
#[derive(Debug, Arbitrary)]
enum Event {
    /// These bytes come.
    Bytes(Vec<u8>),
    /// A message comes whose fields are small numbers, more often than not.
    Message(Fields),
    /// Time passes.
    Ticks(u8),
    /// A client wants something.
    Propose(u8),
    /// A client reads.
    Read(u8),
    /// Leadership is handed over.
    Transfer(u8),
}

#[derive(Debug, Arbitrary)]
struct Fields {
    kind: u8,
    from: u8,
    /// Relative to the member's.
    term: i8,
    index: Number,
    log_term: Number,
    commit: Number,
    reject_hint: Number,
    reject: bool,
    request_snapshot: u8,
    entries: Vec<AnyEntry>,
    /// The entries follow `index` in the message's term.
    in_line: bool,
    context: Vec<u8>,
}

#[derive(Debug, Arbitrary)]
enum Number {
    Small(u8),
    Any(u64),
}

#[derive(Debug, Arbitrary)]
struct AnyEntry {
    index: Number,
    term: Number,
    kind: u8,
    data: Data,
}

#[derive(Debug, Arbitrary)]
enum Data {
    Put(u8),
    Any(Vec<u8>),
}

fuzz_target!(|input: (u8, Vec<Event>)| {
    let (role, events) = input;
    let folder = tempfile::tempdir().expect("a folder");
    let mut member = member(folder.path(), role % 3);
    for event in events.into_iter().take(40) {
        let before = member.status();
        match event {
            Event::Bytes(bytes) => {
                if let Some(message) = decode_message(&bytes) {
                    member.step(message);
                }
            }
            Event::Message(fields) => {
                // As it would come over a connection.
                let bytes = encode_message(&fields.message(before.term));
                member.step(decode_message(&bytes).expect("it is one"));
            }
            Event::Ticks(count) => (0..count % 30).for_each(|_| member.tick()),
            Event::Propose(number) => drop(member.propose(put(u64::from(number)))),
            Event::Read(number) => drop(member.read_index(u64::from(number))),
            Event::Transfer(to) => member.transfer_leader(u64::from(to)),
        }
        match member.advance(&mut |_| {}) {
            Ok(_) => {}
            // Told by its leader that it lost entries; or an entry that no member proposes, which most
            // of the cluster would have had to commit.
            Err(error) => {
                assert!(error.is_damage(), "{error}");
                return;
            }
        }
        let now = member.status();
        assert!(now.applied >= before.applied && now.term >= before.term);
        let request = pb::RangeRequest {
            key: "first".into(),
            ..pb::RangeRequest::default()
        };
        let read = member.keyspace().range(&Authority::default(), &request);
        assert_eq!(read.expect("it reads").count, 1);
    }
});

impl Fields {
    fn message(self, own_term: u64) -> PeerMessage {
        let term = match self.term {
            i8::MIN => u64::MAX,
            i8::MAX => 0,
            more => own_term.saturating_add_signed(i64::from(more) / 16),
        };
        let index = self.index.value();
        let entries = (1..).zip(self.entries).map(|(at, entry)| Entry {
            index: if self.in_line { index.wrapping_add(at) } else { entry.index.value() },
            term: if self.in_line { term } else { entry.term.value() },
            entry_type: i32::from(entry.kind % 4),
            data: match entry.data {
                // The key that is looked at is never deleted by these.
                Data::Put(number) => put(u64::from(number)),
                Data::Any(bytes) => harmless(bytes),
            },
            ..Entry::default()
        });
        PeerMessage {
            msg_type: i32::from(self.kind % 22),
            from: u64::from(self.from % 5),
            to: OWN,
            term,
            index,
            log_term: self.log_term.value(),
            commit: self.commit.value(),
            reject_hint: self.reject_hint.value(),
            reject: self.reject,
            request_snapshot: u64::from(self.request_snapshot / 128),
            entries: entries.take(8).collect(),
            context: self.context,
            ..PeerMessage::default()
        }
    }
}

impl Number {
    fn value(&self) -> u64 {
        match self {
            Self::Small(number) => u64::from(*number % 16),
            Self::Any(number) => *number,
        }
    }
}

/// A command that is one, but for those that delete, or nothing that is one.
fn harmless(bytes: Vec<u8>) -> Vec<u8> {
    match Command::decode(&bytes[..]).map(|command| command.operation) {
        Ok(Some(Operation::DeleteRange(_) | Operation::Txn(_))) => Vec::new(),
        _ => bytes,
    }
}

fn put(number: u64) -> Vec<u8> {
    let put = pb::PutRequest {
        key: if number == 0 { "first".into() } else { format!("key{number}").into() },
        value: "value".into(),
        ..pb::PutRequest::default()
    };
    let command = Command {
        id: number,
        operation: Some(Operation::Put(put)),
        ..Command::default()
    };
    command.encode_to_vec()
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

/// A member of three at term 3, with entries up to 8, of which those up to 6 are committed: a follower,
/// a candidate or the leader.
fn member(folder: &std::path::Path, role: u8) -> Member {
    let disk: Arc<dyn Disk> = Arc::new(Folder::open(folder).expect("it opens"));
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
    let mut member = Member::open(&disk, &options).expect("a new member");
    let entries = (2..=8).map(|index| Entry {
        index,
        term: 3,
        data: put(index - 2),
        ..Entry::default()
    });
    member.step(PeerMessage {
        index: 1,
        log_term: 1,
        commit: 6,
        entries: entries.collect(),
        ..message(MessageType::MsgAppend, 2, 3)
    });
    advance(&mut member);
    assert_eq!(member.status().applied, 6);
    if role > 0 {
        while member.status().leader != 0 {
            member.tick();
            advance(&mut member);
        }
        let term = member.status().term;
        member.step(message(MessageType::MsgRequestPreVoteResponse, 2, term + 1));
        advance(&mut member);
    }
    if role > 1 {
        let term = member.status().term;
        member.step(message(MessageType::MsgRequestVoteResponse, 2, term));
        advance(&mut member);
        assert!(member.status().is_leader);
    }
    member
}

fn advance(member: &mut Member) {
    member.advance(&mut |_| {}).expect("nothing is wrong yet");
}
