//! Watches: one task for each client's stream.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::mvccpb;
use keelson_member::RequestError;
use keelson_member::keyspace::{Access, Event, KeyRange, RangeEnd};
use keelson_member::watch::{Delivery, WatchOptions, WatchStream};
use pb::watch_request::RequestUnion;
use pb::watch_server::Watch;
use prost::Message as _;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::credentials::Credentials;
use super::{Services, failed, refused};

/// Responses that wait for the client to read. What comes then waits in the member's queue.
const RESPONSES: usize = 16;
/// What etcd's clients set that want no answers from a member that is cut off.
const NEEDS_LEADER: &str = "hasleader";
/// How often such a stream looks for a leader.
const LEADER_INTERVAL: Duration = Duration::from_secs(1);
/// As often it may find none.
const LEADERLESS_INTERVALS: u32 = 3;
/// What etcd answers in place of an id that there is not.
const NO_WATCH: i64 = -1;

#[tonic::async_trait]
impl Watch for Services {
    type WatchStream = ReceiverStream<Result<pb::WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.refuse_learner()?;
        let (responses, received) = mpsc::channel(RESPONSES);
        let news = Arc::new(Notify::new());
        let wake = Arc::clone(&news);
        let stream = self
            .node
            .watches()
            .stream(Arc::new(move || wake.notify_one()));
        let session = Session {
            services: self.clone(),
            credentials: self.all_credentials(&request),
            stream,
            responses,
            watches: HashMap::new(),
            next_id: 0,
            progress_wanted: false,
            needs_leader: request.metadata().contains_key(NEEDS_LEADER),
        };
        tokio::spawn(session.run(request.into_inner(), news));
        Ok(Response::new(ReceiverStream::new(received)))
    }
}

/// One client's stream.
struct Session {
    services: Services,
    credentials: Credentials,
    stream: WatchStream,
    responses: mpsc::Sender<Result<pb::WatchResponse, Status>>,
    watches: HashMap<i64, Options>,
    next_id: i64,
    /// The client asked for progress, and not all watches were synced.
    progress_wanted: bool,
    /// The stream is to end when there is no leader.
    needs_leader: bool,
}

/// What a watch wants of its responses.
struct Options {
    previous: bool,
    fragment: bool,
    /// When it wants to hear next that nothing happened.
    progress_at: Option<Instant>,
}

/// The client is gone.
struct Gone;

impl Session {
    async fn run(mut self, mut requests: Streaming<pb::WatchRequest>, news: Arc<Notify>) {
        let mut progress = tokio::time::interval(
            self.services
                .limits
                .watch_progress
                .min(Duration::from_secs(10)),
        );
        let mut ending = pin!(self.services.ending.clone().begins());
        let mut leader = tokio::time::interval(LEADER_INTERVAL);
        let mut without_leader = 0;
        loop {
            let outcome = tokio::select! {
                () = &mut ending => self.end(&RequestError::Stopped).await,
                _ = leader.tick(), if self.needs_leader => {
                    if self.services.node.status().leader == 0 {
                        without_leader += 1;
                    } else {
                        without_leader = 0;
                    }
                    if without_leader < LEADERLESS_INTERVALS {
                        Ok(())
                    } else {
                        self.end(&RequestError::NoLeader).await
                    }
                }
                request = requests.message() => match request {
                    Ok(Some(request)) => self.handle(request).await,
                    Ok(None) | Err(_) => Err(Gone),
                },
                () = news.notified() => self.deliver().await,
                _ = progress.tick() => self.notify_progress().await,
            };
            if outcome.is_err() {
                return;
            }
        }
    }

    /// Ends the stream: the client goes on elsewhere.
    async fn end(&self, reason: &RequestError) -> Result<(), Gone> {
        let _ = self.responses.send(Err(refused(reason))).await;
        Err(Gone)
    }

