//! What requests must not wait for: flushes, files for the log, removal of compacted versions,
//! verification of what is stored.

use super::Input;
use crate::MemberError;
use crate::disk::Disk;
use crate::keyspace::{Flush, Keyspace};
use crate::log::prepare_spare;

/// What is to be done, beside what maintenance finds itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Files that the log lacks.
    pub spares: usize,
    /// Whether to flush, however little that is.
    pub flush: bool,
}

/// Finds out what there is to do, and does it, in as many steps as its caller likes.
#[derive(Debug)]
pub struct Maintenance {
    /// In the upper half of the numbers of files, so that those of two runs differ.
    prefix: u32,
    prepared: u32,
    cleared: i64,
    /// The block that is verified next; `None` between two passes.
    verify_from: Option<u64>,
    /// Looks until the next pass begins.
    pause: u32,
}

/// One piece of work. Slow: it is for a thread that no request waits for.
#[derive(Debug)]
pub enum Job {
    /// Writes what was applied to the storage engine.
    Flush(Box<Flush>),
    /// Prepares a file for the log.
    PrepareSpare(u64),
    /// Removes versions that the compaction at a revision made invisible.
    ClearCompacted(i64),
    /// Verifies some blocks of the keyspace, from one on: damage is to be found before it is needed.
    Verify(u64),
}

impl Maintenance {
    /// `prefix` tells files of this run from those of earlier ones.
    pub fn new(prefix: u32) -> Self {
        Self {
            prefix,
            prepared: 0,
            cleared: 0,
            verify_from: Some(0),
            pause: 0,
        }
    }

    /// The jobs that there are now, to be done in this order.
    pub fn plan(&mut self, wanted: Wanted, keyspace: &Keyspace) -> Vec<Job> {
        let mut jobs = Vec::new();
        let (_, compacted) = keyspace.revisions();
        let clear = compacted > self.cleared;
        let flush =
            wanted.flush || keyspace.wants_flush() || (clear && keyspace.has_unflushed(compacted));
        if flush {
            jobs.extend(keyspace.begin_flush().map(Box::new).map(Job::Flush));
        }
        for _ in 0..wanted.spares {
            self.prepared += 1;
            let number = (u64::from(self.prefix) << 32) | u64::from(self.prepared);
            jobs.push(Job::PrepareSpare(number));
        }
        if clear {
            jobs.push(Job::ClearCompacted(compacted));
        }
        if jobs.is_empty() {
            self.pause = self.pause.saturating_sub(1);
            if self.pause == 0 {
                jobs.extend(self.verify_from.or(Some(0)).map(Job::Verify));
            }
        }
        jobs
    }

    /// Does a job. What the replica is to be told of it is the answer.
    pub fn run(
        &mut self,
        job: Job,
        keyspace: &Keyspace,
        disk: &dyn Disk,
    ) -> Result<Option<Input>, MemberError> {
        match job {
            Job::Flush(flush) => {
                let flushed = keyspace.flush(*flush)?;
                Ok(flushed.map(|metadata| Input::Flushed(Box::new(metadata))))
            }
            Job::PrepareSpare(number) => {
                let spare = prepare_spare(disk, number, keyspace.limits())?;
                Ok(spare.map(Input::Spare))
            }
            Job::Verify(from) => {
                self.verify_from = match keyspace.verify(from, keyspace.limits().verify_blocks)? {
                    0 => None,
                    next => Some(next),
                };
                if self.verify_from.is_none() {
                    self.pause = keyspace.limits().verify_pause;
                }
                Ok(None)
            }
            Job::ClearCompacted(revision) => {
                while keyspace.clear_compacted()? {}
                // A flush may have been under way that began before the compaction.
                if !keyspace.has_unflushed(revision) {
                    self.cleared = revision;
                }
                Ok(None)
            }
        }
    }
}
