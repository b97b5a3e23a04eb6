//! Watches: who gets which events, without ever holding up the member or each other.
//!
//! A watch is *synced* when every event up to the published revision is in its stream's queue. A
//! stream whose client reads too slowly has its queue filled up; its watches then fall behind, and
//! catch up from the keyspace's history when the client reads again. No event is skipped: if the
//! history was compacted meanwhile, the watch is canceled and says so.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::keyspace::{Event, History, KeyRange, Keyspace, RangeEnd};
use crate::planted::{PlantedBug, is_planted};
use crate::{Failure, MemberError, RequestError};

/// Bytes of events that wait in one stream before its watches fall behind.
const QUEUE_BYTES: usize = 4 * 1024 * 1024;

/// Every watch of a member.
pub struct Watches {
    keyspace: Arc<Keyspace>,
    hub: Mutex<Hub>,
}

/// What to watch.
#[derive(Debug, Clone)]
pub struct WatchOptions {
    /// The keys.
    pub range: KeyRange,
    /// Whether puts are left out.
    pub no_puts: bool,
    /// Whether deletions are left out.
    pub no_deletions: bool,
}

/// Events for one watch.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The watch's id in its stream.
    pub watch_id: i64,
    /// Revision of the keyspace when they were delivered.
    pub revision: i64,
    /// In order, whole revisions.
    pub events: Vec<Arc<Event>>,
    /// Set if the watch has ended, because its next revision is compacted: that revision.
    pub compacted: Option<i64>,
}

/// Wakes whoever reads a stream.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// The watches of one client's stream.
pub struct WatchStream {
    watches: Arc<Watches>,
    id: u64,
}

#[derive(Default)]
struct Hub {
    /// Everything up to it is delivered to synced watches.
    revision: i64,
    /// Deliveries that wait in one stream before its watches fall behind.
    queued_deliveries: usize,
    next_stream: u64,
    streams: BTreeMap<u64, Stream>,
    /// Synced watches of one key.
    exact: HashMap<Bytes, Vec<WatchKey>>,
    /// Synced watches of ranges.
    ranges: Vec<(KeyRange, WatchKey)>,
}

/// Stream and watch.
type WatchKey = (u64, i64);

struct Stream {
    wake: Wake,
    queue: VecDeque<Delivery>,
    queued_bytes: usize,
    watches: BTreeMap<i64, Watch>,
}

struct Watch {
    options: WatchOptions,
    /// The next revision it needs, if it is behind or begins in the future.
    next: i64,
    synced: bool,
}

impl Watches {
    /// No watches yet.
    pub fn new(keyspace: Arc<Keyspace>) -> Arc<Self> {
        let hub = Hub {
            revision: keyspace.revision(),
            queued_deliveries: keyspace.limits().queued_deliveries,
            ..Hub::default()
        };
        Arc::new(Self {
            keyspace,
            hub: Mutex::new(hub),
        })
    }

    /// Opens a stream. `wake` is called, with locks held, when something is there to take.
    pub fn stream(self: &Arc<Self>, wake: Wake) -> WatchStream {
        let mut hub = self.hub.lock();
        let id = hub.next_stream;
        hub.next_stream += 1;
        let stream = Stream {
            wake,
            queue: VecDeque::new(),
            queued_bytes: 0,
            watches: BTreeMap::new(),
        };
        hub.streams.insert(id, stream);
        WatchStream {
            watches: Arc::clone(self),
            id,
        }
    }

    /// Delivers what was applied, in order.
    pub fn publish(&self, history: History) {
        let mut hub = self.hub.lock();
        let from = hub.revision;
        hub.revision = hub.revision.max(history.revision);
        if hub.streams.is_empty() {
            return;
        }
        let mut touched: BTreeMap<WatchKey, Vec<Arc<Event>>> = BTreeMap::new();
        for event in history.events {
            if event.kv.mod_revision <= from {
                continue;
            }
            let event = Arc::new(event);
            let exact = hub.exact.get(&event.kv.key).into_iter().flatten();
            let ranges = hub
                .ranges
                .iter()
                .filter(|(range, _)| range.contains(&event.kv.key))
                .map(|(_, key)| key);
            for key in exact.chain(ranges) {
                touched.entry(*key).or_default().push(Arc::clone(&event));
            }
        }
        for (key, events) in touched {
            hub.deliver(key, events);
        }
    }

