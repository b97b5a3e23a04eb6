//! One version of one key, and how it is stored: in an index by key, without its value, and as a
//! record by revision, whole. Both have a checksum that covers where they belong.

use bytes::Bytes;

use crate::MemberError;

/// What a key was from one revision on, until the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The key's first revision since it was last missing.
    pub create_revision: i64,
    /// How often it was put since then, which clients call its version; 0 is a deletion.
    pub puts: i64,
    /// The lease it is attached to, or 0.
    pub lease: i64,
    /// Which change of its revision this is.
    pub sub: u32,
    /// Its value.
    pub value: Bytes,
}

const LAYOUT: u8 = 1;
/// layout, create revision, puts, lease
const FIELDS: usize = 1 + 8 + 8 + 8;
const CHECKSUM: usize = 4;

impl Version {
    /// A deletion.
    pub fn deleted(sub: u32) -> Self {
        Self {
            create_revision: 0,
            puts: 0,
            lease: 0,
            sub,
            value: Bytes::new(),
        }
    }

    /// Whether this version is a deletion.
    pub fn is_deletion(&self) -> bool {
        self.puts == 0
    }

    /// Writes what the index has of a version: everything but the value.
    pub(super) fn encode_index(&self, key: &[u8], revision: i64, into: &mut Vec<u8>) {
        into.clear();
        self.encode_fields(into);
        into.extend_from_slice(&self.sub.to_le_bytes());
        seal(into, key, revision, 0);
    }

    /// Reads what [`Version::encode_index`] wrote; the value is empty.
    pub(super) fn decode_index(
        key: &[u8],
        revision: i64,
        bytes: &[u8],
    ) -> Result<Self, MemberError> {
        let corrupt = || {
            corrupt(
                &format!("the index of key \"{}\"", key.escape_ascii()),
                revision,
            )
        };
        let body = unseal(bytes, key, revision, 0).ok_or_else(corrupt)?;
        let (fields, sub) = body.split_last_chunk().ok_or_else(corrupt)?;
        let (version, rest) = Self::decode_fields(fields).ok_or_else(corrupt)?;
        if !rest.is_empty() {
            return Err(corrupt());
        }
        Ok(Self {
            sub: u32::from_le_bytes(*sub),
            ..version
        })
    }

    /// Writes the whole of a version with its key.
    pub(super) fn encode_record(&self, key: &[u8], revision: i64, into: &mut Vec<u8>) {
        into.clear();
        self.encode_fields(into);
        let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
        into.extend_from_slice(&length.to_le_bytes());
        into.extend_from_slice(key);
        into.extend_from_slice(&self.value);
        seal(into, &[], revision, self.sub);
    }

    /// Reads what [`Version::encode_record`] wrote: key and version.
    pub(super) fn decode_record(
        revision: i64,
        sub: u32,
        bytes: &[u8],
    ) -> Result<(Bytes, Self), MemberError> {
        let corrupt = || corrupt(&format!("record {sub}"), revision);
        let body = unseal(bytes, &[], revision, sub).ok_or_else(corrupt)?;
        let (version, rest) = Self::decode_fields(body).ok_or_else(corrupt)?;
        let (length, rest) = rest.split_first_chunk().ok_or_else(corrupt)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (key, value) = rest.split_at_checked(length).ok_or_else(corrupt)?;
        let version = Self {
            sub,
            value: Bytes::copy_from_slice(value),
            ..version
        };
        Ok((Bytes::copy_from_slice(key), version))
    }

    fn encode_fields(&self, into: &mut Vec<u8>) {
        into.push(LAYOUT);
        for field in [self.create_revision, self.puts, self.lease] {
            into.extend_from_slice(&field.to_le_bytes());
        }
    }

    fn decode_fields(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (fields, rest) = bytes.split_first_chunk::<FIELDS>()?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&fields[at..at + 8]);
            i64::from_le_bytes(bytes)
        };
        let version = Self {
            create_revision: number(1),
            puts: number(9),
            lease: number(17),
            sub: 0,
            value: Bytes::new(),
        };
        (fields[0] == LAYOUT).then_some((version, rest))
    }
}

fn seal(bytes: &mut Vec<u8>, key: &[u8], revision: i64, sub: u32) {
    let sum = checksum(key, revision, sub, bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
}

fn unseal<'a>(bytes: &'a [u8], key: &[u8], revision: i64, sub: u32) -> Option<&'a [u8]> {
    let (body, sum) = bytes.split_last_chunk::<CHECKSUM>()?;
    (checksum(key, revision, sub, body).to_le_bytes() == *sum).then_some(body)
}

fn corrupt(what: &str, revision: i64) -> MemberError {
    MemberError::Corrupt(format!("{what} at revision {revision} fails its checksum"))
}

fn checksum(key: &[u8], revision: i64, sub: u32, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&revision.to_le_bytes());
    hasher.update(&sub.to_le_bytes());
    hasher.update(key);
    hasher.update(body);
    hasher.finalize()
}
