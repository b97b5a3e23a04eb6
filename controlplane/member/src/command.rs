//! What the log replicates: one command for each entry.

use keelson_etcd_api::etcdserverpb as pb;
use prost::{Message, Oneof};

use crate::keyspace::{Alarm, Member};

/// An entry's data.
#[derive(Clone, PartialEq, Message)]
pub struct Command {
    /// Chosen by the member that proposed it, to find who waits for the outcome.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// What to do.
    #[prost(
        oneof = "Operation",
        tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14"
    )]
    pub operation: Option<Operation>,
    /// Who wants it; `None` if it is a member itself.
    #[prost(message, optional, tag = "15")]
    pub authority: Option<Authority>,
}

/// Who wants something.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Authority {
    /// The user; empty if there is none.
    #[prost(string, tag = "1")]
    pub user: String,
    /// Revision of users and roles when the user was found out; 0 if there is none.
    #[prost(uint64, tag = "2")]
    pub revision: u64,
}

/// What a [`Command`] does.
#[derive(Clone, PartialEq, Oneof)]
pub enum Operation {
    /// Sets a key.
    #[prost(message, tag = "2")]
    Put(pb::PutRequest),
    /// Deletes keys.
    #[prost(message, tag = "3")]
    DeleteRange(pb::DeleteRangeRequest),
    /// Compares, reads and writes.
    #[prost(message, tag = "4")]
    Txn(pb::TxnRequest),
    /// Forgets history.
    #[prost(message, tag = "5")]
    Compact(pb::CompactionRequest),
    /// Grants a lease, with the id and time to live that the proposer chose.
    #[prost(message, tag = "6")]
    LeaseGrant(pb::LeaseGrantRequest),
    /// Ends a lease.
    #[prost(message, tag = "7")]
    LeaseRevoke(pb::LeaseRevokeRequest),
    /// Records how long leases have left.
    #[prost(message, tag = "8")]
    LeaseCheckpoint(pb::LeaseCheckpointRequest),
    /// Says a member's name and client URLs.
    #[prost(message, tag = "9")]
    Member(Member),
    /// Raises or lowers an alarm.
    #[prost(message, tag = "10")]
    Alarm(AlarmChange),
    /// Changes users and roles.
    #[prost(message, tag = "11")]
    Auth(AuthChange),
    /// Gives leases their whole time again.
    #[prost(message, tag = "12")]
    LeaseRenewal(LeaseRenewal),
    /// Ends a lease whose time is over.
    #[prost(message, tag = "13")]
    LeaseExpiry(LeaseExpiry),
    /// Says that a member is being rebuilt.
    #[prost(message, tag = "14")]
    Rebuild(Rebuild),
}

impl Operation {
    /// Whether it is a client's change of what the store holds: what is refused while CORRUPT is raised,
    /// as in etcd.
    pub fn changes_keys(&self) -> bool {
        matches!(
            self,
            Self::Put(_)
                | Self::DeleteRange(_)
                | Self::Txn(_)
                | Self::Compact(_)
                | Self::LeaseGrant(_)
                | Self::LeaseRevoke(_)
        )
    }

    /// Whether it needs more room than there was before: what is refused while NOSPACE is raised.
    pub fn grows(&self) -> bool {
        match self {
            Self::Put(_) | Self::LeaseGrant(_) => true,
            Self::Txn(txn) => grows(txn),
            _ => false,
        }
    }
}

fn grows(txn: &pb::TxnRequest) -> bool {
    let mut operations = txn.success.iter().chain(&txn.failure);
    operations.any(|operation| match &operation.request {
        Some(pb::request_op::Request::RequestPut(_)) => true,
        Some(pb::request_op::Request::RequestTxn(inner)) => grows(inner),
        _ => false,
    })
}

/// Gives leases their whole time again. Those that are gone stay gone.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct LeaseRenewal {
    /// Their ids.
    #[prost(int64, repeated, tag = "1")]
    pub ids: Vec<i64>,
}

/// Ends a lease whose time is over, unless another one has its id by now.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct LeaseExpiry {
    /// Its id.
    #[prost(int64, tag = "1")]
    pub id: i64,
    /// Log index of its grant.
    #[prost(uint64, tag = "2")]
    pub granted_at: u64,
}

/// A member that was damaged is being rebuilt: see [`crate::rebuild`].
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Rebuild {
    /// The member.
    #[prost(uint64, tag = "1")]
    pub member_id: u64,
    /// Chosen by it, never used before.
    #[prost(uint64, tag = "2")]
    pub number: u64,
}

/// Changes users and roles.
#[derive(Clone, PartialEq, Message)]
pub struct AuthChange {
    /// How.
    #[prost(oneof = "AuthOperation", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")]
    pub operation: Option<AuthOperation>,
}

/// What an [`AuthChange`] does. Passwords are hashed already.
#[derive(Clone, PartialEq, Oneof)]
#[allow(missing_docs)] // as etcd's methods of the same names
pub enum AuthOperation {
    /// The secret that tokens will be signed with.
    #[prost(bytes = "bytes", tag = "1")]
    Enable(bytes::Bytes),
    #[prost(message, tag = "2")]
    Disable(pb::AuthDisableRequest),
    #[prost(message, tag = "3")]
    UserAdd(pb::AuthUserAddRequest),
    #[prost(message, tag = "4")]
    UserDelete(pb::AuthUserDeleteRequest),
    #[prost(message, tag = "5")]
    UserChangePassword(pb::AuthUserChangePasswordRequest),
    #[prost(message, tag = "6")]
    UserGrantRole(pb::AuthUserGrantRoleRequest),
    #[prost(message, tag = "7")]
    UserRevokeRole(pb::AuthUserRevokeRoleRequest),
    #[prost(message, tag = "8")]
    RoleAdd(pb::AuthRoleAddRequest),
    #[prost(message, tag = "9")]
    RoleDelete(pb::AuthRoleDeleteRequest),
    #[prost(message, tag = "10")]
    RoleGrantPermission(pb::AuthRoleGrantPermissionRequest),
    #[prost(message, tag = "11")]
    RoleRevokePermission(pb::AuthRoleRevokePermissionRequest),
}

/// Raises or lowers an alarm.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct AlarmChange {
    /// Which.
    #[prost(message, optional, tag = "1")]
    pub alarm: Option<Alarm>,
    /// Whether it is raised.
    #[prost(bool, tag = "2")]
    pub raised: bool,
}

/// The outcome of a [`Command`] that was not refused. Headers hold the revision only.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // one for each operation
pub enum Response {
    Put(pb::PutResponse),
    DeleteRange(pb::DeleteRangeResponse),
    Txn(pb::TxnResponse),
    Compact(pb::CompactionResponse),
    LeaseGrant(pb::LeaseGrantResponse),
    LeaseRevoke(pb::LeaseRevokeResponse),
    Done,
}
