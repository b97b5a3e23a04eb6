//! The one thread that writes: takes what has queued up, applies it in order, makes all of it
//! durable at once, and answers.

mod batch;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use self::batch::{Effects, LeaseEffect};
use super::apply::lease_keys;
use super::command::{Answer, Command, Request};
use super::compaction::{Clearing, Compactor};
use super::database::Database;
use super::errors::Engine;
use super::feed::Feed;
use super::leases::{CHECKPOINT_INTERVAL, Leases};
use super::tables::{LEASE_KEYS, LEASES, META, Number};
use crate::{Lease, LeaseId, LeaseStatus, Revision, StateError};

/// Most requests made durable at once.
const BATCH: usize = 512;
/// Most leases ended at once; the rest follow in the next batch.
const ENDED: usize = 1000;
/// The thread wakes at least this often.
const IDLE: Duration = Duration::from_hours(1);
/// Pause between attempts to open a store again that failed.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Writer {
    database: Arc<Database>,
    feed: Arc<Feed>,
    requests: Receiver<Command>,
    revision: Revision,
    compact_revision: Revision,
    leases: Leases,
    clearing: Option<Clearing>,
    compactor: Compactor,
    next_checkpoint: Instant,
    /// Set when a write failed: the store must be opened again before the next, not before then.
    failed: Option<(StateError, Instant)>,
}

impl Writer {
    pub(super) fn new(
        database: Arc<Database>,
        requests: Receiver<Command>,
        compactor: Compactor,
    ) -> Result<Self, StateError> {
        let mut writer = Self {
            database,
            feed: Arc::new(Feed::new(0)),
            requests,
            revision: 0,
            compact_revision: 0,
            leases: Leases::default(),
            clearing: None,
            compactor,
            next_checkpoint: Instant::now() + CHECKPOINT_INTERVAL,
            failed: None,
        };
        writer.load()?;
        Ok(writer)
    }

    pub(super) fn feed(&self) -> Arc<Feed> {
        Arc::clone(&self.feed)
    }

    /// Runs until the store is closed or every handle is gone.
    pub(super) fn run(mut self) {
        loop {
            let (commands, closing) = self.receive();
            self.serve(commands);
            self.maintain();
            if let Some(reply) = closing {
                let closed = self.close();
                if let Some(reply) = reply {
                    let _ = reply.send(closed);
                }
                return;
            }
        }
    }

    /// Reads what is stored into memory.
    fn load(&mut self) -> Result<(), StateError> {
        let now = Instant::now();
        let (revision, compact_revision, cleared, leases) = self.database.read(|txn| {
            let meta = txn.open_table(META).engine("open a table")?;
            let leases = txn.open_table(LEASES).engine("open a table")?;
            Ok((
                Number::Revision.require(&meta)?,
                Number::CompactRevision.require(&meta)?,
                Number::Cleared.require(&meta)?,
                Leases::load(&leases, now)?,
            ))
        })?;
        self.revision = revision;
        self.compact_revision = compact_revision;
        self.leases = leases;
        self.clearing = (cleared < compact_revision).then(|| Clearing::up_to(compact_revision));
        self.feed.reset(revision);
        Ok(())
    }

    /// Waits for requests, or until there is something else to do. Also says whether to close, and
    /// whom to tell.
    #[allow(clippy::type_complexity)]
    fn receive(
        &self,
    ) -> (
        Vec<Command>,
        Option<Option<tokio::sync::oneshot::Sender<Result<(), StateError>>>>,
    ) {
        let mut commands = Vec::new();
        let mut next = match self.requests.recv_timeout(self.pause()) {
            Ok(command) => Some(command),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return (commands, Some(None)),
        };
        while let Some(command) = next {
            if let Command::Close(reply) = command {
                return (commands, Some(Some(reply)));
            }
            commands.push(command);
            if commands.len() == BATCH {
                break;
            }
            next = self.requests.try_recv().ok();
        }
        (commands, None)
    }

