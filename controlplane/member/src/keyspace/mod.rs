//! The state machine: etcd's multi-version keys, leases and history.
//!
//! Versions of keys are never changed. New ones are in an overlay in memory (the log has them
//! already); a flush writes the overlay to the storage engine, off the path of requests. Readers see
//! the layers as one, at any revision from the compacted one on.

mod apply;
mod auth;
mod authorize;
mod blocks;
mod digest;
mod engine;
mod lease;
mod metadata;
mod overlay;
mod range;
mod read;
mod records;
mod snapshot;
mod state;
mod txn;
mod version;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use keelson_etcd_api::etcdserverpb as pb;
use parking_lot::{Mutex, RwLock};
use prost::Message as _;

pub use self::apply::Event;
pub use self::auth::{Access, Auth, UserRecord};
pub use self::digest::DIGEST_VERSION;
pub use self::engine::ENGINE_FILE;
pub use self::lease::{LeaseChange, LeaseRecord, MAX_LEASE_TTL};
pub use self::metadata::{Alarm, Configuration, FORMAT, Member, Metadata};
pub use self::range::{KeyRange, RangeEnd};
pub use self::read::RangeReading;
pub(crate) use self::snapshot::remove_incoming;
pub use self::snapshot::{SnapshotReader, SnapshotWriter, StagedSnapshot};

use self::apply::{Applier, Changes};
use self::blocks::Blocks;
use self::digest::Digests;
use self::engine::Engine;
use self::overlay::Overlay;
use self::read::{Step, key_value};
use self::state::{Budget, State};
use crate::command::{Authority, Command, Response};
use crate::disk::Disk;
use crate::planted::{PlantedBug, is_planted};
use crate::{Failure, Limits, MemberError, RequestError};

/// Multiple of [`Limits::flush_bytes`] from which on the disk is too slow for what is wanted of it.
const UNFLUSHED: usize = 16;

/// The keyspace of one member. Reads may come from any thread; commands and flushes from one.
pub struct Keyspace {
    state: RwLock<State>,
    /// Held by the flush, compaction or installation that is under way.
    engine: Mutex<Engine>,
    blocks: RwLock<Arc<Blocks>>,
    /// Known without the lock, for every request asks.
    auth_enabled: AtomicBool,
    /// As well.
    refuses_growth: AtomicBool,
    /// As well.
    is_corrupt: AtomicBool,
    limits: Limits,
}

/// Committed entries being applied, seen by readers all at once.
pub struct Batch<'a> {
    /// Changes that are in the digest.
    digested: usize,
    keyspace: &'a Keyspace,
    state: parking_lot::RwLockWriteGuard<'a, State>,
    changes: Changes,
}

/// Changes that were taken for a flush.
#[derive(Debug)]
pub struct Flush {
    overlay: Arc<Overlay>,
    metadata: Metadata,
}

/// Events of some revisions, and how far they reach.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// In order, whole revisions.
    pub events: Vec<Event>,
    /// No event up to this revision is missing.
    pub revision: i64,
}

impl Keyspace {
    /// Opens what `disk` holds. If it holds nothing, starts with `first`, or fails if that is
    /// `None`.
    pub fn open(
        disk: &dyn Disk,
        cache_bytes: usize,
        first: Option<Metadata>,
        limits: Limits,
    ) -> Result<Self, MemberError> {
        if first.is_none() && disk.open(ENGINE_FILE, false).is_err() {
            return Err(MemberError::Corrupt(format!("{ENGINE_FILE} is missing")));
        }
        let engine = Engine::open(disk, cache_bytes)?;
        let (metadata, leases) = if let Some(loaded) = engine.load()? {
            let mut metadata = loaded.metadata;
            if is_planted(PlantedBug::ForgetAppliedIndex) && metadata.applied_index > 1 {
                metadata.applied_index -= 1;
            }
            (metadata, loaded.leases)
        } else {
            let first =
                first.ok_or_else(|| MemberError::Corrupt(format!("{ENGINE_FILE} is empty")))?;
            engine.replace_metadata(&first)?;
            (first, lease::Leases::new())
        };
        let flushed_compaction = metadata.compact_revision;
        let state = State {
            digests: Digests::starting_at(metadata.applied_index, metadata.digest),
            metadata,
            leases,
            active: Overlay::default(),
            flushing: None,
            base: engine.base()?,
            flushed_compaction,
        };
        Ok(Self {
            auth_enabled: AtomicBool::new(state.metadata.auth().enabled),
            refuses_growth: AtomicBool::new(state.metadata.refuses_growth()),
            is_corrupt: AtomicBool::new(state.metadata.is_corrupt()),
            state: RwLock::new(state),
            blocks: RwLock::new(Arc::clone(engine.blocks())),
            engine: Mutex::new(engine),
            limits,
        })
    }

