//! One version of one key, and how it is stored.

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

/// layout, create revision, puts, lease, sub
const HEADER: usize = 1 + 8 + 8 + 8 + 4;
const LAYOUT: u8 = 1;
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

    /// Appends the stored form, whose checksum covers where it belongs as well.
    pub(super) fn encode(&self, key: &[u8], revision: i64, into: &mut Vec<u8>) {
        into.clear();
        into.push(LAYOUT);
        into.extend_from_slice(&self.create_revision.to_le_bytes());
        into.extend_from_slice(&self.puts.to_le_bytes());
        into.extend_from_slice(&self.lease.to_le_bytes());
        into.extend_from_slice(&self.sub.to_le_bytes());
        into.extend_from_slice(&self.value);
        let sum = checksum(key, revision, into);
        into.extend_from_slice(&sum.to_le_bytes());
    }

    pub(super) fn decode(key: &[u8], revision: i64, bytes: &[u8]) -> Result<Self, MemberError> {
        let corrupt = || {
            let key = key.escape_ascii();
            MemberError::Corrupt(format!(
                "the record of key \"{key}\" at revision {revision} fails its checksum"
            ))
        };
        let (body, sum) = bytes.split_last_chunk::<CHECKSUM>().ok_or_else(corrupt)?;
        if body.len() < HEADER || checksum(key, revision, body).to_le_bytes() != *sum {
            return Err(corrupt());
        }
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&body[at..at + 8]);
            i64::from_le_bytes(bytes)
        };
        Ok(Self {
            create_revision: number(1),
            puts: number(9),
            lease: number(17),
            sub: u32::from_le_bytes([body[25], body[26], body[27], body[28]]),
            value: Bytes::copy_from_slice(&body[HEADER..]),
        })
    }
}

fn checksum(key: &[u8], revision: i64, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&revision.to_le_bytes());
    hasher.update(key);
    hasher.update(body);
    hasher.finalize()
}
