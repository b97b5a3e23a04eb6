//! Clients that watch: from now or from the past, reading at once or slowly, resuming elsewhere when
//! their stream ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use keelson_checker::{Keys, Watch, WatchBody, WatchRequest, WatchResponse};
use keelson_member::watch::{WatchOptions, WatchStream};

use crate::settings::{MILLISECOND, SECOND};
use crate::translate;
use crate::world::{Happening, World};

/// The id of a stream's only watch.
const WATCH: i64 = 1;

/// A client that watches.
#[derive(Debug)]
pub(crate) struct Watcher {
    /// What it wants; the start follows what it has seen.
    wanted: WatchRequest,
    /// The next revision that it has not seen; 0 if it begins with now.
    next: i64,
    /// The watch that is open, and where.
    open: Option<(usize, u64)>,
    watch: Option<Watch>,
    /// Tells its streams apart.
    stream: u64,
    slow: bool,
}

/// A watcher's stream, in a process.
#[derive(Debug)]
pub(crate) struct Session {
    stream: WatchStream,
    /// Set by the member when there is something to take.
    woken: Arc<AtomicBool>,
    number: u64,
    read_planned: bool,
}

impl World {
    pub(crate) fn add_watcher(&mut self, number: usize) {
        let from_beginning = number == 0;
        let random = &mut self.random;
        let keys = match random.below(4) {
            _ if from_beginning => Keys::all(),
            0 => Keys::One(format!("k{}", random.below(8)).into()),
            1 => Keys::prefix(b"k"),
            _ => Keys::all(),
        };
        let mut wanted = WatchRequest::of(keys, 0);
        if !from_beginning {
            wanted.prev_kv = random.percent(50);
            wanted.no_put = random.percent(15);
            wanted.no_delete = !wanted.no_put && random.percent(15);
        }
        let slow = !from_beginning && random.percent(30);
        self.watchers.push(Watcher {
            wanted,
            next: i64::from(from_beginning) * 2,
            open: None,
            watch: None,
            stream: 0,
            slow,
        });
        let first = self.random.between(0, 4000) * MILLISECOND;
        self.plan(first, Happening::Watcher(number));
    }

    /// A watcher opens a stream if it has none; or ends the one it has, to resume elsewhere.
    pub(crate) fn step_watcher(&mut self, index: usize) {
        let again = self.random.between(500, 8000) * MILLISECOND;
        if self.watchers[index].open.is_some() {
            if !self.healed {
                self.plan(again, Happening::Watcher(index));
                if self.random.percent(20) {
                    self.close_stream(index);
                    self.open_stream(index);
                }
            }
            return;
        }
        self.open_stream(index);
        let again = if self.healed {
            200 * MILLISECOND
        } else {
            again
        };
        self.plan(again, Happening::Watcher(index));
    }

    fn open_stream(&mut self, index: usize) {
        let number = self.any_machine();
        let (boot, member) = (self.machines[number].boot, self.machines[number].member);
        let now = self.now;
        let mut next = self.watchers[index].next;
        // Now and then one looks into the past again.
        if next > 2 && self.random.percent(10) {
            next = (next - i64::try_from(self.random.below(30)).unwrap_or(0)).max(2);
        }
        let watcher = &self.watchers[index];
        let number_of_stream = watcher.stream + 1;
        let mut request = watcher.wanted.clone();
        request.start_revision = next;
        let Some(process) = self.process(number, boot) else {
            return;
        };
        if process.replica.keyspace().is_learner(member) {
            return;
        }
        let woken = Arc::new(AtomicBool::new(false));
        let wake = Arc::clone(&woken);
        let stream = process
            .replica
            .watches()
            .stream(Arc::new(move || wake.store(true, Ordering::Relaxed)));
        let options = WatchOptions {
            range: translate::watched(&request.keys),
            no_puts: request.no_put,
            no_deletions: request.no_delete,
        };
        let revision = stream.create(WATCH, options, next);
        let session = Session {
            stream,
            woken,
            number: number_of_stream,
            read_planned: true,
        };
        process.sessions.insert(index, session);
        self.note(format_args!(
            "watcher {index} watches at m{number} from {next}: {request:?}"
        ));
        let client = self.new_client_number();
        let watcher = &mut self.watchers[index];
        watcher.stream = number_of_stream;
        watcher.open = Some((number, boot));
        if next == 0 {
            watcher.next = revision + 1;
        }
        watcher.watch = Some(Watch {
            client,
            call: now,
            request,
            responses: vec![WatchResponse {
                at: now,
                revision,
                body: WatchBody::Created,
            }],
            complete_through: None,
        });
        self.plan(100, Happening::Read(index, number_of_stream));
    }

