//! The embedded backend: durable, in this process, on the engine redb.

mod apply;
mod command;
mod compaction;
mod database;
mod errors;
mod feed;
mod leases;
mod lock;
mod record;
mod tables;
mod view;
mod watcher;
mod witness;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Semaphore, oneshot};

use self::command::{Answer, Command, Request};
use self::compaction::Compactor;
use self::database::Database;
use self::errors::Engine;
use self::feed::Feed;
use self::tables::{FORMAT, META, Number};
use self::view::with_view;
use self::watcher::Watcher;
use self::writer::Writer;
use crate::limits::{MAX_REQUEST_BYTES, MAX_WATCHES};
use crate::{
    DeleteRequest, DeleteResponse, Lease, LeaseGrantRequest, LeaseId, LeaseStatus, PutRequest,
    PutResponse, RangeRequest, RangeResponse, Revision, StateError, StateStore, StoreStatus, Txn,
    TxnOp, TxnResponse, TxnResult, WatchRequest, WatchStream, duplicates, validate,
};

pub use self::compaction::Retention;

/// Memory that queued requests may take, in KiB; more wait for their turn.
const QUEUE_KIB: usize = 64 * 1024;

/// How an [`EmbeddedStore`] is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedOptions {
    /// The store's directory; created if it doesn't exist.
    pub directory: PathBuf,
    /// How much history is kept.
    pub retention: Retention,
    /// Memory for cached pages, in bytes.
    pub cache_bytes: usize,
    /// How long a watch that wants progress hears nothing before it gets a batch without events.
    pub progress_interval: Duration,
}

impl EmbeddedOptions {
    /// The defaults: 10,000 revisions, 64 MiB of cache, progress after 10 s.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            retention: Retention::Revisions(10_000),
            cache_bytes: 64 * 1024 * 1024,
            progress_interval: Duration::from_secs(10),
        }
    }
}

/// A [`StateStore`] in one directory, for one process at a time.
///
/// Writes that arrive while others are being made durable share the next commit. Dropping a call's
/// future doesn't undo what it asked for. Dropping the store waits for writes under way.
#[derive(Debug)]
pub struct EmbeddedStore {
    database: Arc<Database>,
    feed: Arc<Feed>,
    queue: Arc<Semaphore>,
    watches: Arc<Semaphore>,
    progress_interval: Duration,
    writer: Mutex<WriterHandle>,
}

#[derive(Debug)]
struct WriterHandle {
    commands: Option<mpsc::Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

impl EmbeddedStore {
    /// Opens the store, or makes a new one. Reads and verifies the whole file.
    ///
    /// # Errors
    /// [`StateError::InUse`], [`StateError::NewerFormat`], [`StateError::Corrupt`] or
    /// [`StateError::Storage`].
    pub async fn open(options: EmbeddedOptions) -> Result<Self, StateError> {
        blocking(move || Self::open_blocking(&options)).await
    }

    fn open_blocking(options: &EmbeddedOptions) -> Result<Self, StateError> {
        let database = Arc::new(Database::open(&options.directory, options.cache_bytes)?);
        let (commands, requests) = mpsc::channel();
        let compactor = Compactor::new(options.retention);
        let writer = Writer::new(Arc::clone(&database), requests, compactor)?;
        let feed = writer.feed();
        let thread = std::thread::Builder::new()
            .name("state-writer".into())
            .spawn(move || writer.run())
            .map_err(|error| StateError::Storage(format!("start the writer thread: {error}")))?;
        Ok(Self {
            database,
            feed,
            queue: Arc::new(Semaphore::new(QUEUE_KIB)),
            watches: Arc::new(Semaphore::new(MAX_WATCHES)),
            progress_interval: options.progress_interval,
            writer: Mutex::new(WriterHandle {
                commands: Some(commands),
                thread: Some(thread),
            }),
        })
    }

    /// The store's directory.
    pub fn directory(&self) -> &Path {
        self.database.directory()
    }

    /// The current and the oldest readable revision.
    async fn revisions(&self) -> Result<(Revision, Revision), StateError> {
        let database = Arc::clone(&self.database);
        blocking(move || {
            database.read(|txn| {
                let meta = txn.open_table(META).engine("open a table")?;
                let revision = Number::Revision.require(&meta)?;
                Ok((revision, Number::CompactRevision.require(&meta)?))
            })
        })
        .await
    }

    async fn request(&self, request: Request, bytes: usize) -> Result<Answer, StateError> {
        debug_assert!(bytes <= MAX_REQUEST_BYTES);
        let share = u32::try_from(bytes / 1024 + 1).unwrap_or(1);
        let queue = Arc::clone(&self.queue);
        let permit = queue
            .acquire_many_owned(share)
            .await
            .map_err(|_| StateError::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.send(Command::Do {
            request,
            reply,
            _permit: permit,
        })?;
        answer.await.map_err(|_| StateError::Closed)?
    }

    fn send(&self, command: Command) -> Result<(), StateError> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let commands = writer.commands.as_ref().ok_or(StateError::Closed)?;
        commands.send(command).map_err(|_| StateError::Closed)
    }

