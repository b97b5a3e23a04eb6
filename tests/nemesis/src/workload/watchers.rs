use std::sync::Arc;
use std::time::Duration;

use keelson_checker::{Keys, Watch, WatchBody, WatchRequest, WatchResponse};
use keelson_etcd_api::{etcdserverpb as pb, mvccpb};
use pb::watch_client::WatchClient;
use pb::watch_create_request::FilterType;
use pb::watch_request::RequestUnion;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::record::Record;
use crate::{admin, convert};

const LIMIT: Duration = Duration::from_secs(5);

/// How watches end.
#[derive(Debug, Clone, Copy)]
pub struct Ending {
    /// The last revision that there is.
    pub revision: i64,
    /// Until when they may get everything up to it.
    pub until: Instant,
}

/// One that watches, again and again where it was cut off.
pub struct Watcher {
    record: Arc<Record>,
    urls: Arc<[String]>,
    random: fastrand::Rng,
    ending: watch::Receiver<Option<Ending>>,
    /// Where it goes on.
    next: i64,
}

impl Watcher {
    pub fn new(
        record: Arc<Record>,
        urls: Arc<[String]>,
        random: fastrand::Rng,
        ending: watch::Receiver<Option<Ending>>,
    ) -> Self {
        Self {
            record,
            urls,
            random,
            ending,
            next: 1,
        }
    }

    /// The first ones watch everything, each on a member of its own, for as long as it lasts. The
    /// others watch this and that, some seconds each.
    pub async fn run(mut self, number: usize) {
        let mut at = number;
        let watches_all = number < self.urls.len();
        loop {
            let url = self.urls[at % self.urls.len()].clone();
            at += 1;
            let request = if watches_all {
                WatchRequest::of(Keys::all(), self.next)
            } else {
                self.any_request()
            };
            let life = if watches_all {
                1_000_000
            } else {
                self.random.u64(2_000..15_000)
            };
            let over = Instant::now() + Duration::from_millis(life);
            let is_over = self.watch(&url, request, over).await;
            let ending = *self.ending.borrow();
            if is_over || ending.is_some_and(|ending| Instant::now() >= ending.until) {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn any_request(&mut self) -> WatchRequest {
        let last = self.record.last_revision();
        WatchRequest {
            keys: match self.random.u32(..4) {
                0 => Keys::all(),
                1 => Keys::prefix(b"lease-"),
                2 => Keys::prefix(b"k1"),
                _ => Keys::One(format!("k{}", self.random.u32(..6)).into()),
            },
            start_revision: match self.random.u32(..3) {
                0 => 0,
                1 => (last - self.random.i64(0..500)).max(1),
                _ => last + self.random.i64(0..20),
            },
            prev_kv: self.random.bool(),
            no_put: self.random.u32(..5) == 0,
            no_delete: self.random.u32(..5) == 0,
        }
    }

    /// One watch. True if everything has come.
    async fn watch(&mut self, url: &str, request: WatchRequest, over: Instant) -> bool {
        let call = self.record.now();
        let (to_server, messages) = mpsc::channel(4);
        let create = pb::WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(message(&request))),
        };
        self.next = request.start_revision;
        // There is room for the first one.
        let _ = to_server.try_send(create);
        let opened = timeout(LIMIT, async {
            let channel = admin::connect(url).await?;
            let stream = ReceiverStream::new(messages);
            anyhow::Ok(WatchClient::new(channel).watch(stream).await?.into_inner())
        });
        let Ok(Ok(stream)) = opened.await else {
            return false;
        };
        let mut watch = Watch {
            client: self.record.new_client(),
            call,
            request,
            responses: Vec::new(),
            complete_through: None,
        };
        let is_complete = self.follow(stream, &to_server, &mut watch, over).await;
        self.record.watch(watch);
        is_complete
    }

    async fn follow(
        &mut self,
        mut stream: Streaming<pb::WatchResponse>,
        to_server: &mpsc::Sender<pb::WatchRequest>,
        watch: &mut Watch,
        over: Instant,
    ) -> bool {
        let mut fragments = Vec::new();
        let mut ask = Instant::now() + Duration::from_millis(self.random.u64(500..4000));
        loop {
            let ending = *self.ending.borrow();
            if let Some(ending) = ending {
                let had_time = Instant::now() >= ending.until;
                if had_time || self.next > ending.revision {
                    watch.complete_through = Some(ending.revision);
                    return true;
                }
            } else if Instant::now() >= over {
                return false;
            }
            let message = tokio::select! {
                message = stream.message() => message,
                () = tokio::time::sleep_until(ask) => {
                    let progress = RequestUnion::ProgressRequest(pb::WatchProgressRequest {});
                    // If the last one still waits, so does this.
                    let _ = to_server.try_send(pb::WatchRequest { request_union: Some(progress) });
                    let wait = if ending.is_some() { 300 } else { self.random.u64(500..8000) };
                    ask = Instant::now() + Duration::from_millis(wait);
                    continue;
                }
                _ = self.ending.changed() => {
                    ask = Instant::now();
                    continue;
                }
            };
            let Ok(Some(message)) = message else {
                return false;
            };
            if !self.take(message, watch, &mut fragments) {
                return false;
            }
        }
    }

    /// Notes a message. False if it is the last.
    fn take(
        &mut self,
        message: pb::WatchResponse,
        watch: &mut Watch,
        fragments: &mut Vec<mvccpb::Event>,
    ) -> bool {
        let at = self.record.now();
        let revision = convert::revision(message.header.as_ref());
        let mut goes_on = true;
        fragments.extend(message.events);
        if message.fragment {
            return true;
        }
        let body = if message.compact_revision > 0 {
            self.next = message.compact_revision;
            goes_on = false;
            WatchBody::Compacted(message.compact_revision)
        } else if message.canceled {
            goes_on = false;
            WatchBody::Canceled
        } else if message.created {
            if watch.request.start_revision == 0 {
                self.next = revision + 1;
            }
            WatchBody::Created
        } else if fragments.is_empty() {
            self.next = self.next.max(revision + 1);
            WatchBody::Progress
        } else {
            let events = std::mem::take(fragments)
                .into_iter()
                .filter_map(convert::event);
            let events: Vec<_> = events.collect();
            let last = events.iter().map(keelson_checker::Event::revision).max();
            self.next = self.next.max(last.unwrap_or(0) + 1);
            WatchBody::Events(events)
        };
        watch.responses.push(WatchResponse { at, revision, body });
        goes_on
    }
}

fn message(request: &WatchRequest) -> pb::WatchCreateRequest {
    let (key, range_end) = convert::keys(&request.keys);
    let mut filters = Vec::new();
    if request.no_put {
        filters.push(FilterType::Noput.into());
    }
    if request.no_delete {
        filters.push(FilterType::Nodelete.into());
    }
    pb::WatchCreateRequest {
        key,
        range_end,
        start_revision: request.start_revision,
        progress_notify: true,
        prev_kv: request.prev_kv,
        fragment: true,
        filters,
        ..pb::WatchCreateRequest::default()
    }
}
