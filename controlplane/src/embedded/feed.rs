//! Tells watches what was committed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::{Event, Revision};

/// Most revisions kept in memory; watches further behind read history from the database.
const RECENT_REVISIONS: usize = 4096;
/// Most bytes kept.
const RECENT_BYTES: usize = 16 * 1024 * 1024;
/// Most revisions handed out at once.
const CHUNK: usize = 256;

/// One revision, with the pair before in every event.
#[derive(Debug)]
pub(super) struct Committed {
    pub(super) revision: Revision,
    pub(super) events: Vec<Event>,
}

/// How far the store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) revision: Revision,
    pub(super) closed: bool,
}

/// The newest revisions, kept in memory, and the news that there are more.
#[derive(Debug)]
pub(super) struct Feed {
    recent: Mutex<Recent>,
    progress: watch::Sender<Progress>,
}

#[derive(Debug)]
struct Recent {
    /// Every revision from `first` on is here.
    first: Revision,
    committed: VecDeque<Arc<Committed>>,
    bytes: usize,
}

impl Feed {
    pub(super) fn new(revision: Revision) -> Self {
        let recent = Recent {
            first: revision + 1,
            committed: VecDeque::new(),
            bytes: 0,
        };
        let progress = watch::Sender::new(Progress {
            revision,
            closed: false,
        });
        Self {
            recent: Mutex::new(recent),
            progress,
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    pub(super) fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// Adds revisions; they follow on the newest one.
    pub(super) fn publish(&self, committed: Vec<Committed>) {
        let Some(revision) = committed.last().map(|last| last.revision) else {
            return;
        };
        let mut recent = self.recent();
        for committed in committed {
            recent.bytes += size(&committed);
            recent.committed.push_back(Arc::new(committed));
        }
        while recent.committed.len() > RECENT_REVISIONS || recent.bytes > RECENT_BYTES {
            let Some(oldest) = recent.committed.pop_front() else {
                break;
            };
            recent.bytes -= size(&oldest);
            recent.first = oldest.revision + 1;
        }
        drop(recent);
        self.progress
            .send_modify(|progress| progress.revision = revision);
    }

    /// Forgets everything: the store was opened again, at `revision`.
    pub(super) fn reset(&self, revision: Revision) {
        let mut recent = self.recent();
        *recent = Recent {
            first: revision + 1,
            committed: VecDeque::new(),
            bytes: 0,
        };
        drop(recent);
        self.progress
            .send_modify(|progress| progress.revision = revision);
    }

    pub(super) fn close(&self) {
        self.progress.send_modify(|progress| progress.closed = true);
    }

    /// Revisions from `from` on, or `None` if that one is no longer in memory.
    pub(super) fn read(&self, from: Revision) -> Option<Vec<Arc<Committed>>> {
        let recent = self.recent();
        let skip = usize::try_from(from.checked_sub(recent.first)?).ok()?;
        Some(
            recent
                .committed
                .iter()
                .skip(skip)
                .take(CHUNK)
                .cloned()
                .collect(),
        )
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn size(committed: &Committed) -> usize {
    let pairs = committed
        .events
        .iter()
        .flat_map(|event| Some(&event.kv).into_iter().chain(&event.prev_kv));
    pairs
        .map(|kv| kv.key.len() + kv.value.len() + size_of::<Event>())
        .sum()
}
