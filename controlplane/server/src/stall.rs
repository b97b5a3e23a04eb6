//! A disk that is slow, or stands still.
//!
//! While a sync hangs, the member's thread sends no heartbeats: the others elect a leader after an
//! election timeout, without its doing. This watches the thread from outside, so that requests that
//! come here are refused at once and go to a member that can answer them. A leader whose disk is slow
//! but alive hands over leadership.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use keelson_member::replica::Input;

use crate::node::Node;

const INTERVAL: Duration = Duration::from_millis(500);
/// As many syncs of the log in a row are slow before a leader hands over.
const SLOW_SYNCS: u32 = 5;
/// A leader that was chosen gets this long, for the others' disks may be as slow.
const PATIENCE: Duration = Duration::from_secs(30);

/// When a thread last showed that it goes on.
#[derive(Debug, Clone)]
pub struct Pulse {
    started: Instant,
    /// Milliseconds after that.
    last: Arc<AtomicU64>,
    limit: Duration,
}

impl Pulse {
    /// Of a thread that is stalled when it does not show itself for `limit`.
    pub fn new(limit: Duration) -> Self {
        Self {
            started: Instant::now(),
            last: Arc::default(),
            limit,
        }
    }

    /// The thread goes on.
    pub fn beat(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// Whether it hangs.
    pub fn is_stalled(&self) -> bool {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(last) > self.limit
    }
}

/// Syncs of the log that were slow, in a row.
#[derive(Debug, Clone)]
pub struct SlowSyncs {
    row: Arc<AtomicU32>,
    limit: Duration,
}

impl SlowSyncs {
    /// A sync that takes longer than `limit` is slow.
    pub fn new(limit: Duration) -> Self {
        Self {
            row: Arc::default(),
            limit,
        }
    }

    /// A sync took this long.
    pub fn note(&self, took: Duration) {
        if took < self.limit {
            self.row.store(0, Ordering::Relaxed);
        } else {
            self.row.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Hands over leadership while this member's syncs are slow.
pub async fn watch(node: Node, syncs: SlowSyncs) {
    let mut leads_since: Option<Instant> = None;
    loop {
        tokio::time::sleep(INTERVAL).await;
        if !node.status().is_leader {
            leads_since = None;
            continue;
        }
        let since = *leads_since.get_or_insert_with(Instant::now);
        if syncs.row.load(Ordering::Relaxed) < SLOW_SYNCS || since.elapsed() < PATIENCE {
            continue;
        }
        let Ok(progress) = node.progress(0).await else {
            continue;
        };
        if let Some(to) = progress.voters.first() {
            tracing::warn!(
                to = %format_args!("{to:x}"),
                slower_than = ?syncs.limit,
                "this member's disk is slow: hands over leadership"
            );
            node.tell(Input::Transfer(*to));
        }
    }
}
