//! What follows from what a member was told.

use std::sync::Arc;

use prost::Message as _;
use raft::eraftpb::{Entry, EntryType, HardState, Message, SnapshotMetadata};

use super::Member;
use crate::command::{Command, Response};
use crate::keyspace::{History, LeaseChange, Member as MemberInfo};
use crate::log::Position;
use crate::{MemberError, RequestError};

/// What came out of [`Member::advance`].
#[derive(Debug, Default)]
pub struct Output {
    /// Outcomes of commands of any member, by id.
    pub outcomes: Vec<(u64, Result<Response, RequestError>)>,
    /// Outcomes of changes of membership, by id.
    pub membership: Vec<(u64, Result<Vec<MemberInfo>, RequestError>)>,
    /// What was applied, for watches. Revision 0 if nothing was.
    pub history: History,
    /// What happened to leases, in order.
    pub leases: Vec<LeaseChange>,
    /// Reads, by the id given to [`Member::read_index`], that may read now.
    pub reads: Vec<u64>,
    /// A snapshot was installed: events up to this revision are in no history here.
    pub installed: Option<i64>,
    /// The cluster has removed this member.
    pub removed: bool,
}

impl Member {
    /// Does everything that follows from what the member was told: appends to the log (one sync),
    /// sends, applies. Messages that need not wait for the sync are sent before it.
    pub fn advance(&mut self, send: &mut dyn FnMut(Message)) -> Result<Output, MemberError> {
        let mut output = Output::default();
        self.check_damage()?;
        while self.node.has_ready() {
            let mut ready = self.node.ready();
            self.check_damage()?;
            self.persist_changes(ready.committed_entries())?;
            ready.take_messages().into_iter().for_each(&mut *send);
            if !ready.snapshot().is_empty() {
                self.install(ready.snapshot().get_metadata(), ready.hs(), &mut output)?;
            }
            self.apply(ready.take_committed_entries(), &mut output)?;
            self.persist(ready.entries(), ready.hs())?;
            for read in ready.take_read_states() {
                if let Ok(id) = read.request_ctx.as_slice().try_into() {
                    let id = u64::from_le_bytes(id);
                    self.reads.entry(read.index).or_default().push(id);
                }
            }
            ready
                .take_persisted_messages()
                .into_iter()
                .for_each(&mut *send);
            let mut light = self.node.advance_append(ready);
            self.persist_changes(light.committed_entries())?;
            light.take_messages().into_iter().for_each(&mut *send);
            self.apply(light.take_committed_entries(), &mut output)?;
            self.node.advance_apply_to(self.applied.index);
            self.draw_timeout();
        }
        self.discard_staged()?;
        output.removed = self.removed;
        while let Some(entry) = self.reads.first_entry() {
            if *entry.key() > self.applied.index {
                break;
            }
            output.reads.extend(entry.remove());
        }
        Ok(output)
    }

    /// Ends a member of which something stored was found damaged, by whoever read it.
    fn check_damage(&mut self) -> Result<(), MemberError> {
        if let Some(lost) = self.lost.take() {
            return Err(lost);
        }
        match self.keyspace.damage().or(self.node.store().damage()) {
            Some(damage) => Err(damage),
            None => Ok(()),
        }
    }

    fn install(
        &mut self,
        wanted: &SnapshotMetadata,
        state: Option<&HardState>,
        output: &mut Output,
    ) -> Result<(), MemberError> {
        let staged = self.staged.take().ok_or_else(|| {
            MemberError::DamagedSnapshot("consensus took one that did not come".into())
        })?;
        let at = Position {
            index: wanted.index,
            term: wanted.term,
        };
        let mut state = state.cloned().unwrap_or(self.node.store().hard_state());
        state.commit = state.commit.max(at.index);
        self.node.mut_store().begin_install(at)?;
        self.keyspace.install(&*self.disk, staged)?;
        let log = self.node.mut_store();
        log.restart(at, &state)?;
        log.set_conf_state(wanted.get_conf_state().clone());
        log.offer_snapshot(at, wanted.get_conf_state().clone());
        self.applied = at;
        output.installed = Some(self.keyspace.revision());
        tracing::info!(index = at.index, "installed a snapshot");
        Ok(())
    }

    fn persist(&mut self, entries: &[Entry], state: Option<&HardState>) -> Result<(), MemberError> {
        let stored = self.node.store().hard_state();
        let state = state.unwrap_or(&stored);
        // A commit index alone is not worth a sync: it is found again.
        if entries.is_empty() && (state.term, state.vote) == (stored.term, stored.vote) {
            self.node.mut_store().set_commit(state.commit);
            return Ok(());
        }
        let state = state.clone();
        self.node.mut_store().append(entries, Some(&state))
    }

    fn apply(&mut self, entries: Vec<Entry>, output: &mut Output) -> Result<(), MemberError> {
        if entries.is_empty() {
            return Ok(());
        }
        let keyspace = Arc::clone(&self.keyspace);
        let mut batch = keyspace.batch();
        for entry in entries {
            let at = Position {
                index: entry.index,
                term: entry.term,
            };
            match entry.entry_type() {
                EntryType::EntryNormal if entry.data.is_empty() => {}
                EntryType::EntryNormal => {
                    let command =
                        Command::decode(bytes::Bytes::from(entry.data)).map_err(|error| {
                            MemberError::Corrupt(format!(
                                "entry {} is not a command: {error}",
                                at.index
                            ))
                        })?;
                    let id = command.id;
                    if std::mem::take(&mut self.repeats) {
                        batch.apply(command.clone())?.ok();
                    }
                    output.outcomes.push((id, batch.apply(command)?));
                }
                EntryType::EntryConfChange => {
                    let outcome = self.apply_change(&entry.data, batch.metadata_mut())?;
                    output.membership.push(outcome);
                }
                EntryType::EntryConfChangeV2 => {
                    return Err(MemberError::Corrupt(format!(
                        "entry {} is a change of membership of an unknown kind",
                        at.index
                    )));
                }
            }
            batch.applied(at.index, at.term);
            self.applied = at;
        }
        output.leases.extend(batch.take_lease_changes());
        let history = batch.finish();
        output.history.revision = history.revision;
        output.history.events.extend(history.events);
        Ok(())
    }

    /// Changes of membership have to be durable as committed before anybody hears that they are: a
    /// member that hears of its removal ends, and could not help this one any more to find out again.
    fn persist_changes(&mut self, entries: &[Entry]) -> Result<(), MemberError> {
        let mut changes = entries
            .iter()
            .filter(|entry| entry.entry_type() != EntryType::EntryNormal);
        let Some(last) = changes.next_back() else {
            return Ok(());
        };
        let last = last.index;
        self.node.mut_store().persist_commit(last)
    }
}
