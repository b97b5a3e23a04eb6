//! What a migration sends: a preamble, then frames.
//!
//! ```text
//! preamble              frame
//!  0   8  "KEELMIGR"     0   1  kind
//!  8   4  version        1   1  0: as it is, 1: compressed (an LZ4 block)
//! 12   4  architecture   2   2  zero
//!                        4   4  bytes of the body as it is
//!                        8   4  bytes of the body as sent
//!                       12   4  number of the frame, from 0
//!                       16   8  first page
//!                       24   4  CRC-32 of the body as it is
//!                       28   4  CRC-32 of the bytes before this one
//!                       32      the body
//! ```
//!
//! Numbers are little-endian; pages of 4 KiB are numbered as in a snapshot's memory file; the
//! architecture is an ELF machine number. Both sides send the preamble. The version changes with each
//! change of the frames or of the state.

use std::io::{self, Read, Write};

use crate::snapshot::format::{ARCHITECTURE, MAX_BODY_BYTES};
use crate::snapshot::{FormatError, PageRange};

const MAGIC: [u8; 8] = *b"KEELMIGR";
/// The version that this program speaks.
pub const VERSION: u32 = 1;
const PREAMBLE_BYTES: usize = 16;
const HEADER_BYTES: usize = 32;
const PAGE_BYTES: u32 = 4096;
/// The most bytes of memory in one frame.
pub const MAX_PAGES_BYTES: usize = 256 << 10;
/// The longest message of a side that failed.
const MAX_MESSAGE_BYTES: usize = 4096;
const HELLO: u8 = 1;
const READY: u8 = 2;
const PAGES: u8 = 3;
const ZEROS: u8 = 4;
const STATE: u8 = 5;
const LOADED: u8 = 6;
const FAILED: u8 = 7;

/// Why a stream can't go on.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It is something else.
    #[error("it is no migration of keelson-vmm: the signature is missing")]
    NotAMigration,
    /// The other side speaks another version.
    #[error(
        "the other side speaks version {found}, and this one version {VERSION}: both hosts need the \
         same version of keelson-vmm"
    )]
    Version {
        /// The other side's version.
        found: u32,
    },
    /// The other side is another machine.
    #[error("the other side is of another architecture (ELF machine {found})")]
    Architecture {
        /// The other side's architecture.
        found: u32,
    },
    /// It ended before it was complete.
    #[error("it was cut off")]
    Cut,
    /// A checksum is wrong, or what it is of can't be decompressed.
    #[error("it is corrupt: the checksum of a frame's {0} is wrong")]
    Checksum(&'static str),
    /// A frame makes no sense.
    #[error("it is not valid: {0}")]
    Invalid(String),
    /// The state is not valid.
    #[error("the guest's state: {0}")]
    State(#[from] FormatError),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for StreamError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => Self::Cut,
            _ => Self::Io(error),
        }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The source's first: what guest it is.
    Hello(Vec<u8>),
    /// The destination can take it.
    Ready,
    /// Contents of pages: a multiple of 4 KiB, at most [`MAX_PAGES_BYTES`].
    Pages {
        /// The first page.
        first: u64,
        /// Their bytes.
        bytes: Vec<u8>,
    },
    /// Pages that are zero.
    Zeros(PageRange),
    /// The source's last: all but the memory.
    State(Vec<u8>),
    /// The destination has built the guest, and could let it run.
    Loaded,
    /// The side that sends it can't go on.
    Failed(String),
}

impl Frame {
    /// What it is, for messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "a greeting",
            Self::Ready => "the word that the other side is ready",
            Self::Pages { .. } | Self::Zeros(_) => "memory",
            Self::State(_) => "the guest's state",
            Self::Loaded => "the word that the guest is there",
            Self::Failed(_) => "an error",
        }
    }
}

/// The sending half of a connection.
#[derive(Debug)]
pub struct Sender<W> {
    writer: W,
    number: u32,
    buffer: Vec<u8>,
    sent: u64,
}

