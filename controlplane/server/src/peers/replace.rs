//! One member takes the place of another one that is gone for good.

use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::replica::Progress;
use keelson_member::replica::membership::check_removing_voter;
use keelson_member::{ChangeKind, MembershipChange, RequestError};
use tonic::Status;

use crate::grpc::refused;
use crate::identity;
use crate::node::Node;

/// Removes `gone` and adds a learner at `peer_urls`; the members afterwards. Only the leader can.
pub async fn replace(
    node: &Node,
    gone: &str,
    peer_urls: Vec<String>,
) -> Result<Vec<MemberInfo>, Status> {
    let progress = leading(node, 0).await?;
    let members = node.keyspace().metadata().members;
    let is_new = |member: &MemberInfo| member.name.is_empty() && member.peer_urls == peer_urls;
    if members.iter().any(is_new) {
        return Ok(members); // an earlier attempt came this far
    }
    if peer_urls.is_empty() || !peer_urls.iter().all(|url| identity::is_url(url)) {
        return Err(refused(&RequestError::BadPeerUrls));
    }
    let mut named = members
        .iter()
        .filter(|member| member.name == gone || format!("{:x}", member.id) == gone);
    let (Some(old), None) = (named.next(), named.next()) else {
        return Err(Status::not_found(format!(
            "the cluster has not exactly one member {gone:?}: {}",
            described(&members)
        )));
    };
    if progress.active.contains(&old.id) {
        return Err(Status::failed_precondition(format!(
            "member {gone:?} is there: only one that is gone is replaced; stop it first, or name \
             another one: {}",
            described(&members)
        )));
    }
    let url = peer_urls.iter().find(|url| {
        let mut others = members.iter().filter(|member| member.id != old.id);
        others.any(|other| other.peer_urls.contains(url))
    });
    if url.is_some() {
        return Err(refused(&RequestError::PeerUrlExists));
    }
    if !old.is_learner {
        check_removing_voter(&members, old.id, &progress.active)
            .map_err(|error| refused(&error))?;
    }
    change(node, ChangeKind::Remove, old.clone()).await?;
    let new = MemberInfo {
        id: identity::new_member_id(),
        peer_urls,
        is_learner: true,
        ..MemberInfo::default()
    };
    change(node, ChangeKind::Add, new).await
}

/// Gives a learner its vote, if it has caught up. Only the leader can.
pub async fn promote(node: &Node, id: u64) -> Result<(), Status> {
    let progress = leading(node, id).await?;
    let members = node.keyspace().metadata().members;
    let learner = members.into_iter().find(|member| member.id == id);
    let mut learner = learner.ok_or_else(|| refused(&RequestError::MemberNotFound))?;
    if !learner.is_learner {
        return Ok(());
    }
    if !progress.caught_up {
        return Err(refused(&RequestError::LearnerNotReady));
    }
    learner.is_learner = false;
    change(node, ChangeKind::Promote, learner).await.map(drop)
}

async fn leading(node: &Node, id: u64) -> Result<Progress, Status> {
    let current = async {
        let progress = node.progress(id).await?;
        node.read_barrier().await?;
        Ok(progress)
    };
    current.await.map_err(|error: RequestError| refused(&error))
}

async fn change(
    node: &Node,
    kind: ChangeKind,
    member: MemberInfo,
) -> Result<Vec<MemberInfo>, Status> {
    let change = MembershipChange {
        id: 0,
        kind: kind.into(),
        member: Some(member),
    };
    node.change(change).await.map_err(|error| refused(&error))
}

fn described(members: &[MemberInfo]) -> String {
    let described = members.iter().map(|member| {
        let name = if member.name.is_empty() {
            "not started"
        } else {
            &member.name
        };
        format!("{name} ({:x}, {})", member.id, member.peer_urls.join(","))
    });
    described.collect::<Vec<_>>().join("; ")
}
