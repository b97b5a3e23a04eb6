//! Applies transactions to the tables.

use std::cmp::Ordering;

use bytes::Bytes;

use super::errors::Engine;
use super::leases;
use super::record::{Position, Record};
use super::tables::WriteTables;
use super::view::event;
use crate::{
    Compare, CompareTarget, DeleteRequest, DeleteResponse, Event, KeyValue, LeaseId, NO_LEASE,
    PutRequest, PutResponse, Revision, StateError, Txn, TxnOp, TxnResponse, TxnResult,
};

/// One write, as it is applied: takes the next revision if it changes anything.
pub(super) struct Write<'a, 'txn> {
    tables: &'a mut WriteTables<'txn>,
    /// Revision before this write.
    before: Revision,
    compact_revision: Revision,
    events: Vec<Event>,
}

/// A write that was applied.
pub(super) struct Applied<T> {
    pub(super) response: T,
    pub(super) revision: Revision,
    /// What it changed, each with the pair before.
    pub(super) events: Vec<Event>,
}

/// Which branch each transaction takes: decided before anything is changed.
struct Path {
    succeeded: bool,
    nested: Vec<Path>,
}

impl<'a, 'txn> Write<'a, 'txn> {
    pub(super) fn new(
        tables: &'a mut WriteTables<'txn>,
        before: Revision,
        compact_revision: Revision,
    ) -> Self {
        Self {
            tables,
            before,
            compact_revision,
            events: Vec::new(),
        }
    }

    /// Does `txn`. A [request's mistake](StateError) is found before anything is changed.
    pub(super) fn txn(mut self, txn: &Txn) -> Result<Applied<TxnResponse>, StateError> {
        let path = self.path(txn)?;
        self.check(txn, &path)?;
        let mut response = self.run(txn, &path)?;
        let revision = self.revision();
        stamp(&mut response, revision);
        Ok(Applied {
            response,
            revision,
            events: self.events,
        })
    }

    /// Ends `lease` and deletes its keys.
    pub(super) fn revoke(mut self, lease: LeaseId) -> Result<Applied<()>, StateError> {
        leases::require(&self.tables.leases, lease)?;
        self.tables.leases.remove(lease).engine("remove a lease")?;
        for key in lease_keys(&self.tables.lease_keys, lease)? {
            match self
                .tables
                .view(self.before, self.compact_revision)
                .get(&key)?
            {
                Some(kv) if kv.lease == lease => self.delete_pair(kv)?,
                _ => {
                    return Err(StateError::Corrupt(format!(
                        "lease {lease:#x} lists a key that isn't attached to it"
                    )));
                }
            }
        }
        Ok(Applied {
            response: (),
            revision: self.revision(),
            events: self.events,
        })
    }

    /// The revision that this write has, as far as it has come.
    fn revision(&self) -> Revision {
        self.before + i64::from(!self.events.is_empty())
    }

    fn path(&self, txn: &Txn) -> Result<Path, StateError> {
        let mut succeeded = true;
        for compare in &txn.when {
            succeeded = succeeded && self.holds(compare)?;
        }
        let mut nested = Vec::new();
        for op in branch(txn, succeeded) {
            if let TxnOp::Txn(txn) = op {
                nested.push(self.path(txn)?);
            }
        }
        Ok(Path { succeeded, nested })
    }

    fn holds(&self, compare: &Compare) -> Result<bool, StateError> {
        let (mut any, mut all) = (false, true);
        self.tables
            .view(self.before, self.compact_revision)
            .scan_current(&compare.range, |kv| {
                any = true;
                all = all && pair_holds(compare, Some(&kv));
                Ok(())
            })?;
        Ok(if any { all } else { pair_holds(compare, None) })
    }