    /// A snapshot was installed that reaches up to `revision`: watches get what lies between from
    /// its history.
    pub fn jump(&self, revision: i64) {
        let mut hub = self.hub.lock();
        let hub = &mut *hub;
        let next = hub.revision + 1;
        hub.revision = hub.revision.max(revision);
        hub.exact.clear();
        hub.ranges.clear();
        for stream in hub.streams.values_mut() {
            for watch in stream.watches.values_mut() {
                if watch.synced {
                    watch.synced = false;
                    watch.next = watch.next.max(next);
                }
            }
            (stream.wake)();
        }
    }

    /// Watches and streams that there are.
    pub fn count(&self) -> (usize, usize) {
        let hub = self.hub.lock();
        let watches = hub
            .streams
            .values()
            .map(|stream| stream.watches.len())
            .sum();
        (watches, hub.streams.len())
    }
}

impl Hub {
    fn deliver(&mut self, (stream_id, watch_id): WatchKey, events: Vec<Arc<Event>>) {
        let revision = self.revision;
        let Some(stream) = self.streams.get_mut(&stream_id) else {
            return;
        };
        let Some(watch) = stream.watches.get_mut(&watch_id) else {
            return;
        };
        let first = events
            .first()
            .map_or(revision, |event| event.kv.mod_revision);
        let events: Vec<_> = events
            .into_iter()
            .filter(|event| watch.options.wants(event) && event.kv.mod_revision >= watch.next)
            .collect();
        if events.is_empty() {
            return;
        }
        if stream.queue.len() >= self.queued_deliveries || stream.queued_bytes >= QUEUE_BYTES {
            watch.synced = false;
            watch.next = first;
            let range = watch.options.range.clone();
            self.unregister(&range, (stream_id, watch_id));
            return;
        }
        stream.queued_bytes += size(&events);
        stream.queue.push_back(Delivery {
            watch_id,
            revision,
            events,
            compacted: None,
        });
        (stream.wake)();
    }

    fn register(&mut self, range: &KeyRange, key: WatchKey) {
        if range.end == RangeEnd::Single {
            self.exact.entry(range.start.clone()).or_default().push(key);
        } else {
            self.ranges.push((range.clone(), key));
        }
    }

    fn unregister(&mut self, range: &KeyRange, key: WatchKey) {
        if range.end != RangeEnd::Single {
            self.ranges.retain(|(_, other)| *other != key);
            return;
        }
        if let Some(keys) = self.exact.get_mut(&range.start) {
            keys.retain(|other| *other != key);
            if keys.is_empty() {
                self.exact.remove(&range.start);
            }
        }
    }
}

impl WatchStream {
    /// Begins a watch. From `start` on if it is positive, else with the next revision. Returns the
    /// current revision. The id must be new in this stream.
    pub fn create(&self, watch_id: i64, options: WatchOptions, start: i64) -> i64 {
        let mut hub = self.watches.hub.lock();
        let revision = hub.revision;
        let synced = start <= 0 || start > revision;
        let range = options.range.clone();
        let Some(stream) = hub.streams.get_mut(&self.id) else {
            return revision;
        };
        let watch = Watch {
            options,
            next: if start <= 0 { revision + 1 } else { start },
            synced,
        };
        stream.watches.insert(watch_id, watch);
        if synced {
            hub.register(&range, (self.id, watch_id));
        }
        revision
    }

    /// Whether the stream has this watch.
    pub fn has(&self, watch_id: i64) -> bool {
        let hub = self.watches.hub.lock();
        hub.streams
            .get(&self.id)
            .is_some_and(|stream| stream.watches.contains_key(&watch_id))
    }

    /// Ends a watch. Returns whether there was one. What is queued for it is dropped.
    pub fn cancel(&self, watch_id: i64) -> bool {
        let mut hub = self.watches.hub.lock();
        let Some(stream) = hub.streams.get_mut(&self.id) else {
            return false;
        };
        let Some(watch) = stream.watches.remove(&watch_id) else {
            return false;
        };
        stream
            .queue
            .retain(|delivery| delivery.watch_id != watch_id);
        hub.unregister(&watch.options.range, (self.id, watch_id));
        true
    }