    async fn handle(&mut self, request: pb::WatchRequest) -> Result<(), Gone> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(request)) => self.create(request).await,
            Some(RequestUnion::CancelRequest(request)) => {
                if self.stream.cancel(request.watch_id) {
                    self.watches.remove(&request.watch_id);
                    let mut response =
                        self.response(request.watch_id, self.services.node.keyspace().revision());
                    response.canceled = true;
                    self.send(response).await?;
                }
                Ok(())
            }
            Some(RequestUnion::ProgressRequest(_)) => {
                self.progress_wanted = true;
                self.answer_progress().await
            }
            None => Ok(()),
        }
    }

    async fn create(&mut self, request: pb::WatchCreateRequest) -> Result<(), Gone> {
        let revision = self.services.node.keyspace().revision();
        let key = if request.key.is_empty() {
            Bytes::from_static(&[0])
        } else {
            request.key
        };
        let range = KeyRange::new(&key, &request.range_end);
        let refusal = if let Err(error) = self.permit(&key, &request.range_end) {
            let code = tonic::Code::from_i32(error.code());
            Some(format!("rpc error: code = {code:?} desc = {error}"))
        } else if request.start_revision < 0 {
            Some(RequestError::Compacted.to_string())
        } else if range.is_empty() {
            Some("mvcc: watcher range is empty".to_owned())
        } else if request.watch_id != 0 && self.stream.has(request.watch_id) {
            Some("mvcc: duplicate watch ID provided on the WatchStream".to_owned())
        } else {
            None
        };
        if let Some(reason) = refusal {
            let mut response = self.response(NO_WATCH, revision);
            response.created = true;
            response.canceled = true;
            response.cancel_reason = reason;
            return self.send(response).await;
        }
        let watch_id = if request.watch_id == 0 {
            self.free_id()
        } else {
            request.watch_id
        };
        let interval = self.services.limits.watch_progress;
        let options = Options {
            previous: request.prev_kv,
            fragment: request.fragment,
            progress_at: request.progress_notify.then(|| Instant::now() + interval),
        };
        self.watches.insert(watch_id, options);
        let has = |filter: pb::watch_create_request::FilterType| {
            request.filters.contains(&(filter as i32))
        };
        let options = WatchOptions {
            range: if range.start.is_empty() {
                KeyRange {
                    start: key,
                    end: RangeEnd::Open,
                }
            } else {
                range
            },
            no_puts: has(pb::watch_create_request::FilterType::Noput),
            no_deletions: has(pb::watch_create_request::FilterType::Nodelete),
        };
        let revision = self
            .stream
            .create(watch_id, options, request.start_revision);
        let mut response = self.response(watch_id, revision);
        response.created = true;
        self.send(response).await?;
        // It may begin in the past.
        self.deliver().await
    }

    fn permit(&self, key: &Bytes, range_end: &Bytes) -> Result<(), RequestError> {
        let authority = self.services.authority(&self.credentials)?;
        let keyspace = self.services.node.keyspace();
        keyspace.with_auth(|auth| auth.check(&authority, key, range_end, Access::Read))
    }

    /// Sends what waits, and the history of watches that are behind.
    async fn deliver(&mut self) -> Result<(), Gone> {
        loop {
            let deliveries = match self.stream.take() {
                Ok(deliveries) => deliveries,
                Err(error) => {
                    let _ = self.responses.send(Err(failed(error.into()))).await;
                    return Err(Gone);
                }
            };
            if deliveries.is_empty() {
                break;
            }
            for delivery in deliveries {
                self.send_delivery(delivery).await?;
            }
        }
        self.answer_progress().await
    }

    async fn send_delivery(&mut self, delivery: Delivery) -> Result<(), Gone> {
        let mut response = self.response(delivery.watch_id, delivery.revision);
        if let Some(compacted) = delivery.compacted {
            self.watches.remove(&delivery.watch_id);
            response.canceled = true;
            response.compact_revision = compacted;
            return self.send(response).await;
        }
        let Some(options) = self.watches.get_mut(&delivery.watch_id) else {
            return Ok(()); // canceled meanwhile
        };
        if delivery.events.is_empty() {
            return Ok(());
        }
        if let Some(at) = &mut options.progress_at {
            *at = Instant::now() + self.services.limits.watch_progress;
        }
        let (previous, fragment) = (options.previous, options.fragment);
        response.events = delivery
            .events
            .iter()
            .map(|event| event_of(event, previous))
            .collect();
        if !fragment || response.encoded_len() <= self.services.limits.request_bytes {
            return self.send(response).await;
        }
        let events = std::mem::take(&mut response.events);
        let mut part = response.clone();
        let mut size = 0;
        for event in events {
            let length = event.encoded_len();
            if size > 0 && size + length > self.services.limits.request_bytes {
                part.fragment = true;
                self.send(std::mem::replace(&mut part, response.clone()))
                    .await?;
                size = 0;
            }
            size += length;
            part.events.push(event);
        }
        self.send(part).await
    }

    /// Answers a client that asked for progress, as soon as every watch is synced.
    async fn answer_progress(&mut self) -> Result<(), Gone> {
        if self.progress_wanted
            && let Some(revision) = self.stream.progress()
        {
            self.progress_wanted = false;
            let response = self.response(NO_WATCH, revision);
            self.send(response).await?;
        }
        Ok(())
    }

    /// Tells watches that asked for it that nothing happened.
    async fn notify_progress(&mut self) -> Result<(), Gone> {
        let now = Instant::now();
        let interval = self.services.limits.watch_progress;
        let mut due = Vec::new();
        if let Some(revision) = self.stream.progress() {
            for (id, options) in &mut self.watches {
                if let Some(at) = &mut options.progress_at
                    && *at <= now
                {
                    *at = now + interval;
                    due.push((*id, revision));
                }
            }
        }
        for (id, revision) in due {
            let response = self.response(id, revision);
            self.send(response).await?;
        }
        Ok(())
    }

    fn response(&self, watch_id: i64, revision: i64) -> pb::WatchResponse {
        pb::WatchResponse {
            header: self.services.header(revision),
            watch_id,
            ..pb::WatchResponse::default()
        }
    }

    async fn send(&self, response: pb::WatchResponse) -> Result<(), Gone> {
        self.responses.send(Ok(response)).await.map_err(|_| Gone)
    }

    fn free_id(&mut self) -> i64 {
        while self.watches.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }
}

fn event_of(event: &Event, previous: bool) -> mvccpb::Event {
    let kind = if event.deletion {
        mvccpb::event::EventType::Delete
    } else {
        mvccpb::event::EventType::Put
    };
    mvccpb::Event {
        r#type: kind as i32,
        kv: Some(event.kv.clone()),
        prev_kv: if previous {
            event.previous.clone()
        } else {
            None
        },
    }
}
