//! What is known of a migration, shared between the threads that do it and the one that shows it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{MigrationPhase, MigrationStatus};

/// The latest migration's progress.
#[derive(Debug, Default)]
pub(crate) struct ProgressCell(Mutex<Progress>);

#[derive(Debug, Default)]
struct Progress {
    status: MigrationStatus,
    began: Option<Instant>,
    stopped: Option<Instant>,
}

impl ProgressCell {
    /// A migration begins.
    pub(crate) fn begin(&self, memory_bytes: u64) {
        let mut progress = self.lock();
        *progress = Progress {
            status: MigrationStatus {
                phase: MigrationPhase::Copying,
                memory_bytes,
                remaining_bytes: memory_bytes,
                ..MigrationStatus::default()
            },
            began: Some(Instant::now()),
            stopped: None,
        };
    }

    /// The guest is being stopped.
    pub(crate) fn stop(&self) {
        let mut progress = self.lock();
        progress.stopped = Some(Instant::now());
        progress.status.phase = MigrationPhase::Switching;
    }

    /// It got on.
    pub(crate) fn enter(&self, phase: MigrationPhase) {
        self.lock().status.phase = phase;
    }

    /// It failed; the guest goes on.
    pub(crate) fn fail(&self, reason: String) {
        let mut progress = self.lock();
        progress.settle();
        progress.status.phase = MigrationPhase::Failed;
        progress.status.error = Some(reason);
        (progress.began, progress.stopped) = (None, None);
    }

    /// Changes the counters.
    pub(crate) fn count(&self, change: impl FnOnce(&mut MigrationStatus)) {
        change(&mut self.lock().status);
    }

    /// What is known now.
    pub(crate) fn status(&self) -> MigrationStatus {
        let mut progress = self.lock();
        progress.settle();
        progress.status.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    fn settle(&mut self) {
        let whole = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        if let Some(began) = self.began {
            self.status.elapsed_ms = whole(began.elapsed()) / 1000;
        }
        if let Some(stopped) = self.stopped {
            self.status.stopped_us = Some(whole(stopped.elapsed()));
        }
    }
}
