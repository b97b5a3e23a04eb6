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

/// Reads at `current`, or at the request's revision.
pub(super) fn read(
    state: &State,
    request: &pb::RangeRequest,
    current: i64,
) -> Result<pb::RangeResponse, Failure> {
    if request.revision > current {
        return Err(RequestError::FutureRevision.into());
    }
    let revision = if request.revision <= 0 {
        current
    } else {
        request.revision
    };
    if revision < state.metadata.compact_revision {
        return Err(RequestError::Compacted.into());
    }
    let limit = usize::try_from(request.limit).unwrap_or(0);
    let fetch = fetch_limit(request, limit);
    let with_values = !request.keys_only || request.sort_target == SortTarget::Value as i32;
    let mut kvs = Vec::new();
    let mut count = 0;
    let range = KeyRange::new(&request.key, &request.range_end);
    state.walk(&range, revision, |found| {
        count += 1;
        if !request.count_only && kvs.len() < fetch {
            kvs.push(if with_values {
                found.pair()?
            } else {
                found.pair_without_value()
            });
        }
        Ok(ControlFlow::Continue(()))
    })?;
    kvs.retain(|kv| is_selected(request, kv));
    sort(request, &mut kvs);
    let more = limit > 0 && kvs.len() > limit;
    if more {
        kvs.truncate(limit);
    }
    if request.keys_only {
        for kv in &mut kvs {
            kv.value = Bytes::new();
        }
    }
    let header = pb::ResponseHeader {
        revision: current,
        ..Default::default()
    };
    Ok(pb::RangeResponse {
        header: Some(header),
        kvs,
        more,
        count,
    })
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
