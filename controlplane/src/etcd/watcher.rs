//! One watch: a cursor that is taken up again at another member when a connection is lost.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::proto::{PbEvent, PbWatchResponse};
use etcd_client::{EventType, WatchClient, WatchOptions};
use futures::stream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep, timeout};

use super::endpoints::Endpoints;
use super::failure::Failure;
use super::kv::key_value;
use super::namespace::Namespace;
use super::unexpected;
use crate::{Event, EventKind, Revision, StateError, WatchBatch, WatchRequest, WatchStream};

/// Pause before the first attempt to connect again; doubled after each that fails.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

pub(super) struct Watcher {
    endpoints: Arc<Endpoints>,
    namespace: Namespace,
    closed: watch::Receiver<bool>,
    key: Vec<u8>,
    options: WatchOptions,
    /// Whether batches without events are wanted.
    progress: bool,
    /// First revision that has not arrived completely.
    next: Revision,
    /// Changes of `next` or a later revision of which more are to come.
    incomplete: Vec<Event>,
    ready: VecDeque<WatchBatch>,
    endpoint: usize,
    connection: Option<Connection>,
    /// Connections lost since the last news.
    failures: u32,
    _permit: OwnedSemaphorePermit,
}

struct Connection {
    // Keeps the connection open.
    _client: WatchClient,
    stream: etcd_client::WatchStream,
}

impl Watcher {
    pub(super) fn new(
        endpoints: Arc<Endpoints>,
        namespace: Namespace,
        closed: watch::Receiver<bool>,
        request: &WatchRequest,
        start: Revision,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        let range = namespace.range(&request.range);
        // Progress is of use even if nobody wants to hear of it: a watch without events would else
        // be taken up again at a revision that has long been compacted.
        let mut options = WatchOptions::new().with_progress_notify().with_fragment();
        if let Some(end) = range.end {
            options = options.with_range(end);
        }
        if request.prev_kv {
            options = options.with_prev_key();
        }
        Self {
            endpoint: endpoints.current(),
            endpoints,
            namespace,
            closed,
            key: range.key,
            options,
            progress: request.progress,
            next: start,
            incomplete: Vec::new(),
            ready: VecDeque::new(),
            connection: None,
            failures: 0,
            _permit: permit,
        }
    }

    /// Connects for the first time, within the time that a request may take.
    pub(super) async fn establish(&mut self) -> Result<(), StateError> {
        let deadline = Instant::now() + self.endpoints.timeout();
        loop {
            let reason = match self.connect().await {
                Ok(first) => return self.receive(first),
                Err(failure) => failure.of_read()?,
            };
            let pause = self.next_endpoint();
            if Instant::now() + pause >= deadline {
                return Err(StateError::Unavailable(format!("watch: {reason}")));
            }
            sleep(pause).await;
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
        let mut closed = self.closed.clone();
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            tokio::select! {
                biased;
                // Also if the store was dropped.
                _ = closed.wait_for(|closed| *closed) => return Err(StateError::Closed),
                advanced = self.advance() => advanced?,
            }
        }
    }

    /// Waits for the next message, or connects again.
    async fn advance(&mut self) -> Result<(), StateError> {
        let Some(connection) = &mut self.connection else {
            return self.reconnect().await;
        };
        match connection.stream.message().await {
            Ok(Some(response)) => self.receive(response.0),
            Ok(None) => {
                self.lose("the server ended the stream");
                Ok(())
            }
            Err(error) => {
                let reason = Failure::of(&error).of_read()?;
                self.lose(&reason);
                Ok(())
            }
        }
    }

    fn lose(&mut self, reason: &str) {
        let url = self.endpoints.url(self.endpoint);
        tracing::warn!(
            url,
            reason,
            revision = self.next,
            "a watch lost its connection"
        );
        self.connection = None;
        // All of that revision is sent again.
        self.incomplete.clear();
    }

    async fn reconnect(&mut self) -> Result<(), StateError> {
        sleep(self.next_endpoint()).await;
        match self.connect().await {
            Ok(first) => self.receive(first),
            Err(failure) => {
                let reason = failure.of_read()?;
                let url = self.endpoints.url(self.endpoint);
                tracing::debug!(url, reason, "a watch could not connect again");
                Ok(())
            }
        }
    }

