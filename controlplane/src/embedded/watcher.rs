//! One watch: a cursor into history that reads on when its receiver asks for more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::database::Database;
use super::feed::{Feed, Progress};
use super::view::with_view;
use crate::{KeyRange, Revision, StateError, WatchBatch, WatchRequest, WatchStream};

/// Holds a cursor and at most one chunk of batches, however far behind its receiver is.
pub(super) struct Watcher {
    database: Arc<Database>,
    feed: Arc<Feed>,
    progress: watch::Receiver<Progress>,
    range: KeyRange,
    prev_kv: bool,
    /// How long nothing must happen before a batch without events is sent.
    idle: Option<Duration>,
    /// First revision not looked at.
    next: Revision,
    ready: VecDeque<WatchBatch>,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    pub(super) fn new(
        database: Arc<Database>,
        feed: Arc<Feed>,
        request: WatchRequest,
        idle: Duration,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        let progress = feed.subscribe();
        let now = progress.borrow().revision;
        Self {
            database,
            feed,
            progress,
            range: request.range,
            prev_kv: request.prev_kv,
            idle: request.progress.then_some(idle),
            next: request.start_revision.unwrap_or(now + 1),
            ready: VecDeque::new(),
            _permit: permit,
        }
    }

    /// The batches; after an error nothing more.
    pub(super) fn into_stream(self) -> WatchStream {
        WatchStream::new(stream::unfold(Some(self), |watcher| async {
            let mut watcher = watcher?;
            match watcher.next_batch().await {
                Ok(batch) => Some((Ok(batch), Some(watcher))),
                Err(error) => Some((Err(error), None)),
            }
        }))
    }

    async fn next_batch(&mut self) -> Result<WatchBatch, StateError> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            let progress = *self.progress.borrow_and_update();
            if progress.closed {
                return Err(StateError::Closed);
            }
            if self.next <= progress.revision {
                self.advance().await?;
            } else if self.wait().await? && self.next == progress.revision + 1 {
                return Ok(WatchBatch {
                    revision: progress.revision,
                    events: Vec::new(),
                });
            }
        }
    }

    /// Waits for news; returns whether there were none for the idle time.
    async fn wait(&mut self) -> Result<bool, StateError> {
        let changed = self.progress.changed();
        let changed = match self.idle {
            Some(idle) => match tokio::time::timeout(idle, changed).await {
                Ok(changed) => changed,
                Err(_) => return Ok(true),
            },
            None => changed.await,
        };
        changed.map(|()| false).map_err(|_| StateError::Closed)
    }

    /// Looks at the next revisions.
    async fn advance(&mut self) -> Result<(), StateError> {
        let Some(chunk) = self.feed.read(self.next) else {
            return self.catch_up().await;
        };
        for committed in chunk {
            self.next = committed.revision + 1;
            let mut events: Vec<_> = committed
                .events
                .iter()
                .filter(|event| self.range.contains(&event.kv.key))
                .cloned()
                .collect();
            if events.is_empty() {
                continue;
            }
            if !self.prev_kv {
                for event in &mut events {
                    event.prev_kv = None;
                }
            }
            self.ready.push_back(WatchBatch {
                revision: committed.revision,
                events,
            });
        }
        Ok(())
    }

    async fn catch_up(&mut self) -> Result<(), StateError> {
        let database = Arc::clone(&self.database);
        let (range, next, prev_kv) = (self.range.clone(), self.next, self.prev_kv);
        let read =
            move || database.read(|txn| with_view(txn, |view| view.changes(&range, next, prev_kv)));
        let changes = super::blocking(read).await?;
        self.next = changes.through + 1;
        let batches = changes.batches.into_iter();
        self.ready
            .extend(batches.map(|(revision, events)| WatchBatch { revision, events }));
        Ok(())
    }
}
