//! The etcd and cluster backends: servers that speak etcd's gRPC API, version 3.4 and later.

mod endpoints;
mod failure;
mod kv;
mod namespace;
mod options;
mod tls;
mod txn;
mod watcher;

use std::sync::Arc;

use async_trait::async_trait;
use etcd_client::{
    CompactionOptions, LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions, ResponseHeader,
};
use tokio::sync::{Semaphore, watch};

use self::endpoints::{Call, Endpoints};
use self::namespace::Namespace;
use self::watcher::Watcher;
use crate::{
    DeleteRequest, DeleteResponse, KeyRange, Lease, LeaseGrantRequest, LeaseId, LeaseStatus,
    PutRequest, PutResponse, RangeRequest, RangeResponse, Revision, StateError, StateStore,
    StoreStatus, Txn, TxnResponse, WatchRequest, WatchStream, duplicates, validate,
};

pub use self::options::{
    Credentials, EtcdOptions, MAX_ENDPOINTS, MAX_PREFIX_BYTES, MAX_WATCHES, Server, Tls,
    TlsIdentity,
};

/// A [`StateStore`] in an etcd cluster.
///
/// Requests go to one endpoint until it fails, then to the next. A request that reached no server,
/// and every read, is tried again until [`EtcdOptions::timeout`] is over; a write whose outcome is
/// unknown never is: it fails with [`StateError::OutcomeUnknown`].
///
/// Every key is below [`EtcdOptions::prefix`], which callers don't see. Revisions and leases are
/// those of the whole cluster: ending a lease deletes its keys wherever they are.
#[derive(Debug)]
pub struct EtcdStore {
    endpoints: Arc<Endpoints>,
    namespace: Namespace,
    watches: Arc<Semaphore>,
    closed: watch::Sender<bool>,
    server: Server,
}

impl EtcdStore {
    /// Connects, and reads once to see that the cluster answers.
    ///
    /// # Errors
    /// [`StateError::InvalidUrl`] for unusable options, [`StateError::Unavailable`] or
    /// [`StateError::PermissionDenied`].
    pub async fn open(options: EtcdOptions) -> Result<Self, StateError> {
        let store = Self {
            namespace: Namespace::new(options.prefix.clone()),
            server: options.server,
            endpoints: Arc::new(Endpoints::new(options)?),
            watches: Arc::new(Semaphore::new(MAX_WATCHES)),
            closed: watch::Sender::new(false),
        };
        store.current_revision().await?;
        Ok(store)
    }

    /// The revision of a linearizable read.
    async fn current_revision(&self) -> Result<Revision, StateError> {
        let nothing = RangeRequest::new(KeyRange::range("", "")).count_only();
        Ok(self.read_range(&nothing).await?.revision)
    }

    async fn read_range(&self, request: &RangeRequest) -> Result<RangeResponse, StateError> {
        let (key, options) = kv::encode_range(&self.namespace, request);
        let read = |mut client: endpoints::Clients| {
            let (key, options) = (key.clone(), options.clone());
            async move { client.kv.get(key, Some(options)).await }
        };
        let response = self.endpoints.call(Call::Read, read).await;
        let response = response.map_err(|error| name_revision(error, request.revision))?;
        kv::decode_range(&self.namespace, request, response.0, None)
    }

    fn check_open(&self) -> Result<(), StateError> {
        if *self.closed.borrow() {
            return Err(StateError::Closed);
        }
        Ok(())
    }
}

#[async_trait]
impl StateStore for EtcdStore {
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StateError> {
        validate::range(&request)?;
        self.check_open()?;
        self.read_range(&request).await
    }

