//! What a [`Replica`](super::Replica) is told, and what follows from it.

use crate::command::{Authority, Operation, Response};
use crate::keyspace::{Member as MemberInfo, Metadata, StagedSnapshot};
use crate::{
    ConsensusStatus, MemberError, MembershipChange, PeerMessage, RequestError, replica::Wanted,
};

/// Tells a request from others that wait for this replica; chosen by its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What a replica is told. Requests are answered by [`Effect::Answer`], or never.
#[derive(Debug)]
pub enum Input {
    /// A command, and who wants it if that is not the member. Answered by [`Answer::Outcome`].
    Propose(RequestId, Operation, Option<Authority>),
    /// A change of membership. Answered by [`Answer::Members`].
    Change(RequestId, MembershipChange),
    /// Answered by [`Answer::Read`] when a read sees everything acknowledged before.
    Read(RequestId),
    /// Gives a lease its full time again. Answered by [`Answer::Renewed`].
    RenewLease(RequestId, i64),
    /// Asks how long a lease has left. Answered by [`Answer::Remaining`].
    LeaseRemaining(RequestId, i64),
    /// Asks how far members follow, this one above all. Answered by [`Answer::Progress`].
    Progress(RequestId, u64),
    /// From another member.
    Message(PeerMessage),
    /// A member can't be reached.
    Unreachable(u64),
    /// Leadership is to go to this member.
    Transfer(u64),
    /// A snapshot came from the leader: the message that offered it, and its data.
    Snapshot(Box<(PeerMessage, StagedSnapshot)>),
    /// A snapshot for this member was sent, or was not.
    SnapshotSent(u64, bool),
    /// The keyspace is on disk as of this metadata.
    Flushed(Box<Metadata>),
    /// A file for the log is prepared.
    Spare(String),
    /// A background task can't go on.
    Failed(MemberError),
}

/// What follows from inputs, in this order.
#[derive(Debug)]
pub enum Effect {
    /// What the member knows of its cluster has changed.
    Status(ConsensusStatus),
    /// A message goes to another member. One that offers a snapshot goes with what
    /// [`Keyspace::snapshot`](crate::keyspace::Keyspace::snapshot) reads.
    Send(PeerMessage),
    /// A request is answered.
    Answer(RequestId, Answer),
    /// [`Maintenance`](super::Maintenance) may have something to do.
    Maintain(Wanted),
}

/// The answer to a request.
#[derive(Debug)]
pub enum Answer {
    /// To [`Input::Propose`].
    Outcome(Result<Response, RequestError>),
    /// To [`Input::Change`]: the members after it.
    Members(Result<Vec<MemberInfo>, RequestError>),
    /// To [`Input::Read`].
    Read,
    /// To [`Input::RenewLease`]: the seconds the lease has again; `None` if there is no such lease.
    Renewed(Result<Option<i64>, RequestError>),
    /// To [`Input::LeaseRemaining`], in milliseconds; `None` if there is no such lease.
    Remaining(Result<Option<u64>, RequestError>),
    /// To [`Input::Progress`].
    Progress(Result<Progress, RequestError>),
}

/// How far members follow the leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Whether the member that was asked about follows closely enough to vote.
    pub caught_up: bool,
    /// Members that the leader hears of, itself included.
    pub active: Vec<u64>,
    /// Voters among them that could lead, this one not, those first that follow most closely.
    pub voters: Vec<u64>,
}
