//! Changes of membership, from the proposal until they are applied.

use prost::Message as _;
use raft::StateRole;
use raft::eraftpb::{ConfChange, ConfChangeType};

use super::Member;
use crate::keyspace::{Member as MemberInfo, Metadata};
use crate::{MemberError, RequestError};

/// A change of membership, in the context of its entry.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MembershipChange {
    /// As [`Command::id`].
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// What it does: one of [`ChangeKind`].
    #[prost(enumeration = "ChangeKind", tag = "2")]
    pub kind: i32,
    /// The member, with what is to be known of it.
    #[prost(message, optional, tag = "3")]
    pub member: Option<MemberInfo>,
}

/// Kinds of [`MembershipChange`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
pub enum ChangeKind {
    /// A voter or learner joins.
    Add = 0,
    /// A member leaves for good.
    Remove = 1,
    /// A member's peer URLs change.
    Update = 2,
    /// A learner becomes a voter.
    Promote = 3,
}

impl Member {
    /// Proposes a change of membership.
    pub fn propose_change(&mut self, change: &MembershipChange) -> Result<(), RequestError> {
        let member = change.member.clone().unwrap_or_default();
        let change_type = match (change.kind(), member.is_learner) {
            (ChangeKind::Remove, _) => ConfChangeType::RemoveNode,
            (ChangeKind::Add | ChangeKind::Update, true) => ConfChangeType::AddLearnerNode,
            _ => ConfChangeType::AddNode,
        };
        let conf_change = ConfChange {
            change_type: change_type.into(),
            node_id: member.id,
            context: change.encode_to_vec(),
            ..ConfChange::default()
        };
        self.node
            .propose_conf_change(Vec::new(), conf_change)
            .map_err(|_| RequestError::NoLeader)
    }

    pub(super) fn apply_change(
        &mut self,
        data: &[u8],
        metadata: &mut Metadata,
    ) -> Result<(u64, Result<Vec<MemberInfo>, RequestError>), MemberError> {
        let unreadable = |_| MemberError::Corrupt("a change of membership is unreadable".into());
        let mut conf_change: ConfChange = prost_of_raft::Message::decode(data)
            .map_err(|_| MemberError::Corrupt("a change of membership is unreadable".into()))?;
        let change = MembershipChange::decode(&conf_change.context[..]).map_err(unreadable)?;
        let outcome = change_members(metadata, &change);
        if outcome.is_err() {
            conf_change.node_id = raft::INVALID_ID;
        }
        self.removed |= metadata.removed_members.contains(&self.node.raft.id);
        let state = self.node.apply_conf_change(&conf_change)?;
        self.node.mut_store().set_conf_state(state.clone());
        metadata.consensus = Some(state.into());
        if self.removed && self.node.raft.state == StateRole::Leader {
            // Consensus would look for this member's own progress, which is gone. As a follower it
            // still helps the others, until they have heard of its removal.
            let term = self.node.raft.term;
            self.node.raft.become_follower(term, raft::INVALID_ID);
            self.node.raft.msgs.clear();
        }
        Ok((change.id, outcome.map(|()| metadata.members.clone())))
    }
}

fn change_members(metadata: &mut Metadata, change: &MembershipChange) -> Result<(), RequestError> {
    let member = change.member.clone().ok_or(RequestError::MemberNotFound)?;
    if metadata.removed_members.contains(&member.id) {
        return Err(RequestError::MemberNotFound);
    }
    let at = metadata
        .members
        .iter()
        .position(|known| known.id == member.id);
    let others_have_url = metadata.members.iter().any(|known| {
        known.id != member.id
            && known
                .peer_urls
                .iter()
                .any(|url| member.peer_urls.contains(url))
    });
    match (change.kind(), at) {
        (ChangeKind::Add, Some(_)) => return Err(RequestError::MemberExists),
        (ChangeKind::Add | ChangeKind::Update, _) if others_have_url => {
            return Err(RequestError::PeerUrlExists);
        }
        (ChangeKind::Add, None) => metadata.members.push(member),
        (_, None) => return Err(RequestError::MemberNotFound),
        (ChangeKind::Remove, Some(at)) => {
            metadata.members.remove(at);
            metadata.removed_members.push(member.id);
        }
        (ChangeKind::Update, Some(at)) => metadata.members[at].peer_urls = member.peer_urls,
        (ChangeKind::Promote, Some(at)) if metadata.members[at].is_learner => {
            metadata.members[at].is_learner = false;
        }
        (ChangeKind::Promote, Some(_)) => return Err(RequestError::NotLearner),
    }
    Ok(())
}
