//! Snapshots: the whole keyspace at one log index, as a stream of chunks with checksums. What
//! members that are too far behind are sent, and what a backup is.
//!
//! A chunk is: length of its body (u32), CRC-32 of its number (u64) and body (u32), body. All
//! numbers are little-endian. Bodies begin with their kind: the first is the header (magic, format,
//! metadata), then come records (table, length of key, length of value, key, value; repeated), and
//! the end, which counts them.

use std::sync::Arc;

use super::engine::{Engine, Loaded, adopt};
use super::metadata::Metadata;
use super::records::{RecordReader, Table};
use crate::MemberError;
use crate::disk::Disk;
use crate::planted::{PlantedBug, is_planted};

const MAGIC: &[u8; 8] = b"KEELSNAP";
const FORMAT: u64 = 1;
/// length, checksum
const CHUNK_HEADER: usize = 4 + 4;
/// Largest body that is taken: one record of the largest request.
const MAX_CHUNK_BYTES: usize = 64 * 1024 * 1024;
/// table, length of key, length of value
const RECORD_HEADER: usize = 1 + 4 + 4;
const KIND_HEADER: u8 = 1;
const KIND_RECORDS: u8 = 2;
const KIND_END: u8 = 3;
/// Bytes of records that go into one transaction of the engine.
const LOAD_BYTES: usize = 16 * 1024 * 1024;
/// Cache of the engine while it is loaded: records come in order.
const LOAD_CACHE_BYTES: usize = 4 * 1024 * 1024;
/// Files of snapshots that are being received begin with this.
const INCOMING: &str = "incoming-";

/// Reads what was last flushed, chunk after chunk, while the keyspace goes on.
pub struct SnapshotReader {
    metadata: Metadata,
    records: RecordReader,
    chunks: u64,
    count: u64,
    ended: bool,
    /// Bodies grow to this before the next one begins.
    chunk_bytes: usize,
}

impl SnapshotReader {
    pub(super) fn new(engine: &Engine, chunk_bytes: usize) -> Result<Self, MemberError> {
        let (metadata, records) = engine.records()?;
        Ok(Self {
            metadata,
            records,
            chunks: 0,
            count: 0,
            ended: false,
            chunk_bytes,
        })
    }

    /// The state beside keys and leases, and the log index that it is of.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The next chunk; `None` after the last.
    pub fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, MemberError> {
        if self.ended {
            return Ok(None);
        }
        let mut chunk = vec![0; CHUNK_HEADER];
        if self.chunks == 0 {
            chunk.push(KIND_HEADER);
            chunk.extend_from_slice(MAGIC);
            chunk.extend_from_slice(&FORMAT.to_le_bytes());
            chunk.extend_from_slice(&self.metadata.encode());
        } else {
            chunk.push(KIND_RECORDS);
            while chunk.len() < self.chunk_bytes {
                let Some((table, key, value)) = self.records.next()? else {
                    break;
                };
                chunk.push(table as u8);
                for part in [&key, &value] {
                    let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
                    chunk.extend_from_slice(&length.to_le_bytes());
                }
                chunk.extend_from_slice(&key);
                chunk.extend_from_slice(&value);
                self.count += 1;
            }
            if chunk.len() == CHUNK_HEADER + 1 {
                self.ended = true;
                chunk[CHUNK_HEADER] = KIND_END;
                chunk.extend_from_slice(&self.count.to_le_bytes());
            }
        }
        let length = u32::try_from(chunk.len() - CHUNK_HEADER).unwrap_or(u32::MAX);
        let sum = checksum(self.chunks, &chunk[CHUNK_HEADER..]);
        chunk[0..4].copy_from_slice(&length.to_le_bytes());
        chunk[4..8].copy_from_slice(&sum.to_le_bytes());
        self.chunks += 1;
        Ok(Some(chunk))
    }
}