impl<W: Write> Sender<W> {
    /// Sends the preamble.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn start(mut writer: W) -> Result<Self, StreamError> {
        let mut preamble = Vec::with_capacity(PREAMBLE_BYTES);
        preamble.extend_from_slice(&MAGIC);
        preamble.extend_from_slice(&VERSION.to_le_bytes());
        preamble.extend_from_slice(&ARCHITECTURE.to_le_bytes());
        writer.write_all(&preamble)?;
        Ok(Self {
            writer,
            number: 0,
            buffer: Vec::new(),
            sent: PREAMBLE_BYTES as u64,
        })
    }

    /// Bytes that were sent so far.
    pub const fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// If it is too large, or the connection fails.
    pub fn send(&mut self, frame: &Frame) -> Result<(), StreamError> {
        match frame {
            Frame::Hello(bytes) => self.write(HELLO, 0, bytes),
            Frame::Ready => self.write(READY, 0, &[]),
            Frame::Pages { first, bytes } => self.pages(*first, bytes),
            Frame::Zeros(pages) => self.write(ZEROS, pages.first, &pages.count.to_le_bytes()),
            Frame::State(bytes) => self.write(STATE, 0, bytes),
            Frame::Loaded => self.write(LOADED, 0, &[]),
            Frame::Failed(message) => {
                let end = message.floor_char_boundary(MAX_MESSAGE_BYTES);
                self.write(FAILED, 0, &message.as_bytes()[..end])
            }
        }
    }

    /// Sends pages, as [`Frame::Pages`], without a copy of them.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn pages(&mut self, first: u64, bytes: &[u8]) -> Result<(), StreamError> {
        self.write(PAGES, first, bytes)
    }

    fn write(&mut self, kind: u8, first: u64, body: &[u8]) -> Result<(), StreamError> {
        let plain = length_of(body)?;
        if body.len() > limit(kind).unwrap_or(0) {
            return Err(StreamError::Invalid(format!("a frame of {plain} bytes")));
        }
        let buffer = &mut self.buffer;
        buffer.clear();
        buffer.resize(
            HEADER_BYTES + lz4_flex::block::get_maximum_output_size(body.len()),
            0,
        );
        let packed = lz4_flex::block::compress_into(body, &mut buffer[HEADER_BYTES..])
            .ok()
            .filter(|packed| *packed < body.len());
        if let Some(packed) = packed {
            buffer.truncate(HEADER_BYTES + packed);
        } else {
            buffer.truncate(HEADER_BYTES);
            buffer.extend_from_slice(body);
        }
        let sent = length_of(&buffer[HEADER_BYTES..])?;
        let header = Header {
            kind,
            packed: packed.is_some(),
            plain,
            sent,
            number: self.number,
            first,
            checksum: crc32fast::hash(body),
        };
        buffer[..HEADER_BYTES].copy_from_slice(&header.encode());
        self.writer.write_all(buffer)?;
        self.writer.flush()?;
        self.sent += buffer.len() as u64;
        self.number = self.number.wrapping_add(1);
        Ok(())
    }
}

/// The receiving half of a connection.
#[derive(Debug)]
pub struct Receiver<R> {
    reader: R,
    number: u32,
    packed: Vec<u8>,
}

impl<R: Read> Receiver<R> {
    /// Receives the preamble.
    ///
    /// # Errors
    /// If there is none, or one of another version or architecture.
    pub fn start(mut reader: R) -> Result<Self, StreamError> {
        let mut preamble = [0; PREAMBLE_BYTES];
        reader.read_exact(&mut preamble)?;
        if preamble[..8] != MAGIC {
            return Err(StreamError::NotAMigration);
        }
        let architecture = word(&preamble, 12);
        if architecture != ARCHITECTURE {
            return Err(StreamError::Architecture {
                found: architecture,
            });
        }
        let version = word(&preamble, 8);
        if version != VERSION {
            return Err(StreamError::Version { found: version });
        }
        Ok(Self {
            reader,
            number: 0,
            packed: Vec::new(),
        })
    }

    /// Receives a frame.
    ///
    /// # Errors
    /// If the stream ends or a frame is not whole and valid.
    pub fn receive(&mut self) -> Result<Frame, StreamError> {
        let mut header = [0; HEADER_BYTES];
        self.reader.read_exact(&mut header)?;
        let header = Header::decode(&header)?;
        if header.number != self.number {
            return Err(StreamError::Invalid(format!(
                "frame {} came in the place of frame {}",
                header.number, self.number
            )));
        }
        self.number = self.number.wrapping_add(1);
        let body = self.body(&header)?;
        if crc32fast::hash(&body) != header.checksum {
            return Err(StreamError::Checksum("body"));
        }
        frame(&header, body)
    }