    /// At which sizes something new begins.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The state beside keys and leases.
    pub fn metadata(&self) -> Metadata {
        self.state.read().metadata.clone()
    }

    /// Whether a member has no vote.
    pub fn is_learner(&self, id: u64) -> bool {
        let state = self.state.read();
        let members = &state.metadata.members;
        members
            .iter()
            .any(|member| member.id == id && member.is_learner)
    }

    /// The current revision.
    pub fn revision(&self) -> i64 {
        self.state.read().metadata.revision
    }

    /// Current and compacted revision.
    pub fn revisions(&self) -> (i64, i64) {
        let state = self.state.read();
        (state.metadata.revision, state.metadata.compact_revision)
    }

    /// Size of the engine's file in bytes.
    pub fn size(&self) -> Result<u64, MemberError> {
        let blocks = Arc::clone(&self.blocks.read());
        blocks
            .size()
            .map_err(MemberError::disk(format!("get the size of {ENGINE_FILE}")))
    }

    /// The digest after a log entry, if that was applied not long ago.
    pub fn digest(&self, index: u64) -> Option<u64> {
        self.state.read().digests.at(index)
    }

    /// Log indices and digests after them that are worth comparing with other members' now.
    pub fn digests(&self) -> Vec<(u64, u64)> {
        self.state.read().digests.to_compare().collect()
    }

    /// What was found damaged of what is stored, if anything was: nothing can be read any more, and
    /// the member has to be rebuilt.
    pub fn damage(&self) -> Option<MemberError> {
        let blocks = self.blocks.read();
        let damage = blocks.damage()?;
        Some(MemberError::Corrupt(damage.0.clone()))
    }

    /// Reads some of what is stored, from block `from` on, to find damage before it is needed. Returns
    /// where to go on; 0 after the end.
    pub fn verify(&self, from: u64, blocks: u64) -> Result<u64, MemberError> {
        let file = Arc::clone(&self.blocks.read());
        file.verify(from, blocks)
            .map_err(MemberError::disk(format!("verify {ENGINE_FILE}")))
    }

    /// Reads keys.
    pub fn range(
        &self,
        authority: &Authority,
        request: &pb::RangeRequest,
    ) -> Result<pb::RangeResponse, Failure> {
        let state = self.state.read();
        authorize::range(&state, authority, request)?;
        read::read(&state, request, state.metadata.revision)
    }

    /// Begins to read keys in steps, between which commands are applied: for ranges of any size.
    pub fn begin_range(
        &self,
        authority: &Authority,
        request: pb::RangeRequest,
    ) -> Result<RangeReading, RequestError> {
        authorize::range(&self.state.read(), authority, &request)?;
        Ok(RangeReading::new(request))
    }

    /// Takes the next step of a range. [`RequestError::Compacted`] if its revision was compacted
    /// meanwhile.
    pub fn read_on(&self, reading: &mut RangeReading) -> Result<(), Failure> {
        let state = self.state.read();
        reading.step(&state, state.metadata.revision, Step::SHORT)
    }

