//! What can go wrong: with a member ([`MemberError`]), and with a client's request
//! ([`RequestError`]).

use std::io;

/// A member can't go on, or can't start.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// The disk failed.
    #[error("cannot {what}: {source}")]
    Disk {
        /// What was tried, on which file.
        what: String,
        /// The disk's error.
        source: io::Error,
    },
    /// The storage engine failed.
    #[error("the storage engine cannot {what}: {source}")]
    Engine {
        /// What was tried.
        what: &'static str,
        /// The engine's error.
        source: Box<redb::Error>,
    },
    /// Stored bytes are not what was written.
    #[error("{0}")]
    Corrupt(String),
    /// Stored bytes are damaged, and no other member has them.
    #[error(
        "{0}: the cluster has no other member to rebuild this one from: restore a backup into a new \
         folder (keelson-state snapshot restore)"
    )]
    Alone(String),
    /// The folder belongs to another member or another cluster.
    #[error("{0}")]
    Foreign(String),
    /// The folder was written by a newer version.
    #[error("{what} has format {found}, this version knows {known}: use a newer keelson-state")]
    Newer {
        /// Which file.
        what: String,
        /// Its format.
        found: u64,
        /// The highest known format.
        known: u64,
    },
    /// The folder was written by a version from before the first release.
    #[error(
        "{what} has format {found}, from before the first release, this version knows {known}: take \
         a backup with the version that wrote it, and restore that"
    )]
    Older {
        /// Which file.
        what: String,
        /// Its format.
        found: u64,
        /// The oldest known format.
        known: u64,
    },
    /// A snapshot can't be used.
    #[error("the snapshot can't be used: {0}; take it, or send it, again")]
    DamagedSnapshot(String),
    /// The cluster has removed this member.
    #[error("this member was removed from the cluster: its data folder is of no more use")]
    Removed,
    /// The consensus engine refused something that it should not.
    #[error("consensus: {0}")]
    Consensus(#[from] raft::Error),
}

/// Stored bytes that are not what was written, found while reading.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Damage(pub String);

impl MemberError {
    /// Whether what is stored is damaged, or missing: a member of a cluster can be rebuilt from the
    /// others.
    pub fn is_damage(&self) -> bool {
        let in_io = |error: &io::Error| {
            let inner = error.get_ref();
            inner
                .and_then(|inner| inner.downcast_ref::<Damage>())
                .is_some()
        };
        match self {
            Self::Corrupt(_) => true,
            Self::Disk { source, .. } => in_io(source),
            Self::Engine { source, .. } => match &**source {
                redb::Error::Corrupted(_) => true,
                redb::Error::Io(error) => in_io(error),
                _ => false,
            },
            _ => false,
        }
    }

    /// For `map_err` on disk calls.
    pub(crate) fn disk(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Disk { what, source }
    }

    /// For `map_err` on engine calls.
    pub(crate) fn engine<E: Into<redb::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Engine {
            what,
            source: Box::new(source.into()),
        }
    }
}

