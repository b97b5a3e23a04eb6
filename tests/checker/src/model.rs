use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Bound;

use bytes::Bytes;
use imbl::{OrdMap, OrdSet};

use crate::history::Initial;
use crate::operation::{
    Compare, Delete, KeyValue, Keys, Put, Range, RangeResult, Refusal, Relation, Request, Response,
    Target, Txn, TxnOperation, TxnResult,
};
use crate::watch::{Event, EventKind};

/// What an etcd-like store holds at one moment: the reference that histories are compared with.
///
/// It shares what it can with its clones, so that a search may keep many of them.
#[derive(Debug, Clone)]
pub struct Model {
    keys: OrdMap<Bytes, KeyValue>,
    leases: OrdSet<i64>,
    revision: i64,
    compacted: i64,
    fingerprint: u128,
}

/// What a request does to a [`Model`].
#[derive(Debug, Clone)]
pub struct Step {
    /// The state afterwards.
    pub model: Model,
    /// What the store answers.
    pub response: Response,
    /// What watches are told, in order; all of one revision.
    pub events: Vec<Event>,
}

impl Model {
    /// What a store holds that holds this.
    pub fn new(initial: &Initial) -> Self {
        let mut model = Self {
            keys: OrdMap::new(),
            leases: initial.leases.iter().copied().collect(),
            revision: initial.revision,
            compacted: initial.compacted,
            fingerprint: 0,
        };
        for lease in &initial.leases {
            model.fingerprint ^= fingerprint(lease);
        }
        for kv in &initial.keys {
            model.insert(kv.clone());
        }
        model
    }

    /// The revision of the last change.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The revision that history begins at.
    pub fn compacted(&self) -> i64 {
        self.compacted
    }

    /// A key's value and revisions, if it exists.
    pub fn get(&self, key: &[u8]) -> Option<&KeyValue> {
        self.keys.get(key)
    }

    /// All that exist of `keys`, in order.
    pub fn select<'a>(&'a self, keys: &'a Keys) -> impl Iterator<Item = &'a KeyValue> {
        let start: &[u8] = match keys {
            Keys::One(key) | Keys::Range(key, _) | Keys::From(key) => key,
        };
        self.keys
            .range::<_, [u8]>((Bound::Included(start), Bound::Unbounded))
            .map(|(_, kv)| kv)
            .take_while(|kv| keys.contains(&kv.key))
    }

    /// Whether a lease is there.
    pub fn has_lease(&self, id: i64) -> bool {
        self.leases.contains(&id)
    }

    /// A number that differs for different states, in all likelihood.
    pub fn fingerprint(&self) -> u128 {
        self.fingerprint ^ fingerprint(&("numbers", self.revision, self.compacted))
    }

    /// Does what `request` asks for. A range of the past answers as the present would: the caller
    /// compares what was read with the state at that revision.
    pub fn apply(&self, request: &Request) -> Result<Step, Refusal> {
        let mut after = self.clone();
        let mut events = Vec::new();
        let response = match request {
            Request::Range(range) => {
                self.check_revision(range.revision)?;
                Response::Range {
                    revision: self.revision,
                    result: self.read(range),
                }
            }
            Request::Put(put) => {
                let prev_kv = after.put(put, &mut events)?;
                Response::Put {
                    revision: after.advance(&events),
                    prev_kv,
                }
            }
            Request::Delete(delete) => {
                let (deleted, prev_kvs) = after.delete(delete, &mut events);
                Response::Delete {
                    revision: after.advance(&events),
                    deleted,
                    prev_kvs,
                }
            }
            Request::Txn(txn) => after.txn(txn, &mut events)?,
            Request::Compact(revision) => after.compact(*revision)?,
            Request::LeaseGrant(id) => after.grant(*id)?,
            Request::LeaseRevoke(id) => after.revoke(*id, &mut events)?,
        };
        Ok(Step {
            model: after,
            response,
            events,
        })
    }

    /// What a range reads in this state.
    pub fn read(&self, range: &Range) -> RangeResult {
        let limit = match range.limit {
            0 => usize::MAX,
            limit => limit,
        };
        let count = self.select(&range.keys).count();
        let shown = if range.count_only { 0 } else { limit };
        let kvs = self.select(&range.keys).take(shown).cloned();
        RangeResult {
            kvs: kvs
                .map(|kv| without_value_if(range.keys_only, kv))
                .collect(),
            count,
            more: !range.count_only && count > limit,
        }
    }

    fn check_revision(&self, revision: i64) -> Result<(), Refusal> {
        match revision {
            0 => Ok(()),
            past if past < self.compacted => Err(Refusal::Compacted),
            future if future > self.revision => Err(Refusal::FutureRevision),
            _ => Ok(()),
        }
    }

    fn put(&mut self, put: &Put, events: &mut Vec<Event>) -> Result<Option<KeyValue>, Refusal> {
        if put.lease != 0 && !self.has_lease(put.lease) {
            return Err(Refusal::LeaseNotFound);
        }
        let previous = self.keys.get(&put.key).cloned();
        let revision = self.revision + 1;
        let kv = KeyValue {
            key: put.key.clone(),
            value: put.value.clone(),
            create_revision: previous.as_ref().map_or(revision, |kv| kv.create_revision),
            mod_revision: revision,
            version: previous.as_ref().map_or(1, |kv| kv.version + 1),
            lease: put.lease,
        };
        self.insert(kv.clone());
        events.push(Event {
            kind: EventKind::Put,
            kv,
            prev_kv: previous.clone(),
        });
        Ok(previous.filter(|_| put.prev_kv))
    }

