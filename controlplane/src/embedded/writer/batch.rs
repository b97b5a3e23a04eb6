//! What one batch does to the tables, and what that changes in memory once it is durable.

use std::time::Instant;

use super::super::apply::Write;
use super::super::command::{Answer, Command, Request};
use super::super::feed::Committed;
use super::super::leases;
use super::super::tables::{Number, WriteTables};
use super::{Writer, is_engine_failure, lease};
use crate::limits::MAX_LEASES;
use crate::{Event, LeaseId, Revision, StateError};

/// What a batch changes in memory once it is durable.
#[derive(Default)]
pub(super) struct Effects {
    pub(super) revision: Revision,
    pub(super) compact_revision: Revision,
    pub(super) committed: Vec<Committed>,
    pub(super) leases: Vec<LeaseEffect>,
}

pub(super) enum LeaseEffect {
    Set { id: LeaseId, granted: i64 },
    Remove(LeaseId),
}

/// A request whose mistake was found after it had changed something.
pub(super) struct Offence {
    pub(super) request: usize,
    pub(super) error: StateError,
}

impl Writer {
    pub(super) fn apply(
        &self,
        tables: &mut WriteTables<'_>,
        commands: &[Command],
        ended: &[LeaseId],
    ) -> Result<(Effects, Vec<Result<Answer, StateError>>), Offence> {
        let mut effects = Effects {
            revision: self.revision,
            compact_revision: self.compact_revision,
            ..Default::default()
        };
        let mut answers = Vec::with_capacity(commands.len());
        // Ends of leases come last, and theirs is no request's offence.
        for (request, command) in commands.iter().enumerate() {
            let events = effects.committed.len();
            match self.apply_one(tables, command, &mut effects) {
                Ok(answer) => answers.push(Ok(answer)),
                Err(error)
                    if is_engine_failure(&error)
                        || matches!(error, StateError::TooLarge { .. }) =>
                {
                    return Err(Offence { request, error });
                }
                Err(error) => {
                    debug_assert_eq!(events, effects.committed.len());
                    answers.push(Err(error));
                }
            }
        }
        let none = commands.len();
        let failed = |error| Offence {
            request: none,
            error,
        };
        for id in ended {
            match Write::new(tables, effects.revision, effects.compact_revision).revoke(*id) {
                Ok(applied) => {
                    effects.add(applied.revision, applied.events);
                    effects.leases.push(LeaseEffect::Remove(*id));
                }
                // Revoked by a request of this batch.
                Err(StateError::LeaseNotFound { .. }) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Number::Revision
            .write(&mut tables.meta, effects.revision)
            .map_err(failed)?;
        Number::CompactRevision
            .write(&mut tables.meta, effects.compact_revision)
            .map_err(failed)?;
        Ok((effects, answers))
    }

    fn apply_one(
        &self,
        tables: &mut WriteTables<'_>,
        command: &Command,
        effects: &mut Effects,
    ) -> Result<Answer, StateError> {
        let Command::Do { request, .. } = command else {
            return Err(StateError::Closed);
        };
        match request {
            Request::Txn(txn) => {
                let write = Write::new(tables, effects.revision, effects.compact_revision);
                let applied = write.txn(txn)?;
                effects.add(applied.revision, applied.events);
                Ok(Answer::Txn(applied.response))
            }
            Request::Grant { id, seconds } => self.grant(tables, *id, *seconds, effects),
            Request::KeepAlive(id) => {
                let granted = leases::require(&tables.leases, *id)?;
                leases::store(&mut tables.leases, *id, granted, granted)?;
                effects.leases.push(LeaseEffect::Set { id: *id, granted });
                Ok(Answer::Lease(lease(*id, granted, effects.revision)))
            }
            Request::Revoke(id) => {
                let write = Write::new(tables, effects.revision, effects.compact_revision);
                let applied = write.revoke(*id)?;
                effects.add(applied.revision, applied.events);
                effects.leases.push(LeaseEffect::Remove(*id));
                Ok(Answer::Revision(effects.revision))
            }
            Request::Compact(revision) => {
                if *revision <= effects.compact_revision {
                    return Err(StateError::Compacted {
                        requested: *revision,
                        compact_revision: effects.compact_revision,
                    });
                }
                if *revision > effects.revision {
                    return Err(StateError::FutureRevision {
                        requested: *revision,
                        current: effects.revision,
                    });
                }
                effects.compact_revision = *revision;
                Ok(Answer::Revision(effects.revision))
            }
            Request::LeaseStatus { .. } => Err(StateError::Closed),
        }
    }

    fn grant(
        &self,
        tables: &mut WriteTables<'_>,
        id: Option<LeaseId>,
        seconds: i64,
        effects: &mut Effects,
    ) -> Result<Answer, StateError> {
        if self.leases.len() + effects.leases.len() >= MAX_LEASES {
            return Err(StateError::Exhausted {
                what: "leases",
                limit: MAX_LEASES,
            });
        }
        let taken = |tables: &WriteTables<'_>, id| match leases::require(&tables.leases, id) {
            Ok(_) => Ok(true),
            Err(StateError::LeaseNotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        };
        let id = match id {
            Some(id) if taken(tables, id)? => return Err(StateError::LeaseExists { lease: id }),
            Some(id) => id,
            None => loop {
                let id = random_id();
                if !taken(tables, id)? {
                    break id;
                }
            },
        };
        leases::store(&mut tables.leases, id, seconds, seconds)?;
        effects.leases.push(LeaseEffect::Set {
            id,
            granted: seconds,
        });
        Ok(Answer::Lease(lease(id, seconds, effects.revision)))
    }
}

impl Effects {
    fn add(&mut self, revision: Revision, events: Vec<Event>) {
        if !events.is_empty() {
            self.revision = revision;
            self.committed.push(Committed { revision, events });
        }
    }
}

/// A positive id that a client won't choose by accident.
fn random_id() -> LeaseId {
    use std::hash::{BuildHasher, RandomState};
    // Every RandomState is keyed differently, from the system's random numbers at first.
    let bits = RandomState::new().hash_one(Instant::now());
    i64::try_from(bits >> 2).unwrap_or(1).max(1)
}
