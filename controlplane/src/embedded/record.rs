//! How one version of a key is stored, with a checksum that is verified on every read.

use bytes::Bytes;

use crate::{KeyValue, LeaseId, Revision, StateError};

/// First byte of every record, raised when the layout changes.
const LAYOUT: u8 = 1;
const KIND_PUT: u8 = 1;
const KIND_DELETE: u8 = 2;
/// layout, kind, create, modified, sub, version, lease, key length
const HEADER: usize = 1 + 1 + 8 + 8 + 4 + 8 + 8 + 4;
const CHECKSUM: usize = 4;

/// A place in history: the revision, and which of its changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) main: Revision,
    pub(super) sub: u32,
}

/// One version of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) position: Position,
    pub(super) change: Change,
}

/// What made the version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Put(KeyValue),
    Delete(Bytes),
}

impl Record {
    pub(super) fn put(kv: KeyValue, sub: u32) -> Self {
        Self {
            position: Position {
                main: kv.mod_revision,
                sub,
            },
            change: Change::Put(kv),
        }
    }

    pub(super) fn delete(key: Bytes, position: Position) -> Self {
        Self {
            position,
            change: Change::Delete(key),
        }
    }

    pub(super) fn key(&self) -> &Bytes {
        match &self.change {
            Change::Put(kv) => &kv.key,
            Change::Delete(key) => key,
        }
    }

    /// The pair, unless this is a delete.
    pub(super) fn into_kv(self) -> Option<KeyValue> {
        match self.change {
            Change::Put(kv) => Some(kv),
            Change::Delete(_) => None,
        }
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, StateError> {
        let (kind, key, value, create, version, lease) = match &self.change {
            Change::Put(kv) => (
                KIND_PUT,
                &kv.key,
                &kv.value[..],
                kv.create_revision,
                kv.version,
                kv.lease,
            ),
            Change::Delete(key) => (KIND_DELETE, key, &[][..], 0, 0, 0),
        };
        let key_length = u32::try_from(key.len()).map_err(|_| StateError::TooLarge {
            what: "key in bytes",
            size: key.len(),
            limit: crate::limits::MAX_KEY_BYTES,
        })?;
        let mut bytes = Vec::with_capacity(HEADER + key.len() + value.len() + CHECKSUM);
        bytes.push(LAYOUT);
        bytes.push(kind);
        bytes.extend_from_slice(&create.to_le_bytes());
        bytes.extend_from_slice(&self.position.main.to_le_bytes());
        bytes.extend_from_slice(&self.position.sub.to_le_bytes());
        bytes.extend_from_slice(&version.to_le_bytes());
        bytes.extend_from_slice(&lease.to_le_bytes());
        bytes.extend_from_slice(&key_length.to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(value);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        Ok(bytes)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        Self::parse(bytes)
            .ok_or_else(|| StateError::Corrupt("a record fails its checksum or layout".into()))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let body = checked(bytes)?;
        let mut fields = Fields(body);
        if fields.take::<1>()? != [LAYOUT] {
            return None;
        }
        let [kind] = fields.take::<1>()?;
        let create_revision = i64::from_le_bytes(fields.take()?);
        let main = i64::from_le_bytes(fields.take()?);
        let sub = u32::from_le_bytes(fields.take()?);
        let version = i64::from_le_bytes(fields.take()?);
        let lease: LeaseId = i64::from_le_bytes(fields.take()?);
        let key_length = usize::try_from(u32::from_le_bytes(fields.take()?)).ok()?;
        let (key, value) = fields.0.split_at_checked(key_length)?;
        let key = Bytes::copy_from_slice(key);
        let position = Position { main, sub };
        let change = match kind {
            KIND_PUT => Change::Put(KeyValue {
                key,
                value: Bytes::copy_from_slice(value),
                create_revision,
                mod_revision: main,
                version,
                lease,
            }),
            KIND_DELETE if value.is_empty() => Change::Delete(key),
            _ => return None,
        };
        Some(Self { position, change })
    }
}

/// Appends a checksum over `context` and `body`: a body stored under another name fails it.
pub(super) fn seal(context: &[u8], body: &[u8]) -> Vec<u8> {
    let mut bytes = body.to_vec();
    bytes.extend_from_slice(&checksum(context, body).to_le_bytes());
    bytes
}

/// The body that [`seal`] was given, if the checksum holds.
pub(super) fn unseal<'a>(context: &[u8], bytes: &'a [u8]) -> Option<&'a [u8]> {
    let (body, sum) = bytes.split_last_chunk::<CHECKSUM>()?;
    (checksum(context, body).to_le_bytes() == *sum).then_some(body)
}

fn checksum(context: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(context);
    hasher.update(body);
    hasher.finalize()
}

fn checked(bytes: &[u8]) -> Option<&[u8]> {
    unseal(&[], bytes)
}

/// Takes fixed-size fields off the front of bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }
}