    fn pause(&self) -> Duration {
        if self.clearing.is_some() && self.failed.is_none() {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let mut wake = now + IDLE;
        for at in [self.leases.next_deadline(), self.compactor.next_sample()] {
            wake = wake.min(at.unwrap_or(wake));
        }
        if self.leases.any_longer_than(CHECKPOINT_INTERVAL) {
            wake = wake.min(self.next_checkpoint);
        }
        if let Some((_, retry)) = &self.failed {
            wake = wake.max(*retry);
        }
        wake.saturating_duration_since(now)
    }

    fn serve(&mut self, commands: Vec<Command>) {
        let now = Instant::now();
        if let Err(error) = self.recover(now) {
            for command in commands {
                command.answer(Err(error.clone()));
            }
            return;
        }
        let mut pending = Vec::new();
        for command in commands {
            match self.answer_from_memory(&command, now) {
                Some(answer) => command.answer(answer),
                None => pending.push(command),
            }
        }
        let ended = self.leases.ended(now, ENDED);
        self.write(pending, &ended, now);
    }

    /// Makes `pending` and the end of leases durable, and answers.
    fn write(&mut self, mut pending: Vec<Command>, ended: &[LeaseId], now: Instant) {
        while !pending.is_empty() || !ended.is_empty() {
            let mut offence = None;
            let result = self.database.write(|tables| {
                self.apply(tables, &pending, ended).map_err(|found| {
                    let error = found.error.clone();
                    offence = Some(found);
                    error
                })
            });
            match (result, offence) {
                (Ok((effects, answers)), _) => {
                    self.take_effect(effects, now);
                    for (command, answer) in pending.into_iter().zip(answers) {
                        command.answer(answer);
                    }
                    return;
                }
                (Err(error), Some(offence))
                    if !is_engine_failure(&error) && offence.request < pending.len() =>
                {
                    pending.remove(offence.request).answer(Err(offence.error));
                }
                (Err(error), _) => {
                    tracing::error!(%error, "a write to the state store failed");
                    self.failed = Some((error.clone(), now));
                    for command in pending {
                        command.answer(Err(error.clone()));
                    }
                    return;
                }
            }
        }
    }

    fn take_effect(&mut self, effects: Effects, now: Instant) {
        self.revision = effects.revision;
        if effects.compact_revision > self.compact_revision {
            self.compact_revision = effects.compact_revision;
            self.clearing = Some(Clearing::up_to(effects.compact_revision));
        }
        for effect in effects.leases {
            match effect {
                LeaseEffect::Set { id, granted } => self.leases.set(id, granted, granted, now),
                LeaseEffect::Remove(id) => self.leases.remove(id),
            }
        }
        self.feed.publish(effects.committed);
    }

    /// Answers what needs no write.
    fn answer_from_memory(
        &mut self,
        command: &Command,
        now: Instant,
    ) -> Option<Result<Answer, StateError>> {
        let Command::Do { request, .. } = command else {
            return None;
        };
        match request {
            Request::KeepAlive(id) => match self.leases.get(*id) {
                Ok(entry) if entry.deadline <= now => {
                    Some(Err(StateError::LeaseNotFound { lease: *id }))
                }
                Ok(entry) if entry.checkpointed => None,
                Ok(entry) => {
                    self.leases.set(*id, entry.granted, entry.granted, now);
                    Some(Ok(Answer::Lease(lease(*id, entry.granted, self.revision))))
                }
                Err(error) => Some(Err(error)),
            },
            Request::LeaseStatus { id, keys } => Some(self.lease_status(*id, *keys, now)),
            _ => None,
        }
    }

    fn lease_status(&self, id: LeaseId, keys: bool, now: Instant) -> Result<Answer, StateError> {
        let entry = self.leases.get(id)?;
        let keys = if keys {
            self.database
                .read(|txn| lease_keys(&txn.open_table(LEASE_KEYS).engine("open a table")?, id))?
        } else {
            Vec::new()
        };
        Ok(Answer::LeaseStatus(LeaseStatus {
            id,
            granted_ttl: seconds(entry.granted),
            remaining_ttl: seconds(entry.remaining(now)),
            keys,
            revision: self.revision,
        }))
    }

    /// What is done without being asked: clearing history, compacting, storing leases' times.
    fn maintain(&mut self) {
        let now = Instant::now();
        if self.failed.is_some() {
            return;
        }
        if let Err(error) = self.try_maintain(now) {
            tracing::error!(%error, "upkeep of the state store failed");
            self.failed = Some((error, now));
        }
    }

    fn try_maintain(&mut self, now: Instant) -> Result<(), StateError> {
        if let Some(mut clearing) = self.clearing.take() {
            let done = self.database.write(|tables| clearing.step(tables))?;
            self.clearing = (!done).then_some(clearing);
        } else if let Some(target) =
            self.compactor
                .target(now, self.revision, self.compact_revision)
        {
            self.database
                .write(|tables| Number::CompactRevision.write(&mut tables.meta, target))?;
            self.compact_revision = target;
            self.clearing = Some(Clearing::up_to(target));
        }
        if now >= self.next_checkpoint {
            self.next_checkpoint = now + CHECKPOINT_INTERVAL;
            if self.leases.any_longer_than(CHECKPOINT_INTERVAL) {
                self.checkpoint(CHECKPOINT_INTERVAL, now)?;
            }
        }
        Ok(())
    }

    fn checkpoint(&mut self, longer_than: Duration, now: Instant) -> Result<(), StateError> {
        let leases = &mut self.leases;
        self.database
            .write(|tables| leases.checkpoint(&mut tables.leases, longer_than, now))
    }

    /// Opens the store again after a failed write.
    fn recover(&mut self, now: Instant) -> Result<(), StateError> {
        let Some((error, retry)) = &self.failed else {
            return Ok(());
        };
        if now < *retry {
            return Err(error.clone());
        }
        match self.database.reopen().and_then(|()| self.load()) {
            Ok(()) => {
                tracing::warn!(revision = self.revision, "the state store was opened again");
                self.failed = None;
                Ok(())
            }
            Err(error) => {
                self.failed = Some((error.clone(), now + REOPEN_PAUSE));
                Err(error)
            }
        }
    }

    fn close(&mut self) -> Result<(), StateError> {
        self.feed.close();
        let stored = if self.failed.is_none() && self.leases.len() > 0 {
            self.checkpoint(Duration::ZERO, Instant::now())
        } else {
            Ok(())
        };
        stored.and(self.database.close())
    }
}

fn is_engine_failure(error: &StateError) -> bool {
    matches!(
        error,
        StateError::Corrupt(_) | StateError::Storage(_) | StateError::Closed
    )
}

fn lease(id: LeaseId, granted: i64, revision: Revision) -> Lease {
    Lease {
        id,
        ttl: seconds(granted),
        revision,
    }
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