    /// Streams that have something are read, some time.
    pub(crate) fn wake_sessions(&mut self, number: usize, boot: u64) {
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let mut woken = Vec::new();
        for (watcher, session) in &mut process.sessions {
            if !session.read_planned && session.woken.swap(false, Ordering::Relaxed) {
                session.read_planned = true;
                woken.push((*watcher, session.number));
            }
        }
        for (watcher, stream) in woken {
            let slow = self.watchers[watcher].slow && !self.healed;
            let delay = if slow && self.random.percent(30) {
                self.random.below(2 * SECOND)
            } else {
                self.random.below(10 * MILLISECOND)
            };
            self.plan(delay, Happening::Read(watcher, stream));
        }
    }

    /// A watcher reads what its stream has.
    pub(crate) fn read_stream(&mut self, index: usize, stream: u64) {
        let now = self.now;
        let watcher = &self.watchers[index];
        if watcher.stream != stream {
            return;
        }
        let Some((number, boot)) = watcher.open else {
            return;
        };
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let Some(session) = process.sessions.get_mut(&index) else {
            return;
        };
        session.read_planned = false;
        session.woken.store(false, Ordering::Relaxed);
        let deliveries = match session.stream.take() {
            Ok(deliveries) => deliveries,
            Err(error) => {
                let damaged = self.is_damaged(number);
                if !damaged && !self.machines[number].disk.is_stopped() {
                    self.fail(format!("a watch at m{number} failed: {error}"));
                }
                self.close_stream(index);
                return;
            }
        };
        let more = !deliveries.is_empty();
        session.read_planned = more;
        let progress = if more {
            None
        } else {
            session.stream.progress()
        };
        let mut ended = false;
        let mut said = Vec::new();
        let watcher = &mut self.watchers[index];
        for delivery in deliveries {
            let body = if let Some(compacted) = delivery.compacted {
                ended = true;
                watcher.next = compacted;
                WatchBody::Compacted(compacted)
            } else if delivery.events.is_empty() {
                continue;
            } else {
                let events: Vec<_> = delivery
                    .events
                    .iter()
                    .map(|event| translate::event(event, watcher.wanted.prev_kv))
                    .collect();
                if let Some(last) = events.last() {
                    watcher.next = watcher.next.max(last.revision() + 1);
                }
                WatchBody::Events(events)
            };
            said.push(WatchResponse {
                at: now,
                revision: delivery.revision,
                body,
            });
        }
        if let Some(revision) = progress
            && self.random.percent(30)
        {
            said.push(WatchResponse {
                at: now,
                revision,
                body: WatchBody::Progress,
            });
        }
        for response in said {
            self.note(format_args!("watcher {index} ← {response:?}"));
            if let Some(watch) = &mut self.watchers[index].watch {
                watch.responses.push(response);
            }
        }
        if ended {
            self.close_stream(index);
        } else if more {
            let delay = self.random.below(5 * MILLISECOND);
            self.plan(delay, Happening::Read(index, stream));
        }
    }

    /// A watcher's process is gone.
    pub(crate) fn stream_lost(&mut self, index: usize) {
        self.watchers[index].open = None;
        if let Some(watch) = self.watchers[index].watch.take() {
            self.history.watches.push(watch);
        }
        if self.healed {
            self.plan(200 * MILLISECOND, Happening::Watcher(index));
        }
    }

    fn close_stream(&mut self, index: usize) {
        if let Some((number, boot)) = self.watchers[index].open
            && let Some(process) = self.process(number, boot)
        {
            process.sessions.remove(&index);
        }
        self.stream_lost(index);
    }

    /// Whether every watcher has been told everything.
    pub(crate) fn watchers_are_idle(&self) -> bool {
        let processes = self
            .machines
            .iter()
            .filter_map(|machine| machine.process.as_ref());
        let newest = processes
            .map(|process| process.replica.keyspace().revision())
            .max();
        self.watchers.iter().enumerate().all(|(index, watcher)| {
            watcher.open.is_some_and(|(number, boot)| {
                let machine = &self.machines[number];
                machine.boot == boot
                    && machine.process.as_ref().is_some_and(|process| {
                        process.sessions.get(&index).is_some_and(|session| {
                            !session.read_planned && session.stream.progress() == newest
                        })
                    })
            })
        })
    }

    /// The last watches end; they were told everything up to a revision.
    pub(crate) fn end_watches(&mut self, revision: i64) {
        for watcher in &mut self.watchers {
            if let Some(mut watch) = watcher.watch.take() {
                watch.complete_through = Some(revision);
                self.history.watches.push(watch);
            }
        }
    }
}