    /// A checksum of every key at a revision (the current one if it is not positive), that revision,
    /// and the compacted one. Equal on members that have applied the same entries.
    pub fn hash(&self, revision: i64) -> Result<(u32, i64, i64), Failure> {
        let state = self.state.read();
        let (current, compacted) = (state.metadata.revision, state.metadata.compact_revision);
        let at = if revision <= 0 { current } else { revision };
        if at > current {
            return Err(RequestError::FutureRevision.into());
        }
        if at < compacted {
            return Err(RequestError::Compacted.into());
        }
        let everything = KeyRange {
            start: bytes::Bytes::new(),
            end: RangeEnd::Open,
        };
        let mut hasher = crc32fast::Hasher::new();
        let mut record = Vec::new();
        state.walk(&everything, at, |found| {
            record.clear();
            // Writing to a Vec does not fail.
            let _ = found.pair()?.encode(&mut record);
            hasher.update(&record);
            Ok(std::ops::ControlFlow::Continue(()))
        })?;
        Ok((hasher.finalize(), at, compacted))
    }

    /// A transaction that only reads.
    pub fn read_txn(
        &self,
        authority: &Authority,
        request: pb::TxnRequest,
    ) -> Result<pb::TxnResponse, Failure> {
        // It changes nothing, but the code that applies it could: so it takes the write lock.
        let mut state = self.state.write();
        authorize::txn(&state, authority, &request)?;
        let mut changes = Changes::default();
        txn::apply(&mut Applier::new(&mut state, &mut changes), request)
    }

    /// Calls `visit` with users and roles.
    pub fn with_auth<T>(&self, visit: impl FnOnce(&Auth) -> T) -> T {
        visit(self.state.read().metadata.auth())
    }

    /// Whether what needs more room is refused for lack of it.
    pub fn refuses_growth(&self) -> bool {
        self.refuses_growth.load(Ordering::Acquire)
    }

    /// Whether members differ, and nobody knows which of them are right: what is read may be wrong.
    pub fn is_corrupt(&self) -> bool {
        self.is_corrupt.load(Ordering::Acquire)
    }

    /// Whether an alarm is raised.
    pub fn has_alarm(&self, alarm: Alarm) -> bool {
        self.state.read().metadata.alarms.contains(&alarm)
    }

    /// A voter that is not `but` and has not raised NOSPACE.
    pub fn voter_with_room(&self, but: u64) -> Option<u64> {
        let state = self.state.read();
        let metadata = &state.metadata;
        let is_full = |id| {
            let nospace = pb::AlarmType::Nospace as i32;
            let mut alarms = metadata.alarms.iter();
            alarms.any(|alarm| alarm.member_id == id && alarm.kind == nospace)
        };
        let mut voters = metadata.members.iter().filter(|member| !member.is_learner);
        let found = voters.find(|member| member.id != but && !is_full(member.id));
        found.map(|member| member.id)
    }

    fn note(&self, metadata: &Metadata) {
        let enabled = metadata.auth().enabled;
        self.auth_enabled.store(enabled, Ordering::Release);
        let refuses = !metadata.alarms.is_empty() && metadata.refuses_growth();
        self.refuses_growth.store(refuses, Ordering::Release);
        self.is_corrupt
            .store(metadata.is_corrupt(), Ordering::Release);
    }

    /// Whether requests need a user.
    pub fn is_auth_enabled(&self) -> bool {
        self.auth_enabled.load(Ordering::Acquire)
    }

    /// What is known of a lease, and its keys in order.
    pub fn lease(&self, id: i64) -> Option<(LeaseRecord, Vec<bytes::Bytes>)> {
        let state = self.state.read();
        let lease = state.leases.get(&id)?;
        Some((lease.record, lease.keys.iter().cloned().collect()))
    }

    /// Refuses who may not read every key of a lease.
    pub fn check_lease_keys(&self, authority: &Authority, id: i64) -> Result<(), RequestError> {
        authorize::lease(&self.state.read(), authority, id, Access::Read)
    }

