//! Distributed state behind one trait, with swappable backends.

mod duplicates;
pub mod embedded;
mod error;
pub mod etcd;
mod ext;
mod key;
mod kv;
mod lease;
pub mod limits;
mod open;
mod request;
mod store;
mod txn;
mod url;
mod validate;
mod watch;

pub use self::error::StateError;
pub use self::ext::{Snapshot, StateStoreExt, Swap};
pub use self::key::KeyRange;
pub use self::kv::{KeyValue, LeaseId, NO_LEASE, Revision};
pub use self::lease::{Lease, LeaseGrantRequest, LeaseStatus};
pub use self::open::open;
pub use self::request::{
    DeleteRequest, DeleteResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
};
pub use self::store::{StateStore, StoreStatus};
pub use self::txn::{Compare, CompareOp, CompareTarget, Txn, TxnOp, TxnResponse, TxnResult};
pub use self::url::StoreUrl;
pub use self::watch::{Event, EventKind, WatchBatch, WatchRequest, WatchStream};