    fn check(&self, txn: &Txn, path: &Path) -> Result<(), StateError> {
        let mut nested = path.nested.iter();
        for op in branch(txn, path.succeeded) {
            match op {
                TxnOp::Range(request) => {
                    if let Some(revision) = request.revision {
                        let view = self.tables.view(self.before, self.compact_revision);
                        view.check_revision(revision)?;
                    }
                }
                TxnOp::Put(request) => {
                    if request.lease != NO_LEASE {
                        leases::require(&self.tables.leases, request.lease)?;
                    }
                }
                TxnOp::Delete(_) => {}
                TxnOp::Txn(txn) => {
                    if let Some(path) = nested.next() {
                        self.check(txn, path)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn run(&mut self, txn: &Txn, path: &Path) -> Result<TxnResponse, StateError> {
        let mut response = TxnResponse {
            succeeded: path.succeeded,
            ..Default::default()
        };
        let mut nested = path.nested.iter();
        for op in branch(txn, path.succeeded) {
            let result = match op {
                TxnOp::Range(request) => {
                    let view = self.tables.view(self.revision(), self.compact_revision);
                    TxnResult::Range(view.range(request)?)
                }
                TxnOp::Put(request) => TxnResult::Put(self.put(request)?),
                TxnOp::Delete(request) => TxnResult::Delete(self.delete(request)?),
                TxnOp::Txn(txn) => match nested.next() {
                    Some(path) => TxnResult::Txn(self.run(txn, path)?),
                    None => continue,
                },
            };
            response.results.push(result);
        }
        Ok(response)
    }

    fn put(&mut self, request: &PutRequest) -> Result<PutResponse, StateError> {
        let prev = self
            .tables
            .view(self.before, self.compact_revision)
            .get(&request.key)?;
        let position = self.next_position()?;
        let (create_revision, version) = prev.as_ref().map_or((position.main, 1), |kv| {
            (kv.create_revision, kv.version + 1)
        });
        let kv = KeyValue {
            key: request.key.clone(),
            value: request.value.clone(),
            create_revision,
            mod_revision: position.main,
            version,
            lease: request.lease,
        };
        self.detach(prev.as_ref())?;
        if request.lease != NO_LEASE {
            let entry = (request.lease, &request.key[..]);
            self.tables
                .lease_keys
                .insert(entry, ())
                .engine("attach a key to a lease")?;
        }
        let record = Record::put(kv, position.sub);
        let bytes = record.encode()?;
        let key = &request.key[..];
        self.tables
            .current
            .insert(key, bytes.as_slice())
            .engine("put a key")?;
        self.append(&record, &bytes)?;
        self.events.push(event(record, prev.clone()));
        Ok(PutResponse {
            revision: position.main,
            prev_kv: prev.filter(|_| request.prev_kv),
        })
    }

    fn delete(&mut self, request: &DeleteRequest) -> Result<DeleteResponse, StateError> {
        let mut doomed = Vec::new();
        self.tables
            .view(self.before, self.compact_revision)
            .scan_current(&request.range, |kv| {
                doomed.push(kv);
                Ok(())
            })?;
        let mut response = DeleteResponse::default();
        for kv in doomed {
            response.deleted += 1;
            if request.prev_kv {
                response.prev_kvs.push(kv.clone());
            }
            self.delete_pair(kv)?;
        }
        Ok(response)
    }

    fn delete_pair(&mut self, kv: KeyValue) -> Result<(), StateError> {
        let position = self.next_position()?;
        self.detach(Some(&kv))?;
        self.tables
            .current
            .remove(&kv.key[..])
            .engine("delete a key")?;
        let record = Record::delete(kv.key.clone(), position);
        let bytes = record.encode()?;
        self.append(&record, &bytes)?;
        self.events.push(event(record, Some(kv)));
        Ok(())
    }

    fn append(&mut self, record: &Record, bytes: &[u8]) -> Result<(), StateError> {
        let Position { main, sub } = record.position;
        self.tables
            .history
            .insert((main, sub), bytes)
            .engine("append to history")?;
        let entry = (&record.key()[..], main, sub);
        self.tables
            .index
            .insert(entry, ())
            .engine("index a revision")?;
        Ok(())
    }

    fn detach(&mut self, kv: Option<&KeyValue>) -> Result<(), StateError> {
        if let Some(kv) = kv.filter(|kv| kv.lease != NO_LEASE) {
            let entry = (kv.lease, &kv.key[..]);
            self.tables
                .lease_keys
                .remove(entry)
                .engine("detach a key from a lease")?;
        }
        Ok(())
    }

    fn next_position(&self) -> Result<Position, StateError> {
        let sub = u32::try_from(self.events.len()).map_err(|_| StateError::TooLarge {
            what: "one revision in changes",
            size: self.events.len(),
            limit: u32::MAX as usize,
        })?;
        Ok(Position {
            main: self.before + 1,
            sub,
        })
    }
}

/// The keys attached to `lease`, in order.
pub(super) fn lease_keys(
    table: &impl redb::ReadableTable<(i64, &'static [u8]), ()>,
    lease: LeaseId,
) -> Result<Vec<Bytes>, StateError> {
    let mut keys = Vec::new();
    for entry in table
        .range((lease, &[][..])..)
        .engine("list a lease's keys")?
    {
        let (entry, ()) = entry
            .map(|(key, _)| (key, ()))
            .engine("list a lease's keys")?;
        let (id, key) = entry.value();
        if id != lease {
            break;
        }
        keys.push(Bytes::copy_from_slice(key));
    }
    Ok(keys)
}

fn branch(txn: &Txn, succeeded: bool) -> &[TxnOp] {
    if succeeded { &txn.then } else { &txn.or_else }
}

fn pair_holds(compare: &Compare, kv: Option<&KeyValue>) -> bool {
    let number = |of: fn(&KeyValue) -> i64, given: i64| kv.map_or(0, of).cmp(&given);
    let ordering: Ordering = match &compare.target {
        CompareTarget::Version(given) => number(|kv| kv.version, *given),
        CompareTarget::CreateRevision(given) => number(|kv| kv.create_revision, *given),
        CompareTarget::ModRevision(given) => number(|kv| kv.mod_revision, *given),
        CompareTarget::Lease(given) => number(|kv| kv.lease, *given),
        CompareTarget::Value(given) => match kv {
            Some(kv) => kv.value.cmp(given),
            None => return false,
        },
    };
    compare.op.holds(ordering)
}

/// Gives every part of the answer the transaction's revision.
fn stamp(response: &mut TxnResponse, revision: Revision) {
    response.revision = revision;
    for result in &mut response.results {
        match result {
            TxnResult::Range(range) => range.revision = revision,
            TxnResult::Put(put) => put.revision = revision,
            TxnResult::Delete(delete) => delete.revision = revision,
            TxnResult::Txn(txn) => stamp(txn, revision),
        }
    }
}