/// A snapshot that was received whole, loaded into an engine of its own.
pub struct StagedSnapshot {
    pub(super) name: String,
    pub(super) engine: Engine,
    pub(super) loaded: Loaded,
}

impl StagedSnapshot {
    /// The state beside keys and leases, and the log index that it is of.
    pub fn metadata(&self) -> &Metadata {
        &self.loaded.metadata
    }

    /// Removes its file.
    pub fn discard(self, disk: &dyn Disk) -> Result<(), MemberError> {
        let name = self.name.clone();
        drop(self);
        disk.remove(&name)
            .map_err(MemberError::disk(format!("remove {name}")))
    }

    /// Makes it the keyspace of a data folder that has none, with other metadata: a restored
    /// backup begins a new cluster.
    pub fn restore(self, disk: &dyn Disk, metadata: &Metadata) -> Result<(), MemberError> {
        self.engine.replace_metadata(metadata)?;
        adopt(disk, &self.name)
    }
}

/// Takes chunks and loads them into an engine of their own.
pub struct SnapshotWriter {
    disk: Arc<dyn Disk>,
    name: String,
    engine: Engine,
    /// Bytes of a chunk that is not whole yet.
    partial: Vec<u8>,
    metadata: Option<Metadata>,
    records: Vec<(Table, Vec<u8>, Vec<u8>)>,
    record_bytes: usize,
    chunks: u64,
    count: u64,
    ended: bool,
}

