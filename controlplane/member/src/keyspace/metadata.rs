//! Everything about the state machine that is neither a key nor a lease, stored with each flush.

use std::sync::LazyLock;

use keelson_etcd_api::etcdserverpb as pb;
use prost::Message;
use raft::eraftpb::ConfState;

use super::auth::Auth;
use crate::MemberError;

/// Format of the engine's tables and of this message.
pub const FORMAT: u64 = 1;

/// State of the whole keyspace at one log index.
#[derive(Clone, PartialEq, Message)]
pub struct Metadata {
    /// [`FORMAT`] of what wrote it.
    #[prost(uint64, tag = "1")]
    pub format: u64,
    /// The cluster that the data belongs to.
    #[prost(uint64, tag = "2")]
    pub cluster_id: u64,
    /// Log index up to which the data has every entry.
    #[prost(uint64, tag = "3")]
    pub applied_index: u64,
    /// Term of that entry.
    #[prost(uint64, tag = "4")]
    pub applied_term: u64,
    /// The current revision.
    #[prost(int64, tag = "5")]
    pub revision: i64,
    /// Revisions before this can't be read; 0 if history was never compacted.
    #[prost(int64, tag = "6")]
    pub compact_revision: i64,
    /// Voters and learners by id.
    #[prost(message, optional, tag = "7")]
    pub consensus: Option<Configuration>,
    /// The members.
    #[prost(message, repeated, tag = "8")]
    pub members: Vec<Member>,
    /// Members that were removed; their ids are never taken again.
    #[prost(uint64, repeated, tag = "9")]
    pub removed_members: Vec<u64>,
    /// Alarms that are raised: member and kind (`etcdserverpb.AlarmType`).
    #[prost(message, repeated, tag = "10")]
    pub alarms: Vec<Alarm>,
    /// Users and roles; `None` if there never were any.
    #[prost(message, optional, tag = "11")]
    pub auth: Option<Auth>,
    /// Digest of everything that was applied.
    #[prost(fixed64, tag = "12")]
    pub digest: u64,
}

static NO_AUTH: LazyLock<Auth> = LazyLock::new(Auth::new);

/// The voters and learners of consensus, also during a joint change.
#[derive(Clone, PartialEq, Message)]
pub struct Configuration {
    /// Ids of voters.
    #[prost(uint64, repeated, tag = "1")]
    pub voters: Vec<u64>,
    /// Ids of learners.
    #[prost(uint64, repeated, tag = "2")]
    pub learners: Vec<u64>,
    /// Voters of the configuration that a joint change leaves.
    #[prost(uint64, repeated, tag = "3")]
    pub voters_outgoing: Vec<u64>,
    /// Voters that become learners when the joint change ends.
    #[prost(uint64, repeated, tag = "4")]
    pub learners_next: Vec<u64>,
    /// Whether the joint change ends by itself.
    #[prost(bool, tag = "5")]
    pub auto_leave: bool,
}

/// A member of the cluster.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Member {
    /// Its id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Its name; empty until it has started once.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Where other members reach it.
    #[prost(string, repeated, tag = "3")]
    pub peer_urls: Vec<String>,
    /// Where clients reach it; empty until it has started once.
    #[prost(string, repeated, tag = "4")]
    pub client_urls: Vec<String>,
    /// Whether it has no vote.
    #[prost(bool, tag = "5")]
    pub is_learner: bool,
    /// The number of the last time that it was rebuilt; 0 if it never was.
    #[prost(uint64, tag = "6")]
    pub rebuild: u64,
}

/// A raised alarm.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Alarm {
    /// The member that raised it.
    #[prost(uint64, tag = "1")]
    pub member_id: u64,
    /// `etcdserverpb.AlarmType`.
    #[prost(int32, tag = "2")]
    pub kind: i32,
}

impl Metadata {
    /// Whether CORRUPT is raised: members differ, and nobody knows which of them are right.
    pub fn is_corrupt(&self) -> bool {
        let corrupt = pb::AlarmType::Corrupt as i32;
        self.alarms.iter().any(|alarm| alarm.kind == corrupt)
    }

    /// Users and roles.
    pub fn auth(&self) -> &Auth {
        self.auth.as_ref().unwrap_or(&NO_AUTH)
    }

    /// Whether what needs more room is refused: NOSPACE is raised for so many voters that the others
    /// are no quorum, or for none in particular.
    pub fn refuses_growth(&self) -> bool {
        let full = self
            .alarms
            .iter()
            .filter(|alarm| alarm.kind == pb::AlarmType::Nospace as i32);
        let mut voters = self.members.iter().filter(|member| !member.is_learner);
        let quorum = voters.clone().count() / 2 + 1;
        let full: Vec<u64> = full.map(|alarm| alarm.member_id).collect();
        let is_member = |id: &u64| self.members.iter().any(|member| member.id == *id);
        if !full.iter().all(is_member) {
            return true;
        }
        let with_room = voters.by_ref().filter(|voter| !full.contains(&voter.id));
        with_room.count() < quorum
    }

    /// Makes its members the voters of a cluster that begins here.
    pub fn found(&mut self) {
        let mut voters: Vec<u64> = self.members.iter().map(|member| member.id).collect();
        voters.sort_unstable();
        self.applied_index = 1;
        self.applied_term = 1;
        self.consensus = Some(Configuration {
            voters,
            ..Configuration::default()
        });
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.encode_to_vec();
        let sum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, MemberError> {
        let corrupt = || MemberError::Corrupt("the keyspace's metadata fails its checksum".into());
        let (body, sum) = bytes.split_last_chunk::<4>().ok_or_else(corrupt)?;
        if crc32fast::hash(body).to_le_bytes() != *sum {
            return Err(corrupt());
        }
        let metadata = <Self as Message>::decode(body).map_err(|_| corrupt())?;
        if metadata.format > FORMAT {
            return Err(MemberError::Newer {
                what: "the keyspace".into(),
                found: metadata.format,
                known: FORMAT,
            });
        }
        Ok(metadata)
    }
}

impl From<ConfState> for Configuration {
    fn from(state: ConfState) -> Self {
        // Consensus gives them in an order that is its own: members' metadata is to be the same.
        let sorted = |mut ids: Vec<u64>| {
            ids.sort_unstable();
            ids
        };
        Self {
            voters: sorted(state.voters),
            learners: sorted(state.learners),
            voters_outgoing: sorted(state.voters_outgoing),
            learners_next: sorted(state.learners_next),
            auto_leave: state.auto_leave,
        }
    }
}

impl From<Configuration> for ConfState {
    fn from(state: Configuration) -> Self {
        Self {
            voters: state.voters,
            learners: state.learners,
            voters_outgoing: state.voters_outgoing,
            learners_next: state.learners_next,
            auto_leave: state.auto_leave,
        }
    }
}
