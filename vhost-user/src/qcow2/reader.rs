//! The clusters of a qcow2 image.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use super::header::{HEADER_BYTES, damaged};
use super::{Compression, Qcow2Error, Qcow2Header};

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ALL_ZERO: u64 = 1;
/// Entries of the first table that are read at once.
const L1_PIECE: u64 = 4096;

/// Where an image is read from.
pub trait ReadAt {
    /// Fills the buffer, or fails.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Bytes in all.
    fn size(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for &[u8] {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(buffer.len());
        let part = self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(part);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// What a cluster of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Zeroes.
    Zero,
    /// In the buffer now.
    Data,
}

/// An open image.
#[derive(Debug)]
pub struct Qcow2Image<R> {
    source: R,
    length: u64,
    header: Qcow2Header,
    /// A piece of the first table: its first entry, and the entries.
    l1: (u64, Vec<u64>),
    /// A table of the second level: which one, and its entries.
    l2: (u64, Vec<u64>),
    compressed: Vec<u8>,
}

impl<R: ReadAt> Qcow2Image<R> {
    /// Reads the header.
    pub fn open(source: R) -> Result<Self, Qcow2Error> {
        let length = source.size().map_err(failed)?;
        let mut start = [0; HEADER_BYTES];
        let present = usize::try_from(length)
            .unwrap_or(HEADER_BYTES)
            .min(HEADER_BYTES);
        let part = start.get_mut(..present).unwrap_or_default();
        source.read_exact_at(part, 0).map_err(failed)?;
        let header = Qcow2Header::parse(&start)?;
        let image = Self {
            source,
            length,
            header,
            l1: (0, Vec::new()),
            l2: (u64::MAX, Vec::new()),
            compressed: Vec::new(),
        };
        if let Some((offset, bytes)) = image.header.backing_name {
            let mut name = vec![0; bytes as usize];
            image.read(&mut name, offset, "its backing file's name")?;
            return Err(Qcow2Error::BackingFile(
                String::from_utf8_lossy(&name).into_owned(),
            ));
        }
        Ok(image)
    }

    /// The header.
    pub fn header(&self) -> &Qcow2Header {
        &self.header
    }

    /// Reads a cluster of the disk into a buffer of a cluster's size.
    pub fn read_cluster(&mut self, index: u64, buffer: &mut [u8]) -> Result<Cluster, Qcow2Error> {
        let entry = self.l2_entry(index)?;
        if entry & COMPRESSED != 0 {
            self.read_compressed(entry, buffer, index)?;
            return Ok(Cluster::Data);
        }
        let offset = entry & OFFSET_MASK;
        if offset == 0 || self.header.version >= 3 && entry & ALL_ZERO != 0 {
            return Ok(Cluster::Zero);
        }
        if !offset.is_multiple_of(self.header.cluster_bytes()) {
            return Err(Qcow2Error::Damaged(format!(
                "cluster {index} isn't at a cluster's start"
            )));
        }
        // The last cluster may be cut off at the file's end.
        let present = self.length.saturating_sub(offset);
        let present = usize::try_from(present).unwrap_or(usize::MAX);
        let (data, rest) = buffer.split_at_mut(present.min(buffer.len()));
        if data.is_empty() {
            return Err(Qcow2Error::Damaged(format!(
                "cluster {index} lies behind the file's end"
            )));
        }
        self.source.read_exact_at(data, offset).map_err(failed)?;
        rest.fill(0);
        Ok(Cluster::Data)
    }

    fn l2_entry(&mut self, index: u64) -> Result<u64, Qcow2Error> {
        if index >= self.header.clusters() {
            return Err(damaged("it has fewer clusters"));
        }
        let table = index / self.header.l2_entries();
        if self.l2.0 != table {
            let entries = match self.l1_entry(table)? & OFFSET_MASK {
                0 => Vec::new(),
                offset if !offset.is_multiple_of(self.header.cluster_bytes()) => {
                    return Err(damaged("a second table isn't at a cluster's start"));
                }
                offset => self.read_entries(offset, self.header.l2_entries(), "a second table")?,
            };
            self.l2 = (table, entries);
        }
        let place = usize::try_from(index % self.header.l2_entries()).unwrap_or(usize::MAX);
        Ok(self.l2.1.get(place).copied().unwrap_or(0))
    }

    fn l1_entry(&mut self, table: u64) -> Result<u64, Qcow2Error> {
        let first = table - table % L1_PIECE;
        if self.l1.0 != first || self.l1.1.is_empty() {
            let entries = u64::from(self.header.l1_entries)
                .saturating_sub(first)
                .min(L1_PIECE);
            let offset = self.header.l1_offset + first * 8;
            self.l1 = (
                first,
                self.read_entries(offset, entries, "its first table")?,
            );
        }
        let place = usize::try_from(table - first).unwrap_or(usize::MAX);
        let entry = self.l1.1.get(place);
        entry
            .copied()
            .ok_or_else(|| damaged("its first table is too short"))
    }

    fn read_entries(&self, offset: u64, count: u64, what: &str) -> Result<Vec<u64>, Qcow2Error> {
        // At most a cluster of 2 MiB, or a piece of the first table.
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or(0)];
        self.read(&mut bytes, offset, what)?;
        let entries = bytes.chunks_exact(8);
        Ok(entries
            .map(|entry| u64::from_be_bytes(entry.try_into().unwrap_or_default()))
            .collect())
    }

    fn read(&self, bytes: &mut [u8], offset: u64, what: &str) -> Result<(), Qcow2Error> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.length) {
            return Err(Qcow2Error::Damaged(format!(
                "{what} reaches behind the file's end"
            )));
        }
        self.source.read_exact_at(bytes, offset).map_err(failed)
    }

    fn read_compressed(
        &mut self,
        entry: u64,
        buffer: &mut [u8],
        index: u64,
    ) -> Result<(), Qcow2Error> {
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        let bytes = (sectors + 1) * 512 - offset % 512;
        // The last sector may be cut off at the file's end.
        let bytes = bytes.min(self.length.saturating_sub(offset));
        let mut compressed = std::mem::take(&mut self.compressed);
        compressed.resize(usize::try_from(bytes).unwrap_or(0), 0);
        self.read(&mut compressed, offset, "a compressed cluster")?;
        let done = match self.header.compression {
            Compression::Deflate => {
                flate2::read::DeflateDecoder::new(&compressed[..]).read_exact(buffer)
            }
            Compression::Zstd => ruzstd::decoding::StreamingDecoder::new(&compressed[..])
                .map_err(io::Error::other)
                .and_then(|mut decoder| decoder.read_exact(buffer)),
        };
        self.compressed = compressed;
        done.map_err(|error| {
            Qcow2Error::Damaged(format!("cluster {index} can't be decompressed: {error}"))
        })
    }
}

fn failed(source: io::Error) -> Qcow2Error {
    Qcow2Error::Io {
        action: "read it",
        source,
    }
}
