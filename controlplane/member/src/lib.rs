//! A member of the replicated state store: log, consensus, state machine and watches, without
//! network, clock or thread of its own. The disk is given from outside ([`disk::Disk`]).

pub mod command;
pub mod disk;
mod error;
mod guard;
mod identity;
pub mod keyspace;
pub mod lessor;
mod limits;
pub mod log;
mod logger;
mod member;
mod planted;
pub mod rebuild;
mod recover;
pub mod replica;
pub mod watch;

pub use raft::eraftpb::Message as PeerMessage;

pub use self::error::{Damage, Failure, MemberError, RequestError};
pub use self::guard::{Refusal, check_form, check_term};
pub use self::identity::Identity;
pub use self::limits::Limits;
pub use self::recover::recover;

pub use self::member::{
    ChangeKind, ConsensusStatus, Member, MemberOptions, MembershipChange, Output, Start,
};
#[cfg(feature = "planted-bugs")]
pub use self::planted::{PlantedBug, plant};

/// The message as other members read it.
pub fn encode_message(message: &PeerMessage) -> Vec<u8> {
    prost_of_raft::Message::encode_to_vec(message)
}

/// Whether a message offers a snapshot, whose data goes beside it.
pub fn is_snapshot(message: &PeerMessage) -> bool {
    message.msg_type() == raft::eraftpb::MessageType::MsgSnapshot
}

/// Whether a message hands a command, or a change of membership, to the leader.
pub fn is_proposal(message: &PeerMessage) -> bool {
    message.msg_type() == raft::eraftpb::MessageType::MsgPropose
}

/// A message that another member encoded; garbage is `None`.
pub fn decode_message(bytes: &[u8]) -> Option<PeerMessage> {
    prost_of_raft::Message::decode(bytes).ok()
}
