//! Which changes of membership would leave a cluster that can't go on.

use crate::RequestError;
use crate::keyspace::Member as MemberInfo;

/// A voter that is added has not started: the others have to be enough without it, and active. As
/// etcd, one member may always become two.
pub fn check_adding_voter(members: &[MemberInfo], active: &[u64]) -> Result<(), RequestError> {
    let voters: Vec<_> = members.iter().filter(|member| !member.is_learner).collect();
    let started = count_started(&voters);
    if voters.len() > 1 || started != 1 {
        let quorum = voters.len().div_ceil(2) + 1;
        if started < quorum {
            return Err(RequestError::NotEnoughStarted);
        }
    }
    if !voters.iter().all(|voter| active.contains(&voter.id)) {
        return Err(RequestError::Unhealthy);
    }
    Ok(())
}

/// What is left has to be able to go on. A member that is down may always go.
pub fn check_removing_voter(
    members: &[MemberInfo],
    removed: u64,
    active: &[u64],
) -> Result<(), RequestError> {
    let left: Vec<_> = members
        .iter()
        .filter(|other| !other.is_learner && other.id != removed)
        .collect();
    let quorum = left.len() / 2 + 1;
    if count_started(&left) < quorum {
        return Err(RequestError::NotEnoughStarted);
    }
    let active_left = left.iter().filter(|other| active.contains(&other.id));
    if active.contains(&removed) && active_left.count() < quorum {
        return Err(RequestError::Unhealthy);
    }
    Ok(())
}

/// A member that has started has said its name.
fn count_started(members: &[&MemberInfo]) -> usize {
    let started = members.iter().filter(|member| !member.name.is_empty());
    started.count()
}
