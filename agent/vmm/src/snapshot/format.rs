//! The state file: a header with a version and checksums, and the state behind it.
//!
//! ```text
//!  0   8  "KEELSNAP"
//!  8   4  version of the format
//! 12   4  architecture: the ELF machine number (62 is x86-64)
//! 16   8  bytes of the body
//! 24   4  CRC-32 of the body
//! 28   4  CRC-32 of the bytes before this one
//! 32      the body: the state, encoded by postcard
//! ```
//!
//! All numbers are little-endian. The version changes with every change of the state; a program
//! reads its own version alone, for a guest is restored by the program that its host has.

use serde::Serialize;
use serde::de::DeserializeOwned;

const MAGIC: [u8; 8] = *b"KEELSNAP";
/// The version that this program writes and reads.
pub const VERSION: u32 = 3;
/// `EM_X86_64`.
pub const ARCHITECTURE: u32 = 62;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 32;
/// More than the state of 64 vCPUs and 4 TiB of memory needs.
pub const MAX_BODY_BYTES: u64 = 256 << 20;

/// Why bytes are no state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It is something else.
    #[error("it is no snapshot: the signature is missing")]
    NotASnapshot,
    /// It ends early.
    #[error("it is cut short: {found} bytes of {wanted}")]
    Cut {
        /// Bytes that there should be.
        wanted: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// The header or the body were changed.
    #[error("it is corrupt: the checksum of its {0} is wrong")]
    Checksum(&'static str),
    /// It is of another version.
    #[error(
        "it has version {found} of the format, and this program reads version {VERSION}: use the \
         keelson-vmm of the version that took it"
    )]
    Version {
        /// The file's version.
        found: u32,
    },
    /// It is of another architecture.
    #[error("it is of another architecture (ELF machine {found}); this program runs x86-64 guests")]
    Architecture {
        /// The file's architecture.
        found: u32,
    },
    /// The checksum is right, but the content is not.
    #[error("it is not valid: {0}")]
    Invalid(String),
}

/// The file's bytes.
pub fn encode(state: &impl Serialize) -> Result<Vec<u8>, FormatError> {
    let mut file = vec![0; HEADER_BYTES];
    file = postcard::to_extend(state, file).map_err(|e| FormatError::Invalid(e.to_string()))?;
    let length = (file.len() - HEADER_BYTES) as u64;
    if length > MAX_BODY_BYTES {
        return Err(FormatError::Invalid(format!(
            "the state has {length} bytes"
        )));
    }
    let header = header(&file[HEADER_BYTES..]);
    file[..HEADER_BYTES].copy_from_slice(&header);
    Ok(file)
}

/// A file with this body, whatever it is.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn with_header(body: &[u8]) -> Vec<u8> {
    let mut file = header(body);
    file.extend_from_slice(body);
    file
}

fn header(body: &[u8]) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&ARCHITECTURE.to_le_bytes());
    header.extend_from_slice(&(body.len() as u64).to_le_bytes());
    header.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    let checksum = crc32fast::hash(&header);
    header.extend_from_slice(&checksum.to_le_bytes());
    header
}

/// The state in a file's bytes.
pub fn decode<T: DeserializeOwned>(file: &[u8]) -> Result<T, FormatError> {
    let found = file.len() as u64;
    let Some((header, body)) = file.split_at_checked(HEADER_BYTES) else {
        let length = MAGIC.len().min(file.len());
        return Err(if file[..length] == MAGIC[..length] && length > 0 {
            FormatError::Cut {
                wanted: HEADER_BYTES as u64,
                found,
            }
        } else {
            FormatError::NotASnapshot
        });
    };
    let wanted = check_header(header)?;
    match (body.len() as u64).cmp(&wanted) {
        std::cmp::Ordering::Less => {
            return Err(FormatError::Cut {
                wanted: wanted + HEADER_BYTES as u64,
                found,
            });
        }
        std::cmp::Ordering::Greater => {
            return Err(FormatError::Invalid("bytes follow its end".to_owned()));
        }
        std::cmp::Ordering::Equal => {}
    }
    if crc32fast::hash(body) != word(header, 24) {
        return Err(FormatError::Checksum("state"));
    }
    let (state, rest) =
        postcard::take_from_bytes(body).map_err(|e| FormatError::Invalid(e.to_string()))?;
    if rest.is_empty() {
        Ok(state)
    } else {
        Err(FormatError::Invalid("the state ends early".to_owned()))
    }
}

/// Checks the header and returns the body's length.
fn check_header(header: &[u8]) -> Result<u64, FormatError> {
    if header[..8] != MAGIC {
        return Err(FormatError::NotASnapshot);
    }
    if crc32fast::hash(&header[..28]) != word(header, 28) {
        return Err(FormatError::Checksum("header"));
    }
    // The architecture first: other ones may have versions of their own.
    let architecture = word(header, 12);
    if architecture != ARCHITECTURE {
        return Err(FormatError::Architecture {
            found: architecture,
        });
    }
    let version = word(header, 8);
    if version != VERSION {
        return Err(FormatError::Version { found: version });
    }
    let length = u64::from(word(header, 16)) | u64::from(word(header, 20)) << 32;
    if length > MAX_BODY_BYTES {
        return Err(FormatError::Invalid(format!(
            "its state has {length} bytes"
        )));
    }
    Ok(length)
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    bytes[offset..offset + 4]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Sample = (u64, Vec<u8>, String);

    fn sample() -> Vec<u8> {
        let state: Sample = (7, vec![1; 100], "guest".to_owned());
        encode(&state).unwrap()
    }

    fn resealed(mut file: Vec<u8>) -> Vec<u8> {
        let checksum = crc32fast::hash(&file[..28]);
        file[28..32].copy_from_slice(&checksum.to_le_bytes());
        file
    }

    #[test]
    fn other_files_versions_and_architectures_are_told_apart() {
        let refusal = |file: &[u8]| decode::<Sample>(file).unwrap_err();
        assert_eq!(
            refusal(b"\x7fELF and so on, and so on, and so on"),
            FormatError::NotASnapshot
        );
        assert_eq!(refusal(b""), FormatError::NotASnapshot);
        let mut newer = sample();
        newer[8] = 99;
        assert_eq!(
            refusal(&resealed(newer)),
            FormatError::Version { found: 99 }
        );
        let mut foreign = sample();
        foreign[12] = 183;
        assert_eq!(
            refusal(&resealed(foreign)),
            FormatError::Architecture { found: 183 }
        );
        let mut longer = sample();
        longer.push(0);
        assert!(matches!(refusal(&longer), FormatError::Invalid(_)));
    }

    proptest! {
        #[test]
        fn states_come_back(state in any::<(u64, Vec<u8>, String)>()) {
            prop_assert_eq!(decode::<Sample>(&encode(&state).unwrap()), Ok(state));
        }

        #[test]
        fn a_cut_file_is_refused(length in 0..sample().len()) {
            let refused = decode::<Sample>(&sample()[..length]).unwrap_err();
            let expected = matches!(refused, FormatError::Cut { .. } | FormatError::NotASnapshot);
            prop_assert!(expected);
        }

        #[test]
        fn a_flipped_bit_is_refused(bit in 0..sample().len() * 8) {
            let mut file = sample();
            file[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode::<Sample>(&file).is_err());
        }

        #[test]
        fn no_bytes_break_it(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Sample>(&bytes);
            // Behind a valid header, too.
            let mut file = sample()[..HEADER_BYTES].to_vec();
            file.extend_from_slice(&bytes);
            file[16..24].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            file[24..28].copy_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
            let _ = decode::<Sample>(&resealed(file));
        }
    }
}
