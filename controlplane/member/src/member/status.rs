//! What a member knows of its cluster.

use raft::StateRole;

use super::Member;

/// What a member knows of its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConsensusStatus {
    /// The leader's id; 0 if there is none.
    pub leader: u64,
    /// The term.
    pub term: u64,
    /// Index of the last entry that is committed.
    pub committed: u64,
    /// Index of the last entry that is applied.
    pub applied: u64,
    /// Whether this member leads.
    pub is_leader: bool,
    /// Whether it may serve reads without asking: it is the only voter.
    pub is_alone: bool,
    /// Whether it has no vote.
    pub is_learner: bool,
}

impl Member {
    /// What it knows of its cluster.
    pub fn status(&self) -> ConsensusStatus {
        let raft = &self.node.raft;
        let is_leader = raft.state == StateRole::Leader;
        let voters = raft.prs().conf().to_conf_state();
        ConsensusStatus {
            leader: raft.leader_id,
            term: raft.term,
            committed: raft.raft_log.committed,
            applied: self.applied.index,
            is_leader,
            is_alone: is_leader && voters.voters == [raft.id] && voters.voters_outgoing.is_empty(),
            is_learner: voters.learners.contains(&raft.id),
        }
    }

    /// The term in which this member leads, once it has applied everything that was acknowledged
    /// before.
    pub fn leads_since(&self) -> Option<u64> {
        let raft = &self.node.raft;
        let leads = raft.state == StateRole::Leader && self.applied.term == raft.term;
        leads.then_some(raft.term)
    }

    /// The term in which this member may decide alone: it leads, as [`Member::leads_since`], and is
    /// not handing leadership over.
    pub fn decides_in(&self) -> Option<u64> {
        let transfers = self.node.raft.lead_transferee.is_some();
        self.leads_since().filter(|_| !transfers)
    }

    /// Whether `id` follows closely enough to vote.
    pub fn is_caught_up(&self, id: u64) -> bool {
        let raft = &self.node.raft;
        raft.prs().get(id).is_some_and(|progress| {
            // As etcd: nine tenths of what the leader has.
            progress.matched > 0 && progress.matched >= raft.raft_log.committed / 10 * 9
        })
    }

    /// Members from which the leader heard within the last election timeout, itself included.
    pub fn active_members(&self) -> Vec<u64> {
        let raft = &self.node.raft;
        raft.prs()
            .iter()
            .filter(|(id, progress)| **id == raft.id || progress.recent_active)
            .map(|(id, _)| *id)
            .collect()
    }

    /// Voters that could lead in this leader's place, those first that follow most closely.
    pub fn successors(&self) -> Vec<u64> {
        let raft = &self.node.raft;
        let voters = raft.prs().conf().to_conf_state().voters;
        let mut others: Vec<(u64, u64)> = raft
            .prs()
            .iter()
            .filter(|(id, progress)| {
                **id != raft.id && progress.recent_active && voters.contains(id)
            })
            .map(|(id, progress)| (progress.matched, *id))
            .collect();
        others.sort_unstable_by(|a, b| b.cmp(a));
        others.into_iter().map(|(_, id)| id).collect()
    }
}