    /// Every lease.
    pub fn leases(&self) -> Vec<(i64, LeaseRecord)> {
        let state = self.state.read();
        state
            .leases
            .iter()
            .map(|(id, lease)| (*id, lease.record))
            .collect()
    }

    /// Events of keys that `wanted` wants, from `revision` on, out of some of the changes since: what
    /// is held in memory at once is limited.
    pub fn history(
        &self,
        revision: i64,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<History, Failure> {
        let state = self.state.read();
        if revision < state.metadata.compact_revision {
            return Err(RequestError::Compacted.into());
        }
        let at_once = Budget {
            changes: self.limits.history_changes,
            bytes: self.limits.history_bytes,
        };
        let (changes, whole) = state.changes(revision, at_once)?;
        let reached = match changes.last() {
            Some(last) if !whole => last.revision,
            _ => state.metadata.revision,
        };
        let mut history = History {
            events: Vec::new(),
            revision: reached,
        };
        for change in changes {
            if !wanted(&change.key) || change.revision > state.metadata.revision {
                continue;
            }
            let previous = if change.revision > state.metadata.compact_revision {
                state.newest(&change.key, change.revision - 1)?
            } else {
                None
            };
            let previous = previous
                .filter(|(_, version)| !version.is_deletion())
                .map(|(at, version)| key_value(change.key.clone(), at, version));
            history.events.push(Event {
                deletion: change.version.is_deletion(),
                kv: key_value(change.key, change.revision, change.version),
                previous,
            });
        }
        Ok(history)
    }

    /// Starts applying entries.
    pub fn batch(&self) -> Batch<'_> {
        let state = self.state.write();
        Batch {
            keyspace: self,
            digested: state.active.changes.len(),
            state,
            changes: Changes::default(),
        }
    }

    /// Whether enough has changed since the last flush.
    pub fn wants_flush(&self) -> bool {
        self.unflushed().0
    }

    /// Whether a flush is worth it, and whether so much has changed since the last one that nothing
    /// more should until it is done.
    pub fn unflushed(&self) -> (bool, bool) {
        let state = self.state.read();
        let bytes = state.active.bytes;
        let worth_it = state.flushing.is_none() && bytes >= self.limits.flush_bytes;
        (worth_it, bytes >= UNFLUSHED * self.limits.flush_bytes)
    }

    /// Takes what changed for a flush; `None` if one is under way.
    pub fn begin_flush(&self) -> Option<Flush> {
        let mut state = self.state.write();
        if state.flushing.is_some() {
            return None;
        }
        let overlay = Arc::new(std::mem::take(&mut state.active));
        state.flushing = Some(Arc::clone(&overlay));
        Some(Flush {
            overlay,
            metadata: state.metadata.clone(),
        })
    }

    /// Writes what [`Keyspace::begin_flush`] took. Returns the metadata that is durable now: the log
    /// up to its index is not needed by this member any more. `None` if a snapshot was installed
    /// meanwhile. Slow; readers and commands go on.
    pub fn flush(&self, flush: Flush) -> Result<Option<Metadata>, MemberError> {
        let engine = self.engine.lock();
        let current = self.state.read().flushing.clone();
        if !current.is_some_and(|current| Arc::ptr_eq(&current, &flush.overlay)) {
            return Ok(None);
        }
        engine.flush(&flush.overlay, &flush.metadata)?;
        let base = engine.base()?;
        let mut state = self.state.write();
        state.base = base;
        state.flushing = None;
        state.flushed_compaction = flush.metadata.compact_revision;
        Ok(Some(flush.metadata))
    }

    /// Writes everything that is in memory, with other metadata: a new cluster begins here. Nobody
    /// else uses it.
    pub(crate) fn begin_anew(&self, metadata: &Metadata) -> Result<(), MemberError> {
        if let Some(flush) = self.begin_flush() {
            self.flush(Flush {
                metadata: metadata.clone(),
                ..flush
            })?;
        }
        Ok(())
    }

