//! Events: what happened to objects, kept in the state store for an hour.

use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use jiff::Timestamp;
use keelson_api::{API_VERSION, Event, EventType, Kind, ObjectReference};
use keelson_controlplane::{
    EventKind, LeaseGrantRequest, LeaseId, PutRequest, StateError, StateStore, StateStoreExt,
    WatchRequest,
};
use tokio::sync::Mutex;

use crate::error::Result;

/// How long an event is kept, at least.
const KEPT: Duration = Duration::from_hours(1);
/// Events of so long a time share one lease, so that events cost the store few leases.
const LEASE_SHARED: Duration = Duration::from_mins(10);

/// Writes and reads events.
#[derive(Clone, Debug)]
pub struct EventRecorder {
    store: Arc<dyn StateStore>,
    lease: Arc<Mutex<Option<(LeaseId, tokio::time::Instant)>>>,
}

impl EventRecorder {
    /// A recorder on this store.
    pub fn new(store: Arc<dyn StateStore>) -> Self {
        Self {
            store,
            lease: Arc::default(),
        }
    }

    /// Records that something of the expected course happened.
    pub async fn normal(&self, kind: Kind, name: &str, reason: &str, message: impl Into<String>) {
        self.record(kind, name, EventType::Normal, reason, message.into())
            .await;
    }

    /// Records that something happened which a person may want to act on.
    pub async fn warning(&self, kind: Kind, name: &str, reason: &str, message: impl Into<String>) {
        self.record(kind, name, EventType::Warning, reason, message.into())
            .await;
    }

    async fn record(
        &self,
        kind: Kind,
        name: &str,
        severity: EventType,
        reason: &str,
        message: String,
    ) {
        tracing::info!(%kind, name, reason, "{message}");
        let event = Event {
            time: Timestamp::now(),
            object: ObjectReference {
                kind,
                name: name.into(),
            },
            kind: severity,
            reason: reason.into(),
            message,
        };
        // An event that cannot be kept is in the log; the work it tells of must go on.
        if let Err(error) = self.store_event(&event).await {
            tracing::warn!(%error, "an event could not be kept");
        }
    }

    async fn store_event(&self, event: &Event) -> Result<(), StateError> {
        let lease = self.lease().await?;
        // The time orders them; the random part tells apart what happened at once.
        let key = format!(
            "{}{:020}-{}",
            prefix(),
            event.time.as_nanosecond(),
            uuid::Uuid::new_v4().simple()
        );
        let value = serde_json::to_vec(event)
            .map_err(|error| StateError::InvalidArgument(error.to_string()))?;
        self.store
            .put(PutRequest::new(key, value).lease(lease))
            .await
            .map(drop)
    }

    async fn lease(&self) -> Result<LeaseId, StateError> {
        let mut current = self.lease.lock().await;
        match *current {
            Some((lease, granted)) if granted.elapsed() < LEASE_SHARED => Ok(lease),
            _ => {
                let request = LeaseGrantRequest::new(KEPT + LEASE_SHARED);
                let lease = self.store.lease_grant(request).await?.id;
                *current = Some((lease, tokio::time::Instant::now()));
                Ok(lease)
            }
        }
    }

    /// The events that are kept, oldest first, and the revision up to which they are.
    pub async fn list(&self) -> Result<(Vec<Event>, i64)> {
        let snapshot = self.store.list(prefix().as_bytes()).await?;
        let events = snapshot
            .kvs
            .iter()
            .filter_map(|kv| serde_json::from_slice(&kv.value).ok());
        Ok((events.collect(), snapshot.revision))
    }

    /// The events recorded after `revision`.
    pub async fn follow(
        &self,
        revision: i64,
    ) -> Result<impl Stream<Item = Result<Event>> + Send + use<>> {
        let request = WatchRequest::prefix(prefix()).from_revision(revision + 1);
        let batches = self.store.watch(request).await?;
        Ok(batches.flat_map(|batch| {
            let events: Vec<Result<Event>> = match batch {
                Err(error) => vec![Err(error.into())],
                Ok(batch) => batch
                    .events
                    .into_iter()
                    .filter(|event| event.kind == EventKind::Put)
                    .filter_map(|event| serde_json::from_slice(&event.kv.value).ok().map(Ok))
                    .collect(),
            };
            futures::stream::iter(events)
        }))
    }
}

fn prefix() -> String {
    format!("/{API_VERSION}/events/")
}
