//! The leader compares digests of what members have applied, all the time. A member that differs from
//! most of them is told, and is rebuilt from them; if there is no most, the alarm CORRUPT is raised.

use std::sync::Arc;
use std::time::Duration;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::MemberError;
use keelson_member::command::{AlarmChange, Operation};
use keelson_member::keyspace::{Alarm, DIGEST_VERSION};
use keelson_member::replica::Input;
use prometheus::IntCounter;

use super::{Peers, proto};
use crate::node::Node;

const INTERVAL: Duration = Duration::from_secs(1);

/// What comparing came to.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Those that are known are the same.
    Same,
    /// These differ from most.
    Divergent(Vec<u64>),
    /// They differ, and none are most.
    Undecided,
}

/// Compares for as long as the node runs.
pub async fn compare(peers: Arc<Peers>, node: Node, found: IntCounter) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if !node.status().is_leader {
            continue;
        }
        for (index, digest) in node.keyspace().digests() {
            compare_at(&peers, &node, index, digest, &found).await;
        }
    }
}

async fn compare_at(peers: &Peers, node: &Node, index: u64, digest: u64, found: &IntCounter) {
    let members = node.keyspace().metadata().members;
    let mut known = vec![(peers.member_id, digest)];
    for member in members.iter().filter(|other| other.id != peers.member_id) {
        if let Some(other) = ask(peers, node, member.id, index).await {
            known.push((member.id, other));
        }
    }
    match judge(&known, members.len()) {
        Verdict::Same => {}
        Verdict::Divergent(divergent) => {
            for id in divergent {
                found.inc();
                tracing::error!(member = %format_args!("{id:x}"), index, "a member differs from the others");
                let right = known.iter().find(|(other, _)| *other != id);
                tell(
                    peers,
                    node,
                    id,
                    index,
                    right.map_or(0, |(_, digest)| *digest),
                )
                .await;
            }
        }
        Verdict::Undecided => raise(peers, node, index).await,
    }
}

async fn ask(peers: &Peers, node: &Node, id: u64, index: u64) -> Option<u64> {
    let request = proto::DigestRequest {
        cluster_id: peers.cluster_id,
        version: DIGEST_VERSION,
        index,
    };
    let mut client = peers.member(node, id).ok()?;
    let answer = client.digest(request).await.ok()?.into_inner();
    answer.digest
}

async fn tell(peers: &Peers, node: &Node, id: u64, index: u64, digest: u64) {
    if id == peers.member_id {
        node.tell(Input::Failed(divergent(index)));
        return;
    }
    let request = proto::DivergedRequest {
        cluster_id: peers.cluster_id,
        version: DIGEST_VERSION,
        index,
        digest,
    };
    if let Ok(mut client) = peers.member(node, id)
        && let Err(error) = client.diverged(request).await
    {
        tracing::warn!(%error, "cannot tell a member that it differs from the others");
    }
}

/// Why a member that differs has to be rebuilt.
pub(super) fn divergent(index: u64) -> MemberError {
    MemberError::Corrupt(format!(
        "the keyspace differs from that of most members after entry {index}"
    ))
}

async fn raise(peers: &Peers, node: &Node, index: u64) {
    let alarm = Alarm {
        member_id: peers.member_id,
        kind: pb::AlarmType::Corrupt as i32,
    };
    if node.keyspace().has_alarm(alarm) {
        return;
    }
    tracing::error!(
        index,
        "members differ, and it can't be told which are right: the alarm CORRUPT is raised"
    );
    let change = AlarmChange {
        alarm: Some(alarm),
        raised: true,
    };
    if let Err(error) = node.propose(Operation::Alarm(change), None).await {
        tracing::warn!(%error, "cannot raise the alarm CORRUPT");
    }
}

/// Who differs from more than half of `members`, of those whose digests are known.
fn judge(known: &[(u64, u64)], members: usize) -> Verdict {
    let agreeing = |digest: u64| known.iter().filter(|(_, other)| *other == digest).count();
    if known.iter().all(|(_, digest)| *digest == known[0].1) {
        return Verdict::Same;
    }
    let most = known
        .iter()
        .map(|(_, digest)| *digest)
        .find(|digest| 2 * agreeing(*digest) > members);
    match most {
        Some(most) => {
            let others = known.iter().filter(|(_, digest)| *digest != most);
            Verdict::Divergent(others.map(|(id, _)| *id).collect())
        }
        // Another member may still decide it.
        None if known.len() < members => Verdict::Same,
        None => Verdict::Undecided,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_decide() {
        let same = [(1, 7), (2, 7), (3, 7)];
        assert_eq!(judge(&same, 3), Verdict::Same);
        let one = [(1, 7), (2, 8), (3, 7)];
        assert_eq!(judge(&one, 3), Verdict::Divergent(vec![2]));
        let leader = [(1, 8), (2, 7), (3, 7)];
        assert_eq!(judge(&leader, 3), Verdict::Divergent(vec![1]));
        let all = [(1, 8), (2, 7), (3, 9)];
        assert_eq!(judge(&all, 3), Verdict::Undecided);
        let two = [(1, 8), (2, 7)];
        assert_eq!(judge(&two, 2), Verdict::Undecided);
        assert_eq!(judge(&two, 3), Verdict::Same);
        let few = [(1, 7), (2, 7), (3, 8)];
        assert_eq!(judge(&few, 5), Verdict::Same);
        assert_eq!(judge(&[(1, 7)], 1), Verdict::Same);
    }
}
