//! Applies commands: the only code that changes the keyspace.

use std::collections::BTreeSet;

use bytes::Bytes;
use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::mvccpb::KeyValue;

use super::auth::Auth;
use super::lease::{Lease, LeaseChange, LeaseRecord, MAX_LEASE_TTL};
use super::metadata::Alarm;
use super::range::KeyRange;
use super::read::{key_value, read};
use super::state::State;
use super::version::Version;
use super::{Member, authorize, txn};
use crate::command::{
    AlarmChange, AuthChange, AuthOperation, Command, LeaseExpiry, LeaseRenewal, Operation, Rebuild,
    Response,
};
use crate::{Failure, MemberError, RequestError};

/// A change of a key, for watches.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The key after the change; a deletion has only key and revision.
    pub kv: KeyValue,
    /// Whether the key was deleted.
    pub deletion: bool,
    /// The key before the change.
    pub previous: Option<KeyValue>,
}

/// What applying commands brought about.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) events: Vec<Event>,
    pub(super) leases: Vec<LeaseChange>,
}

/// Applies commands to a state, at the revision after the current one.
pub(super) struct Applier<'a> {
    pub(super) state: &'a mut State,
    /// The revision that changes get.
    revision: i64,
    /// Changes made so far at that revision.
    sub: u32,
    changes: &'a mut Changes,
}

impl<'a> Applier<'a> {
    pub(super) fn new(state: &'a mut State, changes: &'a mut Changes) -> Self {
        let revision = state.metadata.revision + 1;
        Self {
            state,
            revision,
            sub: 0,
            changes,
        }
    }

    /// Applies one command. A request that is refused changes nothing.
    pub(super) fn apply(mut self, command: Command) -> Result<Response, Failure> {
        if let (Some(authority), Some(operation)) = (&command.authority, &command.operation) {
            authorize::command(self.state, authority, operation)?;
        }
        if !self.state.metadata.alarms.is_empty()
            && command.operation.as_ref().is_some_and(Operation::grows)
            && self.state.metadata.refuses_growth()
        {
            return Err(RequestError::NoSpace.into());
        }
        if !self.state.metadata.alarms.is_empty()
            && command
                .operation
                .as_ref()
                .is_some_and(Operation::changes_keys)
            && self.state.metadata.is_corrupt()
        {
            return Err(RequestError::Corrupt.into());
        }
        let response = match command.operation {
            Some(Operation::Put(put)) => {
                // Of two mistakes, etcd tells the lease first here, and the key first in a
                // transaction.
                self.check_lease(&put)?;
                self.check_put(&put)?;
                Response::Put(self.put(put)?)
            }
            Some(Operation::DeleteRange(delete)) => {
                Response::DeleteRange(self.delete_range(&delete)?)
            }
            Some(Operation::Txn(request)) => Response::Txn(txn::apply(&mut self, request)?),
            Some(Operation::Compact(compaction)) => Response::Compact(self.compact(compaction)?),
            Some(Operation::LeaseGrant(grant)) => Response::LeaseGrant(self.grant(&grant)?),
            Some(Operation::LeaseRevoke(revoke)) => Response::LeaseRevoke(self.revoke(revoke.id)?),
            Some(Operation::LeaseCheckpoint(request)) => self.checkpoint(&request),
            Some(Operation::LeaseRenewal(renewal)) => self.renew(&renewal),
            Some(Operation::LeaseExpiry(expiry)) => self.expire(expiry)?,
            Some(Operation::Member(member)) => self.describe_member(member),
            Some(Operation::Alarm(change)) => self.alarm(change),
            Some(Operation::Auth(change)) => self.change_auth(change)?,
            Some(Operation::Rebuild(rebuild)) => self.note_rebuild(rebuild)?,
            // Written by the member that won an election, or by a newer version.
            None => Response::Done,
        };
        if self.sub > 0 {
            self.state.metadata.revision = self.revision;
        }
        Ok(response)
    }

    /// A header with the revision that follows from the changes so far.
    #[allow(clippy::unnecessary_wraps)] // headers are optional in messages
    pub(super) fn header(&self) -> Option<pb::ResponseHeader> {
        Some(pb::ResponseHeader {
            revision: self.current(),
            ..Default::default()
        })
    }

    /// The revision of the changes so far.
    pub(super) fn current(&self) -> i64 {
        if self.sub > 0 {
            self.revision
        } else {
            self.state.metadata.revision
        }
    }

    /// What makes [`Applier::put`] impossible.
    pub(super) fn check_put(&self, put: &pb::PutRequest) -> Result<(), Failure> {
        if (put.ignore_value || put.ignore_lease) && self.existing(&put.key)?.is_none() {
            return Err(RequestError::KeyNotFound.into());
        }
        Ok(self.check_lease(put)?)
    }