    /// What waits, or the next part of the history of watches that are behind. Empty if all are
    /// synced and nothing waits: the stream's `wake` is called when that changes.
    pub fn take(&self) -> Result<Vec<Delivery>, MemberError> {
        let behind = {
            let mut hub = self.watches.hub.lock();
            let Some(stream) = hub.streams.get_mut(&self.id) else {
                return Ok(Vec::new());
            };
            if !stream.queue.is_empty() {
                stream.queued_bytes = 0;
                return Ok(stream.queue.drain(..).collect());
            }
            stream
                .watches
                .iter()
                .find(|(_, watch)| !watch.synced)
                .map(|(id, watch)| (*id, watch.next, watch.options.clone()))
        };
        match behind {
            Some((id, next, options)) => self.catch_up(id, next, &options),
            None => Ok(Vec::new()),
        }
    }

    /// The current revision, if every watch is synced and nothing waits.
    pub fn progress(&self) -> Option<i64> {
        let hub = self.watches.hub.lock();
        let stream = hub.streams.get(&self.id)?;
        let synced = stream.watches.values().all(|watch| watch.synced);
        (synced && stream.queue.is_empty()).then_some(hub.revision)
    }

    /// Takes one step of history, however far it is. An empty delivery means: ask again.
    fn catch_up(
        &self,
        watch_id: i64,
        next: i64,
        options: &WatchOptions,
    ) -> Result<Vec<Delivery>, MemberError> {
        let wanted = |key: &[u8]| options.range.contains(key);
        let history = match self.watches.keyspace.history(next, wanted) {
            Ok(history) => history,
            Err(Failure::Request(RequestError::Compacted)) => {
                let (revision, compacted) = self.watches.keyspace.revisions();
                self.cancel(watch_id);
                return Ok(vec![Delivery {
                    watch_id,
                    revision,
                    events: Vec::new(),
                    compacted: Some(compacted),
                }]);
            }
            Err(Failure::Request(other)) => return Err(MemberError::Corrupt(other.to_string())),
            Err(Failure::Member(error)) => return Err(error),
        };
        let mut hub = self.watches.hub.lock();
        let published = hub.revision;
        let Some(stream) = hub.streams.get_mut(&self.id) else {
            return Ok(Vec::new());
        };
        let Some(watch) = stream.watches.get_mut(&watch_id) else {
            return Ok(Vec::new());
        };
        // The keyspace may be ahead of what was published: those events will come that way as well,
        // and are dropped there by `next`.
        watch.next = watch.next.max(history.revision + 1);
        watch.synced = history.revision >= published;
        if watch.synced {
            hub.register(&options.range, (self.id, watch_id));
        }
        let skipped = usize::from(is_planted(PlantedBug::WatchSkipsEvent));
        let events: Vec<_> = history
            .events
            .into_iter()
            .filter(|event| options.wants(event))
            .skip(skipped)
            .map(Arc::new)
            .collect();
        Ok(vec![Delivery {
            watch_id,
            revision: published.max(history.revision),
            events,
            compacted: None,
        }])
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        let mut hub = self.watches.hub.lock();
        if let Some(stream) = hub.streams.remove(&self.id) {
            for (watch_id, watch) in stream.watches {
                hub.unregister(&watch.options.range, (self.id, watch_id));
            }
        }
    }
}

impl WatchOptions {
    fn wants(&self, event: &Event) -> bool {
        !(if event.deletion {
            self.no_deletions
        } else {
            self.no_puts
        })
    }
}

fn size(events: &[Arc<Event>]) -> usize {
    events
        .iter()
        .map(|event| event.kv.key.len() + event.kv.value.len())
        .sum()
}

impl fmt::Debug for Watches {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (watches, streams) = self.count();
        formatter
            .debug_struct("Watches")
            .field("watches", &watches)
            .field("streams", &streams)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for WatchStream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WatchStream")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