    /// Chooses the endpoint to try next, and how long to wait before that.
    fn next_endpoint(&mut self) -> Duration {
        self.endpoint = self.endpoint.wrapping_add(1);
        let pause = FIRST_PAUSE * 2_u32.saturating_pow(self.failures.min(10));
        self.failures = self.failures.saturating_add(1);
        pause.min(LONGEST_PAUSE)
    }

    /// Connects and waits until the server says that it watches.
    async fn connect(&mut self) -> Result<PbWatchResponse, Failure> {
        let options = self.options.clone().with_start_revision(self.next);
        let dial = async {
            let mut client = self.endpoints.watch_client(self.endpoint).await?;
            let stream = client.watch(self.key.clone(), Some(options)).await;
            let mut stream = stream.map_err(|error| Failure::of(&error))?;
            match stream.message().await {
                Ok(Some(first)) => Ok((client, stream, first)),
                Ok(None) => Err(Failure::NotDone("the server ended the stream".into())),
                Err(error) => Err(Failure::of(&error)),
            }
        };
        let Ok(dialled) = timeout(self.endpoints.timeout(), dial).await else {
            return Err(Failure::NotDone("no answer in time".into()));
        };
        let (client, stream, first) = dialled?;
        self.connection = Some(Connection {
            _client: client,
            stream,
        });
        Ok(first.0)
    }

    fn receive(&mut self, response: PbWatchResponse) -> Result<(), StateError> {
        if response.canceled {
            return self.cancelled(&response);
        }
        if response.created {
            return Ok(());
        }
        self.failures = 0;
        if response.events.is_empty() {
            let header = response.header.ok_or_else(|| unexpected("has no header"))?;
            self.note_progress(header.revision);
            return Ok(());
        }
        for event in response.events {
            let event = self.event(event)?;
            let revision = event.kv.mod_revision;
            if revision < self.next {
                continue;
            }
            if self
                .incomplete_revision()
                .is_some_and(|other| other != revision)
            {
                self.complete();
            }
            self.incomplete.push(event);
        }
        if !response.fragment {
            self.complete();
        }
        Ok(())
    }

    /// The server sends progress only to a watch that has got everything before.
    fn note_progress(&mut self, revision: Revision) {
        if revision < self.next || !self.incomplete.is_empty() {
            return;
        }
        self.next = revision + 1;
        if self.progress {
            self.ready.push_back(WatchBatch {
                revision,
                events: Vec::new(),
            });
        }
    }

    fn incomplete_revision(&self) -> Option<Revision> {
        self.incomplete.first().map(|event| event.kv.mod_revision)
    }

    /// The revision that was incomplete is not any more.
    fn complete(&mut self) {
        let Some(revision) = self.incomplete_revision() else {
            return;
        };
        self.next = revision + 1;
        self.ready.push_back(WatchBatch {
            revision,
            events: std::mem::take(&mut self.incomplete),
        });
    }

    fn cancelled(&mut self, response: &PbWatchResponse) -> Result<(), StateError> {
        if response.compact_revision > 0 {
            return Err(StateError::Compacted {
                requested: self.next,
                compact_revision: response.compact_revision,
            });
        }
        let reason = &response.cancel_reason;
        if reason.contains("permission denied") {
            return Err(StateError::PermissionDenied(reason.clone()));
        }
        // The next connection logs in anew.
        if reason.is_empty() || reason.contains("invalid auth token") {
            self.lose(reason);
            return Ok(());
        }
        Err(StateError::InvalidArgument(reason.clone()))
    }

    fn event(&self, event: PbEvent) -> Result<Event, StateError> {
        let kind = match EventType::try_from(event.r#type) {
            Ok(EventType::Put) => EventKind::Put,
            Ok(EventType::Delete) => EventKind::Delete,
            Err(_) => return Err(unexpected("has an event of unknown type")),
        };
        let kv = event
            .kv
            .ok_or_else(|| unexpected("has an event without a key"))?;
        let prev_kv = event.prev_kv.map(|kv| key_value(&self.namespace, kv));
        Ok(Event {
            kind,
            kv: key_value(&self.namespace, kv)?,
            prev_kv: prev_kv.transpose()?,
        })
    }
}
