use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Instant;

use keelson_checker::{History, LeaseTimes, Operation, Outcome, Request, Response, Watch};
use parking_lot::Mutex;

/// What the clients of a run did and saw, with the clock that they share.
pub struct Record {
    begin: Instant,
    clients: AtomicU64,
    values: AtomicU64,
    last_revision: AtomicI64,
    stopped: AtomicBool,
    history: Mutex<History>,
}

impl Record {
    /// Nothing yet.
    pub fn new() -> Self {
        Self {
            begin: Instant::now(),
            clients: AtomicU64::new(0),
            values: AtomicU64::new(0),
            last_revision: AtomicI64::new(1),
            stopped: AtomicBool::new(false),
            history: Mutex::default(),
        }
    }

    /// Nanoseconds since the run began.
    pub fn now(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A number for a client, which no other has.
    pub fn new_client(&self) -> u64 {
        self.clients.fetch_add(1, Ordering::Relaxed)
    }

    /// A value that nobody else writes.
    pub fn new_value(&self) -> String {
        self.values.fetch_add(1, Ordering::Relaxed).to_string()
    }

    /// The highest revision that any client was told of.
    pub fn last_revision(&self) -> i64 {
        self.last_revision.load(Ordering::Relaxed)
    }

    /// Lets the clients end.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether clients are to end.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Notes what came of a request that was sent at `call`.
    pub fn operation(&self, client: u64, call: u64, request: Request, outcome: Outcome) {
        if let Outcome::Ok(response) = &outcome {
            let revision = response.revision().unwrap_or(0);
            self.last_revision.fetch_max(revision, Ordering::Relaxed);
        }
        let end = self.now();
        self.history.lock().operations.push(Operation {
            client,
            call,
            end,
            request,
            outcome,
        });
    }

    /// Notes a watch that is over.
    pub fn watch(&self, watch: Watch) {
        self.history.lock().watches.push(watch);
    }

    /// Notes a lease that is over.
    pub fn lease(&self, lease: LeaseTimes) {
        self.history.lock().leases.push(lease);
    }

    /// All of it.
    pub fn history(&self) -> History {
        self.history.lock().clone()
    }

    /// How many operations ended how: done, refused, failed, unknown.
    pub fn counts(&self) -> [usize; 4] {
        let mut counts = [0; 4];
        for operation in &self.history.lock().operations {
            let at = match operation.outcome {
                Outcome::Ok(_) => 0,
                Outcome::Refused(_) => 1,
                Outcome::Failed => 2,
                Outcome::Unknown => 3,
            };
            counts[at] += 1;
        }
        counts
    }

    /// The longest time in which no write was acknowledged, in nanoseconds.
    pub fn longest_gap(&self) -> u64 {
        let history = self.history.lock();
        let writes = history.operations.iter().filter(|operation| {
            matches!(
                operation.outcome,
                Outcome::Ok(Response::Put { .. } | Response::Txn { .. })
            )
        });
        let mut ends: Vec<u64> = writes.map(|operation| operation.end).collect();
        ends.sort_unstable();
        let pairs = ends.iter().zip(ends.iter().skip(1));
        pairs
            .map(|(before, after)| after - before)
            .max()
            .unwrap_or(0)
    }
}
