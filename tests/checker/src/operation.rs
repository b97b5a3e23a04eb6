use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// One request of one client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Who asked. A client asks for one thing at a time; one that gives up waiting asks on under a
    /// new number.
    pub client: u64,
    /// When the request was sent.
    pub call: u64,
    /// When the answer was there, or the client gave up.
    pub end: u64,
    /// What was asked.
    pub request: Request,
    /// What came of it.
    pub outcome: Outcome,
}

/// What is known of what came of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The store answered.
    Ok(Response),
    /// The store had this against it, which says something about its state. Nothing was done.
    Refused(Refusal),
    /// Nothing was done, and nothing is said about the state: it never left the client, or the
    /// store was too busy, had no space, or had no leader to propose it to.
    Failed,
    /// It may have been done, may be done later still, or never: a lost connection, a time limit.
    Unknown,
}

/// Keys that a request is about (etcd's `key` and `range_end`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Keys {
    /// One key.
    One(#[serde(with = "crate::text")] Bytes),
    /// From the first, to the second, which is not among them.
    Range(
        #[serde(with = "crate::text")] Bytes,
        #[serde(with = "crate::text")] Bytes,
    ),
    /// All from this one on.
    From(#[serde(with = "crate::text")] Bytes),
}

/// A request that changes the keyspace or reads it (RPCs of etcd's KV and Lease services).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Reads keys.
    Range(Range),
    /// Writes a key.
    Put(Put),
    /// Deletes keys.
    Delete(Delete),
    /// Compares, and does one or the other list of operations.
    Txn(Txn),
    /// Forgets what was before a revision.
    Compact(i64),
    /// Makes a lease of this ID. Where the store chose it, it is known from the answer.
    LeaseGrant(i64),
    /// Ends a lease; its keys are deleted.
    LeaseRevoke(i64),
}

/// Reads keys, in order of key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Which.
    pub keys: Keys,
    /// As of which revision; 0 for now.
    pub revision: i64,
    /// How many at most; 0 for all.
    pub limit: usize,
    /// The count alone is wanted.
    pub count_only: bool,
    /// Values are left out.
    pub keys_only: bool,
    /// The member may answer from what it has: the answer is of a past state, not of a made-up one.
    pub serializable: bool,
}

/// Writes a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Put {
    /// The key.
    #[serde(with = "crate::text")]
    pub key: Bytes,
    /// Its value.
    #[serde(with = "crate::text")]
    pub value: Bytes,
    /// The lease that it is attached to; 0 for none.
    pub lease: i64,
    /// Whether the answer holds what was there before.
    pub prev_kv: bool,
}

/// Deletes keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delete {
    /// Which.
    pub keys: Keys,
    /// Whether the answer holds what was there before.
    pub prev_kv: bool,
}

/// A transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Txn {
    /// What must be true of keys.
    pub compares: Vec<Compare>,
    /// What is done if all of it is.
    pub success: Vec<TxnOperation>,
    /// What is done if not.
    pub failure: Vec<TxnOperation>,
}

/// One of a transaction's operations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TxnOperation {
    /// Reads, with what the operations before it did.
    Range(Range),
    /// Writes.
    Put(Put),
    /// Deletes.
    Delete(Delete),
}

/// A comparison, which must hold for each key that exists. If none does, it is with a key whose
/// numbers are all 0 and whose value equals nothing, nor differs from anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compare {
    /// Which keys.
    pub keys: Keys,
    /// How what is there is to compare with the target.
    pub relation: Relation,
    /// What it is compared with.
    pub target: Target,
}

/// How two things compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Each is what it says.
pub enum Relation {
    Equal,
    NotEqual,
    Greater,
    Less,
}

/// What of a key is compared, and with what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Each is what it says.
pub enum Target {
    CreateRevision(i64),
    ModRevision(i64),
    Version(i64),
    Value(#[serde(with = "crate::text")] Bytes),
    Lease(i64),
}

/// What the store answered. Revisions are those of the answer's header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// To a range.
    Range {
        /// The state's that was read. Not the request's.
        revision: i64,
        /// The rest.
        result: RangeResult,
    },
    /// To a put.
    Put {
        /// The revision that it made.
        revision: i64,
        /// What was there before, if asked for.
        prev_kv: Option<KeyValue>,
    },
    /// To a delete.
    Delete {
        /// The revision that it made, or the state's where nothing was deleted.
        revision: i64,
        /// How many keys were deleted.
        deleted: usize,
        /// What they were, if asked for.
        prev_kvs: Vec<KeyValue>,
    },
    /// To a transaction.
    Txn {
        /// The revision that it made, or the state's where nothing was written.
        revision: i64,
        /// Whether the comparisons held.
        succeeded: bool,
        /// One for each operation.
        results: Vec<TxnResult>,
    },
    /// To everything else, which is known to be done. Its header's revision counts for nothing:
    /// etcd fills it in afterwards.
    Done,
}

/// What one operation of a transaction answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // As in Response.
pub enum TxnResult {
    Range(RangeResult),
    Put {
        prev_kv: Option<KeyValue>,
    },
    Delete {
        deleted: usize,
        prev_kvs: Vec<KeyValue>,
    },
}

/// Keys that were read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeResult {
    /// Them, in order of key.
    pub kvs: Vec<KeyValue>,
    /// How many there are, with those behind the limit.
    pub count: usize,
    /// Whether the limit cut some off.
    pub more: bool,
}

/// What a store has against a request (etcd's `api/v3rpc/rpctypes`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Each is what it says.
pub enum Refusal {
    Compacted,
    FutureRevision,
    LeaseNotFound,
    LeaseExists,
    DuplicateKey,
}

/// A key as of some revision (`mvccpb.KeyValue`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // As in mvccpb.
pub struct KeyValue {
    #[serde(with = "crate::text")]
    pub key: Bytes,
    #[serde(with = "crate::text")]
    pub value: Bytes,
    pub create_revision: i64,
    pub mod_revision: i64,
    pub version: i64,
    pub lease: i64,
}

impl Keys {
    /// Every key there can be.
    pub fn all() -> Self {
        Self::From(Bytes::new())
    }

    /// Those that begin with `prefix`.
    pub fn prefix(prefix: &[u8]) -> Self {
        let mut end = prefix.to_vec();
        while let Some(last) = end.pop() {
            if last < u8::MAX {
                end.push(last + 1);
                return Self::Range(Bytes::copy_from_slice(prefix), end.into());
            }
        }
        Self::From(Bytes::copy_from_slice(prefix))
    }

    /// Whether `key` is one of them.
    pub fn contains(&self, key: &[u8]) -> bool {
        match self {
            Self::One(one) => one == key,
            Self::Range(first, end) => **first <= *key && *key < **end,
            Self::From(first) => **first <= *key,
        }
    }
}

impl Range {
    /// Reads all of `keys`, linearizably.
    pub fn of(keys: Keys) -> Self {
        Self {
            keys,
            revision: 0,
            limit: 0,
            count_only: false,
            keys_only: false,
            serializable: false,
        }
    }
}

impl Response {
    /// The header's revision, where it counts.
    pub fn revision(&self) -> Option<i64> {
        match self {
            Self::Range { revision, .. }
            | Self::Put { revision, .. }
            | Self::Delete { revision, .. }
            | Self::Txn { revision, .. } => Some(*revision),
            Self::Done => None,
        }
    }
}