impl SnapshotWriter {
    /// Begins; `number` tells its file from that of another snapshot.
    pub fn new(disk: Arc<dyn Disk>, number: u64) -> Result<Self, MemberError> {
        let name = format!("{INCOMING}{number:016x}");
        // What an older attempt left would be added to.
        match disk.remove(&name) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(MemberError::disk(format!("remove {name}"))(error));
            }
            _ => {}
        }
        let engine = Engine::open_named(&*disk, &name, LOAD_CACHE_BYTES)?;
        Ok(Self {
            disk,
            name,
            engine,
            partial: Vec::new(),
            metadata: None,
            records: Vec::new(),
            record_bytes: 0,
            chunks: 0,
            count: 0,
            ended: false,
        })
    }

    /// Takes bytes of the stream, however they were cut. After the end, there may be zeros.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), MemberError> {
        self.partial.extend_from_slice(bytes);
        let mut at = 0;
        while !self.ended {
            let Some(header) = self.partial.get(at..at + CHUNK_HEADER) else {
                break;
            };
            let number = |at: usize| {
                u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
            };
            let (length, sum) = (number(0) as usize, number(4));
            if length > MAX_CHUNK_BYTES {
                return Err(damaged("a chunk is too long"));
            }
            let start = at + CHUNK_HEADER;
            if self.partial.len() < start + length {
                break;
            }
            let body = self.partial[start..start + length].to_vec();
            if checksum(self.chunks, &body) != sum {
                return Err(damaged(&format!(
                    "chunk {} fails its checksum",
                    self.chunks
                )));
            }
            self.take_chunk(&body)?;
            self.chunks += 1;
            at = start + length;
        }
        self.partial.drain(..at);
        if self.ended {
            if self.partial.iter().any(|byte| *byte != 0) {
                return Err(damaged("something follows its end"));
            }
            self.partial.clear();
        }
        Ok(())
    }

    /// Ends: everything is durable. If it can't be used, its file is removed.
    pub fn finish(mut self) -> Result<StagedSnapshot, MemberError> {
        match self.end() {
            Ok(loaded) => Ok(StagedSnapshot {
                name: self.name,
                engine: self.engine,
                loaded,
            }),
            Err(error) => {
                self.discard()?;
                Err(error)
            }
        }
    }

    fn end(&mut self) -> Result<Loaded, MemberError> {
        let metadata = match &self.metadata {
            Some(metadata) if self.ended => metadata.clone(),
            _ => return Err(damaged("it is cut off")),
        };
        if is_planted(PlantedBug::SnapshotWithoutLastRecord)
            && let Some(last) = self
                .records
                .iter()
                .rposition(|(table, ..)| *table == Table::Records)
        {
            self.records.remove(last);
        }
        self.load()?;
        self.engine.replace_metadata(&metadata)?;
        self.engine
            .load()?
            .ok_or_else(|| damaged("it has no metadata"))
    }

    /// Gives up, and removes its file.
    pub fn discard(self) -> Result<(), MemberError> {
        let (disk, name) = (self.disk, self.name);
        drop(self.engine);
        disk.remove(&name)
            .map_err(MemberError::disk(format!("remove {name}")))
    }

    fn take_chunk(&mut self, body: &[u8]) -> Result<(), MemberError> {
        match (body.split_first(), &self.metadata) {
            (Some((&KIND_HEADER, rest)), None) => {
                let rest = rest
                    .strip_prefix(MAGIC)
                    .ok_or_else(|| damaged("it is something else"))?;
                let (format, metadata) = rest
                    .split_first_chunk::<8>()
                    .ok_or_else(|| damaged("its header is cut off"))?;
                let format = u64::from_le_bytes(*format);
                if format > FORMAT {
                    return Err(MemberError::Newer {
                        what: "the snapshot".into(),
                        found: format,
                        known: FORMAT,
                    });
                }
                self.metadata = Some(Metadata::decode(metadata)?);
                Ok(())
            }
            (Some((&KIND_RECORDS, rest)), Some(_)) => self.take_records(rest),
            (Some((&KIND_END, rest)), Some(_)) => {
                if rest != self.count.to_le_bytes() {
                    return Err(damaged("records are missing"));
                }
                self.ended = true;
                Ok(())
            }
            _ => Err(damaged("it is something else")),
        }
    }

    fn take_records(&mut self, mut bytes: &[u8]) -> Result<(), MemberError> {
        while !bytes.is_empty() {
            let cut = || damaged("a record is cut off");
            let (header, rest) = bytes.split_first_chunk::<RECORD_HEADER>().ok_or_else(cut)?;
            let table =
                Table::from_number(header[0]).ok_or_else(|| damaged("a table is unknown"))?;
            let length = |at: usize| {
                u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
                    as usize
            };
            let (key, rest) = rest.split_at_checked(length(1)).ok_or_else(cut)?;
            let (value, rest) = rest.split_at_checked(length(5)).ok_or_else(cut)?;
            self.record_bytes += key.len() + value.len() + RECORD_HEADER;
            self.records.push((table, key.to_vec(), value.to_vec()));
            self.count += 1;
            bytes = rest;
        }
        if self.record_bytes >= LOAD_BYTES {
            self.load()?;
        }
        Ok(())
    }

    fn load(&mut self) -> Result<(), MemberError> {
        self.record_bytes = 0;
        self.engine.load_records(std::mem::take(&mut self.records))
    }
}

/// Removes what was being received when the member ended.
pub(crate) fn remove_incoming(disk: &dyn Disk) -> Result<(), MemberError> {
    let names = disk
        .list()
        .map_err(MemberError::disk("list the data folder"))?;
    for name in names.iter().filter(|name| name.starts_with(INCOMING)) {
        disk.remove(name)
            .map_err(MemberError::disk(format!("remove {name}")))?;
    }
    Ok(())
}

fn checksum(number: u64, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

fn damaged(how: &str) -> MemberError {
    MemberError::DamagedSnapshot(how.to_owned())
}

impl std::fmt::Debug for SnapshotReader {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("SnapshotReader")
            .field("index", &self.metadata.applied_index)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for SnapshotWriter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("SnapshotWriter")
            .field("name", &self.name)
            .field("chunks", &self.chunks)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for StagedSnapshot {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("StagedSnapshot")
            .field("name", &self.name)
            .field("index", &self.loaded.metadata.applied_index)
            .finish_non_exhaustive()
    }
}