    fn delete(&mut self, delete: &Delete, events: &mut Vec<Event>) -> (usize, Vec<KeyValue>) {
        let gone: Vec<KeyValue> = self.select(&delete.keys).cloned().collect();
        for kv in &gone {
            self.remove(kv, events);
        }
        let deleted = gone.len();
        (deleted, if delete.prev_kv { gone } else { Vec::new() })
    }

    fn txn(&mut self, txn: &Txn, events: &mut Vec<Event>) -> Result<Response, Refusal> {
        if puts_twice(&txn.success) || puts_twice(&txn.failure) {
            return Err(Refusal::DuplicateKey);
        }
        let succeeded = txn.compares.iter().all(|compare| self.holds(compare));
        let operations = if succeeded {
            &txn.success
        } else {
            &txn.failure
        };
        let mut results = Vec::new();
        for operation in operations {
            results.push(match operation {
                TxnOperation::Range(range) => {
                    self.check_revision(range.revision)?;
                    TxnResult::Range(self.read(range))
                }
                TxnOperation::Put(put) => TxnResult::Put {
                    prev_kv: self.put(put, events)?,
                },
                TxnOperation::Delete(delete) => {
                    let (deleted, prev_kvs) = self.delete(delete, events);
                    TxnResult::Delete { deleted, prev_kvs }
                }
            });
        }
        Ok(Response::Txn {
            revision: self.advance(events),
            succeeded,
            results,
        })
    }

    fn holds(&self, compare: &Compare) -> bool {
        let mut kvs = self.select(&compare.keys).peekable();
        if kvs.peek().is_none() {
            let (relation, target) = (compare.relation, &compare.target);
            return !matches!(target, Target::Value(_)) && holds(relation, target, &nothing());
        }
        kvs.all(|kv| holds(compare.relation, &compare.target, kv))
    }

    fn compact(&mut self, revision: i64) -> Result<Response, Refusal> {
        if revision <= self.compacted {
            return Err(Refusal::Compacted);
        }
        if revision > self.revision {
            return Err(Refusal::FutureRevision);
        }
        self.compacted = revision;
        Ok(Response::Done)
    }

    fn grant(&mut self, id: i64) -> Result<Response, Refusal> {
        if self.leases.insert(id).is_some() {
            return Err(Refusal::LeaseExists);
        }
        self.fingerprint ^= fingerprint(&id);
        Ok(Response::Done)
    }

    fn revoke(&mut self, id: i64, events: &mut Vec<Event>) -> Result<Response, Refusal> {
        if self.leases.remove(&id).is_none() {
            return Err(Refusal::LeaseNotFound);
        }
        self.fingerprint ^= fingerprint(&id);
        let attached = self.keys.values().filter(|kv| kv.lease == id);
        let attached: Vec<KeyValue> = attached.cloned().collect();
        for kv in &attached {
            self.remove(kv, events);
        }
        self.advance(events);
        Ok(Response::Done)
    }

    /// The revision after what `events` tell.
    fn advance(&mut self, events: &[Event]) -> i64 {
        if !events.is_empty() {
            self.revision += 1;
        }
        self.revision
    }

    fn insert(&mut self, kv: KeyValue) {
        self.fingerprint ^= fingerprint(&kv);
        if let Some(previous) = self.keys.insert(kv.key.clone(), kv) {
            self.fingerprint ^= fingerprint(&previous);
        }
    }

    fn remove(&mut self, kv: &KeyValue, events: &mut Vec<Event>) {
        if let Some(previous) = self.keys.remove(&kv.key) {
            self.fingerprint ^= fingerprint(&previous);
            events.push(Event::deleted(self.revision + 1, previous));
        }
    }
}

/// Whether a key is written by two of the operations, which no transaction may do.
fn puts_twice(operations: &[TxnOperation]) -> bool {
    operations.iter().enumerate().any(|(at, operation)| {
        let TxnOperation::Put(put) = operation else {
            return false;
        };
        operations
            .iter()
            .enumerate()
            .any(|(other, operation)| match operation {
                TxnOperation::Put(second) => other > at && second.key == put.key,
                TxnOperation::Delete(delete) => delete.keys.contains(&put.key),
                TxnOperation::Range(_) => false,
            })
    })
}

fn holds(relation: Relation, target: &Target, kv: &KeyValue) -> bool {
    let order = match target {
        Target::CreateRevision(revision) => kv.create_revision.cmp(revision),
        Target::ModRevision(revision) => kv.mod_revision.cmp(revision),
        Target::Version(version) => kv.version.cmp(version),
        Target::Value(value) => kv.value.cmp(value),
        Target::Lease(lease) => kv.lease.cmp(lease),
    };
    match relation {
        Relation::Equal => order.is_eq(),
        Relation::NotEqual => order.is_ne(),
        Relation::Greater => order.is_gt(),
        Relation::Less => order.is_lt(),
    }
}

fn nothing() -> KeyValue {
    KeyValue {
        key: Bytes::new(),
        value: Bytes::new(),
        create_revision: 0,
        mod_revision: 0,
        version: 0,
        lease: 0,
    }
}

fn without_value_if(unwanted: bool, mut kv: KeyValue) -> KeyValue {
    if unwanted {
        kv.value = Bytes::new();
    }
    kv
}

fn fingerprint(of: &impl Hash) -> u128 {
    let half = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        of.hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(1) << 64 | half(2)
}
