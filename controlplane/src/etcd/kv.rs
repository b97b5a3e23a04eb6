//! Reads and single writes as etcd's messages.

use std::time::Duration;

use bytes::Bytes;
use etcd_client::proto::{
    PbDeleteResponse, PbKeyValue, PbPutResponse, PbRangeResponse, PbResponseHeader,
};
use etcd_client::{DeleteOptions, GetOptions, PutOptions};

use super::namespace::Namespace;
use super::unexpected;
use crate::limits::MAX_RANGE_BYTES;
use crate::{
    DeleteRequest, DeleteResponse, KeyValue, PutRequest, PutResponse, RangeRequest, RangeResponse,
    Revision, StateError,
};

pub(super) fn encode_range(namespace: &Namespace, request: &RangeRequest) -> (Vec<u8>, GetOptions) {
    let range = namespace.range(&request.range);
    let mut options = GetOptions::new()
        .with_limit(request.limit.unwrap_or(0).into())
        .with_revision(request.revision.unwrap_or(0));
    if let Some(end) = range.end {
        options = options.with_range(end);
    }
    if request.keys_only {
        options = options.with_keys_only();
    }
    if request.count_only {
        options = options.with_count_only();
    }
    (range.key, options)
}

pub(super) fn encode_put(request: &PutRequest) -> PutOptions {
    let options = PutOptions::new().with_lease(request.lease);
    if request.prev_kv {
        options.with_prev_key()
    } else {
        options
    }
}

pub(super) fn encode_delete(
    namespace: &Namespace,
    request: &DeleteRequest,
) -> (Vec<u8>, DeleteOptions) {
    let range = namespace.range(&request.range);
    let mut options = DeleteOptions::new();
    if let Some(end) = range.end {
        options = options.with_range(end);
    }
    if request.prev_kv {
        options = options.with_prev_key();
    }
    (range.key, options)
}

/// `revision` is that of the transaction around, if there is one.
pub(super) fn decode_range(
    namespace: &Namespace,
    request: &RangeRequest,
    response: PbRangeResponse,
    revision: Option<Revision>,
) -> Result<RangeResponse, StateError> {
    let kvs = response.kvs.into_iter();
    let kvs = kvs
        .map(|kv| key_value(namespace, kv))
        .collect::<Result<Vec<_>, _>>()?;
    let size = kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
    if size > MAX_RANGE_BYTES {
        return Err(StateError::TooLarge {
            what: "range in bytes (ask for it in pages)",
            size,
            limit: MAX_RANGE_BYTES,
        });
    }
    Ok(RangeResponse {
        revision: revision_of(response.header.as_ref(), revision)?,
        kvs,
        more: response.more && !request.count_only,
        count: response.count,
    })
}

pub(super) fn decode_put(
    namespace: &Namespace,
    response: PbPutResponse,
    revision: Option<Revision>,
) -> Result<PutResponse, StateError> {
    let prev_kv = response.prev_kv.map(|kv| key_value(namespace, kv));
    Ok(PutResponse {
        revision: revision_of(response.header.as_ref(), revision)?,
        prev_kv: prev_kv.transpose()?,
    })
}

pub(super) fn decode_delete(
    namespace: &Namespace,
    response: PbDeleteResponse,
    revision: Option<Revision>,
) -> Result<DeleteResponse, StateError> {
    let prev_kvs = response.prev_kvs.into_iter();
    Ok(DeleteResponse {
        revision: revision_of(response.header.as_ref(), revision)?,
        deleted: response.deleted,
        prev_kvs: prev_kvs
            .map(|kv| key_value(namespace, kv))
            .collect::<Result<_, _>>()?,
    })
}

pub(super) fn key_value(namespace: &Namespace, kv: PbKeyValue) -> Result<KeyValue, StateError> {
    let key = namespace.strip_owned(kv.key);
    Ok(KeyValue {
        key: key.ok_or_else(|| unexpected("has a key outside of the prefix"))?,
        value: Bytes::from(kv.value),
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
        version: kv.version,
        lease: kv.lease,
    })
}

/// etcd leaves the header out of answers inside a transaction, or gives a revision from its middle.
pub(super) fn revision_of(
    header: Option<&PbResponseHeader>,
    transaction: Option<Revision>,
) -> Result<Revision, StateError> {
    match (transaction, header) {
        (Some(revision), _) => Ok(revision),
        (None, Some(header)) => Ok(header.revision),
        (None, None) => Err(unexpected("has no header")),
    }
}

pub(super) fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
