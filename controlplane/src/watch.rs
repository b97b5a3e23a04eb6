use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use futures::stream::BoxStream;

use crate::{KeyRange, KeyValue, Revision, StateError};

/// Asks to be told every change of a range of keys, as etcd's `Watch`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchRequest {
    /// The keys to watch.
    pub range: KeyRange,
    /// Begin with the changes of this revision; `None` begins with the next change. After a list,
    /// give the list's revision + 1, and nothing is missed or seen twice.
    pub start_revision: Option<Revision>,
    /// Put the pair as it was before into each event.
    pub prev_kv: bool,
    /// Also send batches without events from time to time while nothing changes, so that the
    /// receiver can note a newer revision to resume from. How often is up to the store.
    pub progress: bool,
}

impl WatchRequest {
    /// Watches `range` from now on.
    pub fn new(range: impl Into<KeyRange>) -> Self {
        Self {
            range: range.into(),
            start_revision: None,
            prev_kv: false,
            progress: false,
        }
    }

    /// Watches everything below `prefix` from now on.
    pub fn prefix(prefix: impl Into<Vec<u8>>) -> Self {
        Self::new(KeyRange::prefix(prefix))
    }

    /// Begins with the changes of `revision`.
    #[must_use]
    pub fn from_revision(mut self, revision: Revision) -> Self {
        self.start_revision = Some(revision);
        self
    }

    /// Puts the pair as it was before into each event.
    #[must_use]
    pub fn prev_kv(mut self) -> Self {
        self.prev_kv = true;
        self
    }

    /// Also sends batches without events.
    #[must_use]
    pub fn progress(mut self) -> Self {
        self.progress = true;
        self
    }
}

/// Everything that one revision changed in the watched range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    /// The revision. Everything up to it has been delivered: resume from `revision + 1`.
    pub revision: Revision,
    /// The changes, in the order in which they were made; none in a progress batch.
    pub events: Vec<Event>,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The pair after a put. After a delete: the key and the delete's revision as `mod_revision`,
    /// all else empty.
    pub kv: KeyValue,
    /// The pair before, if asked for, there was one, and it has not been compacted.
    pub prev_kv: Option<KeyValue>,
}

impl Event {
    /// Whether the key was created by this event.
    pub fn is_create(&self) -> bool {
        self.kind == EventKind::Put && self.kv.create_revision == self.kv.mod_revision
    }
}

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It was set.
    Put,
    /// It was deleted, by a request or because its lease ended.
    Delete,
}

/// The changes of a watched range, in order: each revision once, none skipped.
///
/// Nothing is buffered for a receiver that doesn't read: it falls behind, catches up from history
/// when it reads again, and is told with [`StateError::Compacted`] if history is gone by then. The
/// stream ends after its first error.
pub struct WatchStream {
    inner: BoxStream<'static, Result<WatchBatch, StateError>>,
}

impl WatchStream {
    /// A stream of `inner`'s batches.
    pub fn new(inner: impl Stream<Item = Result<WatchBatch, StateError>> + Send + 'static) -> Self {
        Self {
            inner: Box::pin(inner),
        }
    }
}

impl Stream for WatchStream {
    type Item = Result<WatchBatch, StateError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(context)
    }
}

impl fmt::Debug for WatchStream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WatchStream")
            .finish_non_exhaustive()
    }
}