    fn body(&mut self, header: &Header) -> Result<Vec<u8>, StreamError> {
        let (plain, sent) = (usize_of(header.plain), usize_of(header.sent));
        // Limited by kind before anything is allocated; a compressed body is never longer.
        let allowed = limit(header.kind)
            .ok_or_else(|| StreamError::Invalid(format!("a frame of kind {}", header.kind)))?;
        let fits = if header.packed {
            sent < plain
        } else {
            sent == plain
        };
        if plain > allowed || !fits {
            return Err(StreamError::Invalid(format!(
                "a frame of kind {} with {plain} bytes in {sent}",
                header.kind
            )));
        }
        if !header.packed {
            return self.read(sent);
        }
        let packed = self.read(sent)?;
        let mut body = vec![0; plain];
        let found = lz4_flex::block::decompress_into(&packed, &mut body)
            .map_err(|_| StreamError::Checksum("body"))?;
        self.packed = packed;
        if found != plain {
            return Err(StreamError::Checksum("body"));
        }
        Ok(body)
    }

    /// What comes is taken in as it comes: a length alone allocates little.
    fn read(&mut self, length: usize) -> Result<Vec<u8>, StreamError> {
        let mut bytes = std::mem::take(&mut self.packed);
        bytes.clear();
        let wanted = length as u64;
        let found = self.reader.by_ref().take(wanted).read_to_end(&mut bytes)?;
        if found != length {
            return Err(StreamError::Cut);
        }
        Ok(bytes)
    }
}

struct Header {
    kind: u8,
    packed: bool,
    plain: u32,
    sent: u32,
    number: u32,
    first: u64,
    checksum: u32,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind;
        bytes[1] = u8::from(self.packed);
        bytes[4..8].copy_from_slice(&self.plain.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.sent.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.first.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.checksum.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..28]);
        bytes[28..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, StreamError> {
        if crc32fast::hash(&bytes[..28]) != word(bytes, 28) {
            return Err(StreamError::Checksum("header"));
        }
        if bytes[1] > 1 || bytes[2..4] != [0, 0] {
            return Err(StreamError::Invalid("a frame has unknown flags".to_owned()));
        }
        Ok(Self {
            kind: bytes[0],
            packed: bytes[1] == 1,
            plain: word(bytes, 4),
            sent: word(bytes, 8),
            number: word(bytes, 12),
            first: u64::from(word(bytes, 16)) | u64::from(word(bytes, 20)) << 32,
            checksum: word(bytes, 24),
        })
    }
}

/// The most bytes that a frame of this kind may have; `None` for a kind that there isn't.
fn limit(kind: u8) -> Option<usize> {
    match kind {
        HELLO | STATE => usize::try_from(MAX_BODY_BYTES).ok(),
        READY | LOADED => Some(0),
        PAGES => Some(MAX_PAGES_BYTES),
        ZEROS => Some(8),
        FAILED => Some(MAX_MESSAGE_BYTES),
        _ => None,
    }
}

fn frame(header: &Header, body: Vec<u8>) -> Result<Frame, StreamError> {
    let invalid = |what: &str| StreamError::Invalid(what.to_owned());
    Ok(match header.kind {
        HELLO => Frame::Hello(body),
        READY => Frame::Ready,
        PAGES => {
            if body.is_empty() || !header.plain.is_multiple_of(PAGE_BYTES) {
                return Err(invalid("a frame with half a page"));
            }
            Frame::Pages {
                first: header.first,
                bytes: body,
            }
        }
        ZEROS => {
            let count =
                <[u8; 8]>::try_from(body).map_err(|_| invalid("a frame without a count"))?;
            Frame::Zeros(PageRange {
                first: header.first,
                count: u64::from_le_bytes(count),
            })
        }
        STATE => Frame::State(body),
        LOADED => Frame::Loaded,
        FAILED => Frame::Failed(String::from_utf8_lossy(&body).into_owned()),
        kind => return Err(invalid(&format!("a frame of kind {kind}"))),
    })
}

fn length_of(bytes: &[u8]) -> Result<u32, StreamError> {
    u32::try_from(bytes.len())
        .map_err(|_| StreamError::Invalid(format!("a frame of {} bytes", bytes.len())))
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    bytes[offset..offset + 4]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn usize_of(bytes: u32) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