/// A request is refused. Messages and [`RequestError::code`] are those of etcd
/// (`api/v3rpc/rpctypes`), which clients compare.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // each says what it is
pub enum RequestError {
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    #[error("etcdserver: key not found")]
    KeyNotFound,
    #[error("etcdserver: value is provided")]
    ValueProvided,
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
    #[error("etcdserver: too many operations in txn request")]
    TooManyOperations,
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    #[error("etcdserver: invalid sort option")]
    InvalidSortOption,
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    #[error("etcdserver: mvcc: required revision is a future revision")]
    FutureRevision,
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    #[error("etcdserver: lease already exists")]
    LeaseExists,
    #[error("etcdserver: too large lease TTL")]
    LeaseTtlTooLarge,
    #[error("etcdserver: request is too large")]
    RequestTooLarge,
    #[error("etcdserver: too many requests")]
    TooManyRequests,
    #[error("etcdserver: member ID already exist")]
    MemberExists,
    #[error("etcdserver: Peer URLs already exists")]
    PeerUrlExists,
    #[error("etcdserver: re-configuration failed due to not enough started members")]
    NotEnoughStarted,
    #[error("etcdserver: given member URLs are invalid")]
    BadPeerUrls,
    #[error("etcdserver: member not found")]
    MemberNotFound,
    #[error("etcdserver: can only promote a learner member")]
    NotLearner,
    #[error("etcdserver: can only promote a learner member which is in sync with leader")]
    LearnerNotReady,
    #[error("etcdserver: too many learner members in cluster")]
    TooManyLearners,
    #[error("etcdserver: rpc not supported for learner")]
    NotForLearners,
    #[error("etcdserver: unhealthy cluster")]
    Unhealthy,
    #[error("etcdserver: no leader")]
    NoLeader,
    #[error("etcdserver: not leader")]
    NotLeader,
    #[error("etcdserver: leader changed")]
    LeaderChanged,
    #[error("etcdserver: server stopped")]
    Stopped,
    #[error("etcdserver: request timed out")]
    TimedOut,
    #[error("etcdserver: bad leader transferee")]
    BadTransferee,
    #[error("etcdserver: corrupt cluster")]
    Corrupt,
    #[error("etcdserver: root user does not exist")]
    RootUserNotExist,
    #[error("etcdserver: root user does not have root role")]
    RootRoleNotExist,
    #[error("etcdserver: user name already exists")]
    UserExists,
    #[error("etcdserver: user name is empty")]
    UserEmpty,
    #[error("etcdserver: user name not found")]
    UserNotFound,
    #[error("etcdserver: role name already exists")]
    RoleExists,
    #[error("etcdserver: role name not found")]
    RoleNotFound,
    #[error("etcdserver: role name is empty")]
    RoleEmpty,
    #[error("etcdserver: authentication failed, invalid user ID or password")]
    AuthFailed,
    #[error("etcdserver: permission not given")]
    PermissionNotGiven,
    #[error("etcdserver: permission denied")]
    PermissionDenied,
    #[error("etcdserver: role is not granted to the user")]
    RoleNotGranted,
    #[error("etcdserver: permission is not granted to the role")]
    PermissionNotGranted,
    #[error("etcdserver: authentication is not enabled")]
    AuthNotEnabled,
    #[error("etcdserver: invalid auth token")]
    InvalidAuthToken,
    #[error("etcdserver: invalid auth management")]
    InvalidAuthManagement,
    #[error("etcdserver: revision of auth store is old")]
    AuthOldRevision,
}

impl RequestError {
    /// gRPC's status code, as etcd gives it for the same mistake.
    pub fn code(&self) -> i32 {
        const INVALID_ARGUMENT: i32 = 3;
        const NOT_FOUND: i32 = 5;
        const PERMISSION_DENIED: i32 = 7;
        const RESOURCE_EXHAUSTED: i32 = 8;
        const FAILED_PRECONDITION: i32 = 9;
        const OUT_OF_RANGE: i32 = 11;
        const UNAVAILABLE: i32 = 14;
        const DATA_LOSS: i32 = 15;
        const UNAUTHENTICATED: i32 = 16;
        match self {
            Self::EmptyKey
            | Self::KeyNotFound
            | Self::ValueProvided
            | Self::LeaseProvided
            | Self::TooManyOperations
            | Self::DuplicateKey
            | Self::InvalidSortOption
            | Self::RequestTooLarge
            | Self::BadPeerUrls
            | Self::UserEmpty
            | Self::RoleEmpty
            | Self::AuthFailed
            | Self::PermissionNotGiven
            | Self::InvalidAuthManagement
            | Self::AuthOldRevision => INVALID_ARGUMENT,
            Self::LeaseNotFound | Self::MemberNotFound => NOT_FOUND,
            Self::NoSpace | Self::TooManyRequests => RESOURCE_EXHAUSTED,
            Self::LeaseExists
            | Self::MemberExists
            | Self::PeerUrlExists
            | Self::NotEnoughStarted
            | Self::NotLearner
            | Self::LearnerNotReady
            | Self::TooManyLearners
            | Self::NotLeader
            | Self::BadTransferee
            | Self::RootUserNotExist
            | Self::RootRoleNotExist
            | Self::UserExists
            | Self::UserNotFound
            | Self::RoleExists
            | Self::RoleNotFound
            | Self::RoleNotGranted
            | Self::PermissionNotGranted
            | Self::AuthNotEnabled => FAILED_PRECONDITION,
            Self::Compacted | Self::FutureRevision | Self::LeaseTtlTooLarge => OUT_OF_RANGE,
            Self::NoLeader
            | Self::LeaderChanged
            | Self::Stopped
            | Self::TimedOut
            | Self::NotForLearners
            | Self::Unhealthy => UNAVAILABLE,
            Self::Corrupt => DATA_LOSS,
            Self::PermissionDenied => PERMISSION_DENIED,
            Self::InvalidAuthToken => UNAUTHENTICATED,
        }
    }
}

/// A request failed: it is refused, or the member is broken.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The client's mistake, or a state that the client should know of.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The member's.
    #[error(transparent)]
    Member(#[from] MemberError),
}