    fn check_lease(&self, put: &pb::PutRequest) -> Result<(), RequestError> {
        if put.lease != 0 && !self.state.leases.contains_key(&put.lease) {
            return Err(RequestError::LeaseNotFound);
        }
        Ok(())
    }

    /// Sets a key. The request was checked.
    pub(super) fn put(&mut self, put: pb::PutRequest) -> Result<pb::PutResponse, MemberError> {
        let previous = self.existing(&put.key)?;
        let (mut value, mut lease) = (put.value, put.lease);
        let (mut create_revision, mut puts) = (self.revision, 1);
        let mut previous_lease = 0;
        if let Some((_, previous)) = &previous {
            create_revision = previous.create_revision;
            puts = previous.puts + 1;
            previous_lease = previous.lease;
            if put.ignore_value {
                value = previous.value.clone();
            }
            if put.ignore_lease {
                lease = previous.lease;
            }
        }
        if previous_lease != lease {
            self.detach(previous_lease, &put.key);
            self.attach(lease, &put.key);
        }
        let version = Version {
            create_revision,
            puts,
            lease,
            sub: self.sub,
            value,
        };
        let previous = previous.map(|(at, version)| key_value(put.key.clone(), at, version));
        self.changes.events.push(Event {
            kv: key_value(put.key.clone(), self.revision, version.clone()),
            deletion: false,
            previous: previous.clone(),
        });
        self.insert(put.key, version);
        Ok(pb::PutResponse {
            header: self.header(),
            prev_kv: previous.filter(|_| put.prev_kv),
        })
    }

    /// Deletes keys.
    pub(super) fn delete_range(
        &mut self,
        delete: &pb::DeleteRangeRequest,
    ) -> Result<pb::DeleteRangeResponse, MemberError> {
        let range = KeyRange::new(&delete.key, &delete.range_end);
        let mut found = Vec::new();
        self.state.walk(&range, self.current(), |entry| {
            found.push(entry.pair()?);
            Ok(std::ops::ControlFlow::Continue(()))
        })?;
        let mut prev_kvs = Vec::new();
        let deleted = i64::try_from(found.len()).unwrap_or(i64::MAX);
        for previous in found {
            if delete.prev_kv {
                prev_kvs.push(previous.clone());
            }
            self.delete(previous);
        }
        Ok(pb::DeleteRangeResponse {
            header: self.header(),
            deleted,
            prev_kvs,
        })
    }

    /// Reads as of the changes so far.
    pub(super) fn range(&self, request: &pb::RangeRequest) -> Result<pb::RangeResponse, Failure> {
        read(self.state, request, self.current())
    }

    /// The newest version of a key that is there.
    pub(super) fn existing(&self, key: &[u8]) -> Result<Option<(i64, Version)>, MemberError> {
        let newest = self.state.newest(key, i64::MAX)?;
        Ok(newest.filter(|(_, version)| !version.is_deletion()))
    }

    fn delete(&mut self, previous: KeyValue) {
        self.detach(previous.lease, &previous.key);
        let key = previous.key.clone();
        self.changes.events.push(Event {
            kv: KeyValue {
                key: key.clone(),
                mod_revision: self.revision,
                ..Default::default()
            },
            deletion: true,
            previous: Some(previous),
        });
        self.insert(key, Version::deleted(self.sub));
    }

    fn insert(&mut self, key: Bytes, version: Version) {
        self.state.active.insert(key, self.revision, version);
        self.sub += 1;
    }

    fn attach(&mut self, id: i64, key: &Bytes) {
        if let Some(lease) = self.state.leases.get_mut(&id) {
            lease.keys.insert(key.clone());
            self.state
                .active
                .attachments
                .insert((id, key.clone()), true);
        }
    }

    fn detach(&mut self, id: i64, key: &Bytes) {
        if let Some(lease) = self.state.leases.get_mut(&id) {
            lease.keys.remove(key);
            self.state
                .active
                .attachments
                .insert((id, key.clone()), false);
        }
    }

    fn compact(
        &mut self,
        request: pb::CompactionRequest,
    ) -> Result<pb::CompactionResponse, RequestError> {
        if request.revision <= self.state.metadata.compact_revision {
            return Err(RequestError::Compacted);
        }
        if request.revision > self.state.metadata.revision {
            return Err(RequestError::FutureRevision);
        }
        self.state.metadata.compact_revision = request.revision;
        Ok(pb::CompactionResponse {
            header: self.header(),
        })
    }

    fn grant(
        &mut self,
        grant: &pb::LeaseGrantRequest,
    ) -> Result<pb::LeaseGrantResponse, RequestError> {
        if grant.id == 0 {
            return Err(RequestError::LeaseNotFound);
        }
        if grant.ttl > MAX_LEASE_TTL {
            return Err(RequestError::LeaseTtlTooLarge);
        }
        if self.state.leases.contains_key(&grant.id) {
            return Err(RequestError::LeaseExists);
        }
        let record = LeaseRecord {
            granted: grant.ttl,
            remaining: 0,
            granted_at: self.state.metadata.applied_index + 1,
        };
        let keys = BTreeSet::new();
        self.state.leases.insert(grant.id, Lease { record, keys });
        self.state.active.leases.insert(grant.id, Some(record));
        let change = LeaseChange::Granted(grant.id, record);
        self.changes.leases.push(change);
        Ok(pb::LeaseGrantResponse {
            header: self.header(),
            id: grant.id,
            ttl: grant.ttl,
            error: String::new(),
        })
    }

