//! Ranges with etcd's options: limits, filters, orders.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use bytes::Bytes;
use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::mvccpb::KeyValue;
use pb::range_request::{SortOrder, SortTarget};

use super::range::KeyRange;
use super::state::State;
use super::version::Version;
use crate::{Failure, RequestError};

/// Reads at `current`, or at the request's revision, all at once.
pub(super) fn read(
    state: &State,
    request: &pb::RangeRequest,
    current: i64,
) -> Result<pb::RangeResponse, Failure> {
    let mut reading = RangeReading::new(request.clone());
    reading.step(state, current, Step::UNLIMITED)?;
    Ok(reading.finish())
}

/// How much is read in one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// Keys that are looked at.
    keys: usize,
    /// Bytes of keys and values that are taken.
    bytes: usize,
}

impl Step {
    /// Short enough for writers to wait.
    pub(super) const SHORT: Self = Self {
        keys: 4096,
        bytes: 1024 * 1024,
    };
    const UNLIMITED: Self = Self {
        keys: usize::MAX,
        bytes: usize::MAX,
    };
}

/// A range that is read in steps, all at the revision of the first one.
#[derive(Debug)]
pub struct RangeReading {
    request: pb::RangeRequest,
    /// What is left of the range.
    range: KeyRange,
    limit: usize,
    fetch: usize,
    /// The revision it reads at, and the one that was current then.
    revisions: Option<(i64, i64)>,
    kvs: Vec<KeyValue>,
    fetched: usize,
    bytes: usize,
    count: i64,
    done: bool,
}

impl RangeReading {
    /// Nothing is read yet.
    pub(super) fn new(request: pb::RangeRequest) -> Self {
        let limit = usize::try_from(request.limit).unwrap_or(0);
        Self {
            range: KeyRange::new(&request.key, &request.range_end),
            limit,
            fetch: fetch_limit(&request, limit),
            request,
            revisions: None,
            kvs: Vec::new(),
            fetched: 0,
            bytes: 0,
            count: 0,
            done: false,
        }
    }

    /// Whether everything is read.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Bytes of the pairs that it holds.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it began with what was current, and could begin again at what is current now.
    pub fn may_begin_again(&self) -> bool {
        self.request.revision <= 0
    }

    /// Begins again.
    pub fn begin_again(&mut self) {
        *self = Self::new(std::mem::take(&mut self.request));
    }

    /// The revision that was current when it began; 0 before.
    pub fn revision(&self) -> i64 {
        self.revisions.map_or(0, |(_, current)| current)
    }

    /// Keys found so far.
    pub fn count(&self) -> i64 {
        self.count
    }

    /// Reads on. `current` counts in the first step.
    pub(super) fn step(&mut self, state: &State, current: i64, step: Step) -> Result<(), Failure> {
        let (revision, _) = match self.revisions {
            Some(revisions) => revisions,
            None if self.request.revision > current => {
                return Err(RequestError::FutureRevision.into());
            }
            None if self.request.revision <= 0 => (current, current),
            None => (self.request.revision, current),
        };
        self.revisions.get_or_insert((revision, current));
        if revision < state.metadata.compact_revision {
            return Err(RequestError::Compacted.into());
        }
        let request = &self.request;
        let with_values = !request.keys_only || request.sort_target == SortTarget::Value as i32;
        let (mut keys, mut bytes) = (step.keys, step.bytes);
        let mut last = None;
        state.walk(&self.range, revision, |found| {
            if keys == 0 || bytes == 0 {
                last = Some(found.key.clone());
                return Ok(ControlFlow::Break(()));
            }
            keys -= 1;
            self.count += 1;
            if !request.count_only && self.fetched < self.fetch {
                let kv = if with_values {
                    found.pair()?
                } else {
                    found.pair_without_value()
                };
                self.fetched += 1;
                if is_selected(request, &kv) {
                    let size = kv.key.len() + kv.value.len();
                    self.bytes += size;
                    bytes = bytes.saturating_sub(size);
                    self.kvs.push(kv);
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        match last {
            Some(next) => self.range.start = next,
            None => self.done = true,
        }
        Ok(())
    }

    /// The answer, when everything is read.
    pub fn finish(mut self) -> pb::RangeResponse {
        let mut kvs = self.kvs;
        sort(&self.request, &mut kvs);
        let more = self.limit > 0 && kvs.len() > self.limit;
        if more {
            kvs.truncate(self.limit);
        }
        if self.request.keys_only {
            for kv in &mut kvs {
                kv.value = Bytes::new();
            }
        }
        let header = pb::ResponseHeader {
            revision: self.revisions.take().map_or(0, |(_, current)| current),
            ..Default::default()
        };
        pb::RangeResponse {
            header: Some(header),
            kvs,
            more,
            count: self.count,
        }
    }

    /// Pairs that were read since the last call, of a range in the order of its keys, and whether
    /// there are more than the limit.
    pub fn take_part(&mut self, taken: &mut usize) -> (Vec<KeyValue>, bool) {
        self.bytes = 0;
        let mut kvs = std::mem::take(&mut self.kvs);
        let left = match self.limit {
            0 => usize::MAX,
            limit => limit - *taken,
        };
        let more = kvs.len() > left;
        kvs.truncate(left);
        *taken += kvs.len();
        (kvs, more)
    }
}

/// A version as clients see it.
pub(super) fn key_value(key: Bytes, revision: i64, version: Version) -> KeyValue {
    KeyValue {
        key,
        create_revision: version.create_revision,
        mod_revision: revision,
        version: version.puts,
        value: version.value,
        lease: version.lease,
    }
}

/// How many pairs to fetch: all if something is done with them before the limit applies, else one
/// more than the limit, to know whether there is more.
fn fetch_limit(request: &pb::RangeRequest, limit: usize) -> usize {
    let whole = request.sort_order != SortOrder::None as i32
        || request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0;
    if limit == 0 || whole {
        usize::MAX
    } else {
        limit + 1
    }
}

fn is_selected(request: &pb::RangeRequest, kv: &KeyValue) -> bool {
    let outside =
        |value: i64, min: i64, max: i64| (min != 0 && value < min) || (max != 0 && value > max);
    !outside(
        kv.mod_revision,
        request.min_mod_revision,
        request.max_mod_revision,
    ) && !outside(
        kv.create_revision,
        request.min_create_revision,
        request.max_create_revision,
    )
}

fn sort(request: &pb::RangeRequest, kvs: &mut [KeyValue]) {
    // Requests with an unknown one were refused.
    let (Ok(target), Ok(order)) = (
        SortTarget::try_from(request.sort_target),
        SortOrder::try_from(request.sort_order),
    ) else {
        return;
    };
    let by: fn(&KeyValue, &KeyValue) -> Ordering = match target {
        SortTarget::Key => |a, b| a.key.cmp(&b.key),
        SortTarget::Version => |a, b| a.version.cmp(&b.version),
        SortTarget::Create => |a, b| a.create_revision.cmp(&b.create_revision),
        SortTarget::Mod => |a, b| a.mod_revision.cmp(&b.mod_revision),
        SortTarget::Value => |a, b| a.value.cmp(&b.value),
    };
    match (order, target) {
        // They come in the order of keys.
        (SortOrder::None | SortOrder::Ascend, SortTarget::Key) => {}
        (SortOrder::None | SortOrder::Ascend, _) => kvs.sort_by(by),
        (SortOrder::Descend, _) => kvs.sort_by(|a, b| by(b, a)),
    }
}
