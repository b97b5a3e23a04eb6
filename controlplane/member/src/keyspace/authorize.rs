//! Which permissions a command needs.

use bytes::Bytes;
use keelson_etcd_api::etcdserverpb as pb;
use pb::request_op::Request;

use super::auth::Access;
use super::state::State;
use crate::RequestError;
use crate::command::{Authority, Operation};

/// Refuses a command that its authority may not give.
pub(super) fn command(
    state: &State,
    authority: &Authority,
    operation: &Operation,
) -> Result<(), RequestError> {
    let auth = state.metadata.auth();
    if !auth.enabled {
        return Ok(());
    }
    match operation {
        Operation::Put(request) => put(state, authority, request),
        Operation::DeleteRange(request) => delete(state, authority, request),
        Operation::Txn(request) => txn(state, authority, request),
        Operation::LeaseRevoke(request) => {
            auth.check_user(authority)?;
            lease(state, authority, request.id, Access::Write)
        }
        Operation::Compact(_) | Operation::LeaseGrant(_) => auth.check_user(authority).map(drop),
        // The member's own.
        Operation::LeaseCheckpoint(_)
        | Operation::LeaseRenewal(_)
        | Operation::LeaseExpiry(_)
        | Operation::Member(_)
        | Operation::Rebuild(_) => Ok(()),
        Operation::Alarm(_) | Operation::Auth(_) => auth.check_admin(authority),
    }
}

/// Refuses a read that its authority may not do.
pub(super) fn range(
    state: &State,
    authority: &Authority,
    request: &pb::RangeRequest,
) -> Result<(), RequestError> {
    let auth = state.metadata.auth();
    auth.check(authority, &request.key, &request.range_end, Access::Read)
}

/// Refuses a transaction any of whose parts its authority may not do.
pub(super) fn txn(
    state: &State,
    authority: &Authority,
    request: &pb::TxnRequest,
) -> Result<(), RequestError> {
    let auth = state.metadata.auth();
    for compare in &request.compare {
        auth.check(authority, &compare.key, &compare.range_end, Access::Read)?;
    }
    for operation in request.success.iter().chain(&request.failure) {
        match &operation.request {
            Some(Request::RequestRange(request)) => range(state, authority, request)?,
            Some(Request::RequestPut(request)) => put(state, authority, request)?,
            Some(Request::RequestDeleteRange(request)) => delete(state, authority, request)?,
            Some(Request::RequestTxn(inner)) => txn(state, authority, inner)?,
            None => {}
        }
    }
    Ok(())
}

/// Refuses what concerns keys of a lease that its authority may not access.
pub(super) fn lease(
    state: &State,
    authority: &Authority,
    id: i64,
    access: Access,
) -> Result<(), RequestError> {
    let Some(lease) = state.leases.get(&id) else {
        return Ok(());
    };
    let auth = state.metadata.auth();
    for key in &lease.keys {
        auth.check(authority, key, &Bytes::new(), access)?;
    }
    Ok(())
}

fn put(state: &State, authority: &Authority, request: &pb::PutRequest) -> Result<(), RequestError> {
    let auth = state.metadata.auth();
    let single = Bytes::new();
    auth.check(authority, &request.key, &single, Access::Write)?;
    lease(state, authority, request.lease, Access::Write)?;
    if request.prev_kv {
        auth.check(authority, &request.key, &single, Access::Read)?;
    }
    Ok(())
}

fn delete(
    state: &State,
    authority: &Authority,
    request: &pb::DeleteRangeRequest,
) -> Result<(), RequestError> {
    let auth = state.metadata.auth();
    auth.check(authority, &request.key, &request.range_end, Access::Write)?;
    if request.prev_kv {
        auth.check(authority, &request.key, &request.range_end, Access::Read)?;
    }
    Ok(())
}