    async fn put(&self, request: PutRequest) -> Result<PutResponse, StateError> {
        validate::put(&request)?;
        self.check_open()?;
        let key = self.namespace.key(&request.key);
        let options: PutOptions = kv::encode_put(&request);
        let write = |mut client: endpoints::Clients| {
            let (key, value) = (key.clone(), request.value.to_vec());
            let options = options.clone();
            async move { client.kv.put(key, value, Some(options)).await }
        };
        let response = self.endpoints.call(Call::Write, write).await;
        let response = response.map_err(|error| name_lease(error, request.lease))?;
        kv::decode_put(&self.namespace, response.0, None)
    }

    async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse, StateError> {
        validate::delete(&request)?;
        self.check_open()?;
        if request.range.is_empty() {
            return Ok(DeleteResponse {
                revision: self.current_revision().await?,
                ..Default::default()
            });
        }
        let (key, options) = kv::encode_delete(&self.namespace, &request);
        let write = |mut client: endpoints::Clients| {
            let (key, options) = (key.clone(), options.clone());
            async move { client.kv.delete(key, Some(options)).await }
        };
        let response = self.endpoints.call(Call::Write, write).await?;
        kv::decode_delete(&self.namespace, response.0, None)
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResponse, StateError> {
        validate::txn(&txn)?;
        duplicates::check(&txn)?;
        self.check_open()?;
        let encoded = txn::encode(&self.namespace, &txn);
        let call = if txn::writes(&txn) {
            Call::Write
        } else {
            Call::Read
        };
        let run = |mut client: endpoints::Clients| {
            let encoded = encoded.clone();
            async move { client.kv.txn(encoded).await }
        };
        let response = self.endpoints.call(call, run).await?;
        txn::decode(&self.namespace, &txn, response.0, None)
    }

    async fn watch(&self, request: WatchRequest) -> Result<WatchStream, StateError> {
        validate::watch(&request)?;
        self.check_open()?;
        let permit =
            Arc::clone(&self.watches)
                .try_acquire_owned()
                .map_err(|_| StateError::Exhausted {
                    what: "watches",
                    limit: MAX_WATCHES,
                })?;
        // The member that serves the watch may lag behind: "from now on" is what a linearizable
        // read says.
        let start = match request.start_revision {
            Some(revision) => revision,
            None => self.current_revision().await? + 1,
        };
        let endpoints = Arc::clone(&self.endpoints);
        let closed = self.closed.subscribe();
        let namespace = self.namespace.clone();
        let mut watcher = Watcher::new(endpoints, namespace, closed, &request, start, permit);
        watcher.establish().await?;
        Ok(watcher.into_stream())
    }

    async fn compact(&self, revision: Revision) -> Result<Revision, StateError> {
        validate::compact(revision)?;
        self.check_open()?;
        let write = |mut client: endpoints::Clients| async move {
            let options = CompactionOptions::new();
            client.kv.compact(revision, Some(options)).await
        };
        let response = self.endpoints.call(Call::Write, write).await;
        let response = response.map_err(|error| name_revision(error, Some(revision)))?;
        header_revision(response.header())
    }

    async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<Lease, StateError> {
        let seconds = validate::lease_grant(&request)?;
        self.check_open()?;
        let write = |mut client: endpoints::Clients| async move {
            let options = LeaseGrantOptions::new().with_id(request.id.unwrap_or_default());
            client.lease.grant(seconds, Some(options)).await
        };
        let response = self.endpoints.call(Call::Write, write).await;
        let response =
            response.map_err(|error| name_lease(error, request.id.unwrap_or_default()))?;
        Ok(Lease {
            id: response.id(),
            ttl: kv::seconds(response.ttl()),
            revision: header_revision(response.header())?,
        })
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Lease, StateError> {
        self.check_open()?;
        // Doing it twice is as good as once, so it is tried again like a read.
        let keep_alive = |mut client: endpoints::Clients| async move {
            let (mut keeper, mut answers) = client.lease.keep_alive(lease).await?;
            // The client has used up the answer to the first request.
            keeper.keep_alive().await?;
            answers.message().await
        };
        let response = self.endpoints.call(Call::Read, keep_alive).await;
        let response = response.map_err(|error| name_lease(error, lease))?;
        let response = response.ok_or_else(|| {
            StateError::Unavailable("the server ended the keep-alive stream".into())
        })?;
        if response.ttl() <= 0 {
            return Err(StateError::LeaseNotFound { lease });
        }
        Ok(Lease {
            id: lease,
            ttl: kv::seconds(response.ttl()),
            revision: header_revision(response.0.header.as_ref().map(Into::into))?,
        })
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<Revision, StateError> {
        self.check_open()?;
        let write =
            |mut client: endpoints::Clients| async move { client.lease.revoke(lease).await };
        let response = self.endpoints.call(Call::Write, write).await;
        let response = response.map_err(|error| name_lease(error, lease))?;
        header_revision(response.header())
    }

    async fn lease_status(&self, id: LeaseId, keys: bool) -> Result<LeaseStatus, StateError> {
        self.check_open()?;
        let read = |mut client: endpoints::Clients| async move {
            let options = LeaseTimeToLiveOptions::new();
            let options = if keys { options.with_keys() } else { options };
            client.lease.time_to_live(id, Some(options)).await
        };
        let response = self.endpoints.call(Call::Read, read).await;
        let response = response.map_err(|error| name_lease(error, id))?;
        // etcd answers so for a lease that it doesn't know.
        if response.ttl() < 0 {
            return Err(StateError::LeaseNotFound { lease: id });
        }
        let keys = response.keys().iter();
        let mut keys: Vec<_> = keys.filter_map(|key| self.namespace.strip(key)).collect();
        keys.sort_unstable();
        Ok(LeaseStatus {
            id,
            granted_ttl: kv::seconds(response.granted_ttl()),
            remaining_ttl: kv::seconds(response.ttl()),
            keys,
            revision: header_revision(response.header())?,
        })
    }

    async fn status(&self) -> Result<StoreStatus, StateError> {
        self.check_open()?;
        let revision = self.current_revision().await?;
        let read =
            |mut client: endpoints::Clients| async move { client.maintenance.status().await };
        let response = self.endpoints.call(Call::Read, read).await?;
        Ok(StoreStatus {
            backend: self.server.scheme(),
            location: self.endpoints.location(&self.namespace),
            version: match self.server {
                Server::Etcd => format!("etcd {}", response.version()),
                Server::KeelsonState => {
                    format!("keelson-state, etcd API {}", response.version())
                }
            },
            revision,
            compact_revision: None,
            size_bytes: u64::try_from(response.db_size()).unwrap_or(0),
        })
    }

    async fn close(&self) -> Result<(), StateError> {
        if self.closed.send_replace(true) {
            return Err(StateError::Closed);
        }
        Ok(())
    }
}

fn header_revision(header: Option<&ResponseHeader>) -> Result<Revision, StateError> {
    let header = header.ok_or_else(|| unexpected("has no header"))?;
    Ok(header.revision())
}

/// Puts the revision asked for into an error that the server gave without it.
fn name_revision(error: StateError, revision: Option<Revision>) -> StateError {
    let requested = revision.unwrap_or_default();
    match error {
        StateError::Compacted {
            compact_revision, ..
        } => StateError::Compacted {
            requested,
            compact_revision,
        },
        StateError::FutureRevision { current, .. } => {
            StateError::FutureRevision { requested, current }
        }
        error => error,
    }
}

/// Puts the lease asked for into an error that the server gave without it.
fn name_lease(error: StateError, lease: LeaseId) -> StateError {
    match error {
        StateError::LeaseNotFound { .. } => StateError::LeaseNotFound { lease },
        StateError::LeaseExists { .. } => StateError::LeaseExists { lease },
        error => error,
    }
}

/// An answer that etcd's API doesn't allow.
fn unexpected(what: &str) -> StateError {
    StateError::Storage(format!("an answer of etcd {what}"))
}
