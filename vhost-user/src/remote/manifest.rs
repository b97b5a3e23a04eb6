//! The checksums of an image's chunks, as a text file that lies beside the image on its server.

use std::fmt::Write;
use std::io::{self, Read};

use sha2::{Digest, Sha256};

/// The sizes that a chunk may have, in bytes; powers of two.
pub const CHUNK_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=4 << 20;
/// The chunk's size unless another is asked for, in bytes.
pub const DEFAULT_CHUNK: u64 = 256 << 10;
/// The longest manifest, in bytes: that of an image of 4 TiB in chunks of 4 MiB.
pub const MAX_MANIFEST: u64 = 65 << 20;
/// What its name ends with: it is at the image's address with this appended.
pub const SUFFIX: &str = ".manifest";

const FIRST_LINE: &str = "keelson-image-manifest 1";

/// The checksums of an image's chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    bytes: u64,
    chunk_bytes: u64,
    chunks: Vec<[u8; 32]>,
}

impl Manifest {
    /// Of an image that is read to its end. `progress` is told how many bytes are done.
    pub fn of(
        image: &mut impl Read,
        chunk_bytes: u64,
        mut progress: impl FnMut(u64),
    ) -> io::Result<Self> {
        let size = usize::try_from(chunk_bytes).map_err(io::Error::other)?;
        let mut buffer = vec![0; size];
        let mut manifest = Self {
            bytes: 0,
            chunk_bytes,
            chunks: Vec::new(),
        };
        loop {
            let len = fill(image, &mut buffer)?;
            let part = buffer.get(..len).unwrap_or_default();
            if part.is_empty() {
                break;
            }
            manifest.bytes += len as u64;
            manifest.chunks.push(Sha256::digest(part).into());
            progress(manifest.bytes);
            if len < size {
                break;
            }
        }
        manifest.check().map_err(io::Error::other)?;
        Ok(manifest)
    }

    /// Reads the text. Says what is wrong with anything that [`to_text`](Self::to_text) can't have
    /// made.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let text = str::from_utf8(text).map_err(|_| "it is no text".to_owned())?;
        let mut lines = text.split_terminator('\n');
        if lines.next() != Some(FIRST_LINE) {
            return Err(format!("it doesn't start with \"{FIRST_LINE}\""));
        }
        let bytes = number(lines.next(), "bytes ")?;
        let chunk_bytes = number(lines.next(), "chunk ")?;
        let chunks = lines.enumerate().map(|(chunk, line)| {
            decode(line).ok_or_else(|| format!("line {} is no SHA-256", chunk + 4))
        });
        let manifest = Self {
            bytes,
            chunk_bytes,
            chunks: chunks.collect::<Result<_, _>>()?,
        };
        manifest.check()?;
        Ok(manifest)
    }

    /// The text.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "{FIRST_LINE}\nbytes {}\nchunk {}\n",
            self.bytes, self.chunk_bytes
        );
        for chunk in &self.chunks {
            text.push_str(&hex(chunk));
            text.push('\n');
        }
        text
    }

    /// The image's size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A chunk's size in bytes; the last one may be shorter.
    pub fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// Whether these bytes are the chunk's.
    pub fn matches(&self, chunk: u64, bytes: &[u8]) -> bool {
        self.digest(chunk) == Some(Sha256::digest(bytes).into())
    }

    /// Whether the chunk is `len` zeroes, so that it needs no fetching. `zeroes` is the digest of
    /// a whole chunk of them.
    pub fn is(&self, chunk: u64, digest: &[u8; 32]) -> bool {
        self.digest(chunk).as_ref() == Some(digest)
    }

    fn digest(&self, chunk: u64) -> Option<[u8; 32]> {
        self.chunks.get(usize::try_from(chunk).ok()?).copied()
    }

    fn check(&self) -> Result<(), String> {
        if !self.chunk_bytes.is_power_of_two() || !CHUNK_BYTES.contains(&self.chunk_bytes) {
            return Err("its chunks are no power of two from 64 KiB to 4 MiB".into());
        }
        if self.bytes == 0 {
            return Err("the image has no bytes".into());
        }
        let (has, needs) = (
            self.chunks.len() as u64,
            self.bytes.div_ceil(self.chunk_bytes),
        );
        if has != needs {
            return Err(format!("it has {has} checksums for {needs} chunks"));
        }
        Ok(())
    }
}

/// Lowercase hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// 32 bytes in lowercase hexadecimal digits.
pub fn decode(text: &str) -> Option<[u8; 32]> {
    let text: &[u8; 64] = text.as_bytes().try_into().ok()?;
    let mut bytes = [0; 32];
    for (byte, digits) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        for digit in digits {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return None,
            };
            *byte = *byte << 4 | value;
        }
    }
    Some(bytes)
}

/// SHA-256 of a manifest's text, by which an overlay pins it.
pub fn digest(text: &[u8]) -> [u8; 32] {
    Sha256::digest(text).into()
}

fn number(line: Option<&str>, field: &str) -> Result<u64, String> {
    let digits = line.and_then(|line| line.strip_prefix(field));
    let number = digits.and_then(|digits| digits.parse().ok());
    number.ok_or_else(|| format!("it has no line \"{field}N\" where it belongs"))
}

fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match source.read(rest) {
            Ok(0) => break,
            Ok(bytes) => done += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