    /// Reads what was last flushed.
    pub fn snapshot(&self) -> Result<SnapshotReader, MemberError> {
        SnapshotReader::new(&self.engine.lock(), self.limits.chunk_bytes)
    }

    /// Replaces everything by a snapshot, durably.
    pub fn install(&self, disk: &dyn Disk, staged: StagedSnapshot) -> Result<(), MemberError> {
        let mut engine = self.engine.lock();
        engine::adopt(disk, &staged.name)?;
        let base = staged.engine.base()?;
        let mut state = self.state.write();
        let metadata = staged.loaded.metadata;
        *state = State {
            digests: Digests::starting_at(metadata.applied_index, metadata.digest),
            flushed_compaction: metadata.compact_revision,
            metadata,
            leases: staged.loaded.leases,
            active: Overlay::default(),
            flushing: None,
            base,
        };
        self.note(&state.metadata);
        *self.blocks.write() = Arc::clone(staged.engine.blocks());
        *engine = staged.engine;
        Ok(())
    }

    /// Whether the compaction at `revision`, or a change up to it, is in memory only.
    pub fn has_unflushed(&self, revision: i64) -> bool {
        let state = self.state.read();
        state.flushed_compaction < revision
            || state
                .first_unflushed()
                .is_some_and(|first| first <= revision)
    }

    /// Removes versions that compaction made invisible, some at a time. Returns whether there may
    /// be more. What is not flushed yet waits, and so does a compaction: after a crash, history that
    /// is not compacted has to be whole.
    pub fn clear_compacted(&self) -> Result<bool, MemberError> {
        let engine = self.engine.lock();
        let revision = {
            let state = self.state.read();
            let flushed = state.first_unflushed().map_or(i64::MAX, |first| first - 1);
            state.flushed_compaction.min(flushed)
        };
        if revision <= 0 {
            return Ok(false);
        }
        let more = engine.compact(&engine.base()?, revision, self.limits.compaction_batch)?;
        let base = engine.base()?;
        self.state.write().base = base;
        Ok(more)
    }
}

impl Batch<'_> {
    /// Applies a committed command.
    pub fn apply(
        &mut self,
        command: Command,
    ) -> Result<Result<Response, RequestError>, MemberError> {
        match Applier::new(&mut self.state, &mut self.changes).apply(command) {
            Ok(response) => Ok(Ok(response)),
            Err(Failure::Request(error)) => Ok(Err(error)),
            Err(Failure::Member(error)) => Err(error),
        }
    }

    /// Notes that everything up to a log entry is applied.
    pub fn applied(&mut self, index: u64, term: u64) {
        let state = &mut *self.state;
        let summary = digest::Summary {
            index,
            term,
            revision: state.metadata.revision,
            compact_revision: state.metadata.compact_revision,
            leases: state.leases.len() as u64,
            members: state.metadata.members.len() as u64,
        };
        let changes = &state.active.changes[self.digested..];
        let digest = digest::after(state.metadata.digest, &summary, changes);
        self.digested = state.active.changes.len();
        state.metadata.applied_index = index;
        state.metadata.applied_term = term;
        state.metadata.digest = digest;
        state.digests.push(index, digest);
    }

    /// The metadata, for changes of the membership.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.state.metadata
    }

    /// Takes what happened to leases, in order.
    pub fn take_lease_changes(&mut self) -> Vec<LeaseChange> {
        std::mem::take(&mut self.changes.leases)
    }

    /// Shows the changes to readers. Returns their events, in order, and the revision reached.
    pub fn finish(self) -> History {
        self.keyspace.note(&self.state.metadata);
        History {
            revision: self.state.metadata.revision,
            events: self.changes.events,
        }
    }
}

impl fmt::Debug for Keyspace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Keyspace").finish_non_exhaustive()
    }
}