    async fn single(&self, op: TxnOp, bytes: usize) -> Result<(Revision, TxnResult), StateError> {
        let response = match self
            .request(Request::Txn(Txn::new().then([op])), bytes)
            .await?
        {
            Answer::Txn(response) => response,
            answer => return Err(unexpected(&answer)),
        };
        let mut results = response.results;
        let result = results.pop().ok_or_else(|| unexpected(&"no result"))?;
        Ok((response.revision, result))
    }
}

#[async_trait]
impl StateStore for EmbeddedStore {
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StateError> {
        validate::range(&request)?;
        let database = Arc::clone(&self.database);
        blocking(move || database.read(|txn| with_view(txn, |view| view.range(&request)))).await
    }

    async fn put(&self, request: PutRequest) -> Result<PutResponse, StateError> {
        let bytes = validate::put(&request)?;
        match self.single(request.into(), bytes).await? {
            (_, TxnResult::Put(response)) => Ok(response),
            (_, result) => Err(unexpected(&result)),
        }
    }

    async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse, StateError> {
        let bytes = validate::delete(&request)?;
        match self.single(request.into(), bytes).await? {
            (_, TxnResult::Delete(response)) => Ok(response),
            (_, result) => Err(unexpected(&result)),
        }
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResponse, StateError> {
        let bytes = validate::txn(&txn)?;
        duplicates::check(&txn)?;
        match self.request(Request::Txn(txn), bytes).await? {
            Answer::Txn(response) => Ok(response),
            answer => Err(unexpected(&answer)),
        }
    }

    async fn watch(&self, request: WatchRequest) -> Result<WatchStream, StateError> {
        validate::watch(&request)?;
        if self.feed.progress().closed {
            return Err(StateError::Closed);
        }
        let permit =
            Arc::clone(&self.watches)
                .try_acquire_owned()
                .map_err(|_| StateError::Exhausted {
                    what: "watches",
                    limit: MAX_WATCHES,
                })?;
        if let Some(requested) = request.start_revision {
            // The feed may still have it in memory; what is gone is gone for everyone.
            let (_, compact_revision) = self.revisions().await?;
            if requested < compact_revision {
                return Err(StateError::Compacted {
                    requested,
                    compact_revision,
                });
            }
        }
        let (database, feed) = (Arc::clone(&self.database), Arc::clone(&self.feed));
        let watcher = Watcher::new(database, feed, request, self.progress_interval, permit);
        Ok(watcher.into_stream())
    }

    async fn compact(&self, revision: Revision) -> Result<Revision, StateError> {
        validate::compact(revision)?;
        match self.request(Request::Compact(revision), 0).await? {
            Answer::Revision(revision) => Ok(revision),
            answer => Err(unexpected(&answer)),
        }
    }

    async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<Lease, StateError> {
        let seconds = validate::lease_grant(&request)?;
        match self
            .request(
                Request::Grant {
                    id: request.id,
                    seconds,
                },
                0,
            )
            .await?
        {
            Answer::Lease(lease) => Ok(lease),
            answer => Err(unexpected(&answer)),
        }
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Lease, StateError> {
        match self.request(Request::KeepAlive(lease), 0).await? {
            Answer::Lease(lease) => Ok(lease),
            answer => Err(unexpected(&answer)),
        }
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<Revision, StateError> {
        match self.request(Request::Revoke(lease), 0).await? {
            Answer::Revision(revision) => Ok(revision),
            answer => Err(unexpected(&answer)),
        }
    }

    async fn lease_status(&self, id: LeaseId, keys: bool) -> Result<LeaseStatus, StateError> {
        match self.request(Request::LeaseStatus { id, keys }, 0).await? {
            Answer::LeaseStatus(status) => Ok(status),
            answer => Err(unexpected(&answer)),
        }
    }

    async fn status(&self) -> Result<StoreStatus, StateError> {
        let (revision, compact_revision) = self.revisions().await?;
        Ok(StoreStatus {
            backend: "embedded",
            location: self.directory().display().to_string(),
            version: format!("format {FORMAT}"),
            revision,
            compact_revision: Some(compact_revision),
            size_bytes: self.database.size_bytes(),
        })
    }

    async fn close(&self) -> Result<(), StateError> {
        let (reply, closed) = oneshot::channel();
        self.send(Command::Close(reply))?;
        closed.await.map_err(|_| StateError::Closed)?
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        let writer = self
            .writer
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // The thread ends when nobody can ask it anything any more.
        writer.commands = None;
        if let Some(thread) = writer.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the state store's writer thread panicked");
        }
    }
}

/// Runs what waits for the disk where that holds nobody up.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StateError> + Send + 'static,
) -> Result<T, StateError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StateError::Storage(format!(
            "a storage task ended early: {error}"
        ))),
    }
}

fn unexpected(what: &dyn std::fmt::Debug) -> StateError {
    StateError::Storage(format!("the writer answered with {what:?}"))
}