    fn revoke(&mut self, id: i64) -> Result<pb::LeaseRevokeResponse, Failure> {
        let lease = self
            .state
            .leases
            .get(&id)
            .ok_or(RequestError::LeaseNotFound)?;
        for key in lease.keys.clone() {
            if let Some((at, version)) = self.existing(&key)? {
                self.delete(key_value(key, at, version));
            }
        }
        self.state.leases.remove(&id);
        self.state.active.leases.insert(id, None);
        self.changes.leases.push(LeaseChange::Ended(id));
        Ok(pb::LeaseRevokeResponse {
            header: self.header(),
        })
    }

    /// Ends a lease whose time is over, if it is the one that was meant.
    fn expire(&mut self, expiry: LeaseExpiry) -> Result<Response, Failure> {
        match self.state.leases.get(&expiry.id) {
            Some(lease) if lease.record.granted_at == expiry.granted_at => {
                self.revoke(expiry.id).map(Response::LeaseRevoke)
            }
            _ => Err(RequestError::LeaseNotFound.into()),
        }
    }

    fn renew(&mut self, renewal: &LeaseRenewal) -> Response {
        for id in &renewal.ids {
            self.set_remaining(*id, 0, LeaseChange::Renewed(*id));
        }
        Response::Done
    }

    fn checkpoint(&mut self, request: &pb::LeaseCheckpointRequest) -> Response {
        for checkpoint in &request.checkpoints {
            let (id, remaining) = (checkpoint.id, checkpoint.remaining_ttl);
            self.set_remaining(id, remaining, LeaseChange::Checkpoint(id, remaining));
        }
        Response::Done
    }

    fn set_remaining(&mut self, id: i64, remaining: i64, change: LeaseChange) {
        let Some(lease) = self.state.leases.get_mut(&id) else {
            return;
        };
        self.changes.leases.push(change);
        if lease.record.remaining != remaining {
            lease.record.remaining = remaining;
            self.state.active.leases.insert(id, Some(lease.record));
        }
    }

    fn describe_member(&mut self, member: Member) -> Response {
        let members = &mut self.state.metadata.members;
        if let Some(known) = members.iter_mut().find(|known| known.id == member.id) {
            known.name = member.name;
            known.client_urls = member.client_urls;
        }
        Response::Done
    }

    fn note_rebuild(&mut self, rebuild: Rebuild) -> Result<Response, RequestError> {
        let members = &mut self.state.metadata.members;
        let member = members
            .iter_mut()
            .find(|known| known.id == rebuild.member_id);
        member.ok_or(RequestError::MemberNotFound)?.rebuild = rebuild.number;
        Ok(Response::Done)
    }

    fn change_auth(&mut self, change: AuthChange) -> Result<Response, RequestError> {
        let auth = self.state.metadata.auth.get_or_insert_with(Auth::new);
        match change.operation {
            Some(AuthOperation::Enable(secret)) => auth.enable(secret)?,
            Some(AuthOperation::Disable(_)) => auth.disable(),
            Some(AuthOperation::UserAdd(request)) => auth.add_user(request)?,
            Some(AuthOperation::UserDelete(request)) => auth.delete_user(&request.name)?,
            Some(AuthOperation::UserChangePassword(request)) => {
                auth.change_password(&request.name, request.hashed_password)?;
            }
            Some(AuthOperation::UserGrantRole(request)) => {
                auth.grant_role(&request.user, &request.role)?;
            }
            Some(AuthOperation::UserRevokeRole(request)) => {
                auth.revoke_role(&request.name, &request.role)?;
            }
            Some(AuthOperation::RoleAdd(request)) => auth.add_role(request.name)?,
            Some(AuthOperation::RoleDelete(request)) => auth.delete_role(&request.role)?,
            Some(AuthOperation::RoleGrantPermission(request)) => auth.grant_permission(request)?,
            Some(AuthOperation::RoleRevokePermission(request)) => {
                auth.revoke_permission(&request)?;
            }
            None => {}
        }
        Ok(Response::Done)
    }

    fn alarm(&mut self, change: AlarmChange) -> Response {
        let Some(alarm) = change.alarm else {
            return Response::Done;
        };
        let alarms: &mut Vec<Alarm> = &mut self.state.metadata.alarms;
        alarms.retain(|raised| *raised != alarm);
        if change.raised {
            alarms.push(alarm);
        }
        Response::Done
    }
}
