//! The storage engine's file in blocks with checksums: what is read is what was written, or an error.
//!
//! The file is a header and groups. A group is two blocks of checksums and the [`GROUP`] blocks that
//! they are of. A checksum is over the block, its number, and the file's own random number, so that a
//! block of another place or another file is told, too.
//!
//! Torn writes: the engine never overwrites a block that its last commit needs, but for its own
//! header, the first block. That one is in our header. Header and checksums are written when the
//! engine syncs, before the sync, each time into the slot that was not written the last time, so that
//! a write that is torn harms nothing that an earlier sync made durable: the slot of before is whole.
//! There, the checksums of blocks that the earlier commit needs are the same. The header's slots are
//! there twice, for one flipped bit in the newest must not bring back the one of before.

use std::io;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use redb::StorageBackend;

use crate::MemberError;
use crate::disk::{BLOCK, Disk, DiskFile};
use crate::error::Damage;

/// Format of the file. The first, without checksums, was never released.
const FORMAT: u64 = 2;
const MAGIC: &[u8; 8] = b"KEELENG\0";
/// What a file of the first format begins with.
const FIRST_FORMAT_MAGIC: &[u8; 4] = b"redb";
/// magic, format, nonce, number of the sync, length, groups, checksum
const HEADER: usize = 8 + 8 + 8 + 8 + 8 + 8 + 4;
/// Two slots, each twice.
const HEADER_BLOCKS: u64 = 4;
/// Blocks with checksums in one group.
const GROUP: u64 = 1000;
const GROUP_MAGIC: &[u8; 4] = b"KSUM";
/// magic, checksum, nonce, group, number of the sync
const GROUP_HEADER: usize = 4 + 4 + 8 + 8 + 8;
const BLOCK_BYTES: u64 = BLOCK as u64;

/// The file, as the engine sees it without header and checksums.
#[derive(Debug)]
pub(super) struct Blocks {
    file: Arc<dyn DiskFile>,
    name: String,
    nonce: u64,
    groups: RwLock<Vec<Arc<Group>>>,
    header: Mutex<Header>,
    length: AtomicU64,
    /// Held while a block and its checksum are changed.
    writing: Mutex<()>,
    damage: OnceLock<Damage>,
}

/// Checksums of [`GROUP`] blocks; 0 for a block that was never written and reads as zeros.
#[derive(Debug)]
struct Group {
    sums: Box<[AtomicU32]>,
    /// Whether they differ from those on disk.
    changed: AtomicBool,
    /// Number of the sync that wrote them; 0 if none did.
    sync: AtomicU64,
    /// Which of the two blocks has them.
    slot: AtomicU32,
}

#[derive(Debug)]
struct Header {
    /// Number of the last sync that wrote anything.
    sync: u64,
    /// Which of the slots has it: 0 or 1.
    slot: u64,
    /// What the engine has in its first block.
    first: Box<[u8]>,
    /// Groups that were written once.
    groups: u64,
}

impl Blocks {
    /// Opens a file, or makes a new one where there is none.
    pub(super) fn open(disk: &dyn Disk, name: &str) -> Result<Self, MemberError> {
        let what = || MemberError::disk(format!("open {name}"));
        let file = disk.open(name, true).map_err(what())?;
        let length = file.length().map_err(what())?;
        if length > 0 {
            return Self::load(file, name, length);
        }
        let blocks = Self {
            file,
            name: name.to_owned(),
            nonce: disk.file_number(),
            groups: RwLock::new(Vec::new()),
            header: Mutex::new(Header {
                sync: 0,
                slot: 1,
                first: vec![0; BLOCK - HEADER].into(),
                groups: 0,
            }),
            length: AtomicU64::new(0),
            writing: Mutex::new(()),
            damage: OnceLock::new(),
        };
        // Both slots, durably: from now on, one of them is whole.
        blocks.sync().map_err(what())?;
        blocks.sync().map_err(what())?;
        disk.sync()
            .map_err(MemberError::disk("sync the data folder"))?;
        Ok(blocks)
    }

    fn load(file: Arc<dyn DiskFile>, name: &str, length: u64) -> Result<Self, MemberError> {
        let what = || MemberError::disk(format!("read {name}"));
        let corrupt = |how: &str| MemberError::Corrupt(format!("{name} {how}"));
        let mut block = vec![0; BLOCK];
        let mut newest: Option<(u64, u64, Header)> = None;
        for slot in 0..HEADER_BLOCKS {
            if (slot + 1) * BLOCK_BYTES > length {
                break;
            }
            file.read_at(&mut block, slot * BLOCK_BYTES)
                .map_err(what())?;
            if slot == 0 && block.starts_with(FIRST_FORMAT_MAGIC) {
                return Err(MemberError::Older {
                    what: name.to_owned(),
                    found: 1,
                    known: FORMAT,
                });
            }
            let Some(mut found) = decode_header(&block, name)? else {
                continue;
            };
            found.2.slot = slot % 2;
            if newest
                .as_ref()
                .is_none_or(|(_, _, newest)| newest.sync < found.2.sync)
            {
                newest = Some(found);
            }
        }
        let (nonce, engine_length, mut header) = newest.ok_or_else(|| corrupt("has no header"))?;
        let mut groups = Vec::new();
        let mut slots = vec![0; 2 * BLOCK];
        for number in 0..header.groups {
            let start = group_start(number);
            if start + 2 * BLOCK_BYTES > length {
                return Err(corrupt("is cut off"));
            }
            file.read_at(&mut slots, start).map_err(what())?;
            let group = Group::decode(&slots, nonce, number).ok_or_else(|| {
                corrupt(&format!("has no checksums at {start}: they are damaged"))
            })?;
            // A sync that was broken off may have written it.
            header.sync = header.sync.max(group.sync.load(Ordering::Relaxed));
            groups.push(Arc::new(group));
        }
        // Others were added after the last sync, and hold nothing.
        while (groups.len() as u64) < group_count(engine_length) {
            groups.push(Arc::new(Group::new()));
        }
        Ok(Self {
            file,
            name: name.to_owned(),
            nonce,
            groups: RwLock::new(groups),
            header: Mutex::new(header),
            length: AtomicU64::new(engine_length),
            writing: Mutex::new(()),
            damage: OnceLock::new(),
        })
    }

    /// What was found damaged, if anything was.
    pub(super) fn damage(&self) -> Option<&Damage> {
        self.damage.get()
    }

    /// Size of the file in bytes.
    pub(super) fn size(&self) -> io::Result<u64> {
        self.file.length()
    }

    /// Reads up to `count` blocks from the one with number `from` on, to see whether they are what was
    /// written. Returns the next block's number, 0 after the last.
    pub(super) fn verify(&self, from: u64, count: u64) -> io::Result<u64> {
        let blocks = self.length.load(Ordering::Acquire).div_ceil(BLOCK_BYTES);
        let end = (from + count).min(blocks);
        let mut bytes = vec![0; BLOCK];
        for block in from.max(1)..end {
            // A block that is being written differs from its checksum for a moment.
            let _writing = self.writing.lock();
            if block * BLOCK_BYTES >= self.length.load(Ordering::Acquire) {
                break;
            }
            self.read_run(block, &mut bytes)?;
        }
        Ok(if end >= blocks { 0 } else { end })
    }

    fn group(&self, block: u64) -> io::Result<Arc<Group>> {
        let groups = self.groups.read();
        let at = usize::try_from(block / GROUP).unwrap_or(usize::MAX);
        groups
            .get(at)
            .cloned()
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Fills `bytes`, whole blocks of one group, from `block` on.
    fn read_run(&self, block: u64, bytes: &mut [u8]) -> io::Result<()> {
        let group = self.group(block)?;
        let sums = group.sums_from(block, bytes.len() / BLOCK);
        if sums.iter().all(|sum| sum.load(Ordering::Acquire) == 0) {
            bytes.fill(0);
            return Ok(());
        }
        match self.file.read_at(bytes, place(block)) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(self.damaged(block, "it is cut off"));
            }
            other => other?,
        }
        for (number, (bytes, sum)) in (block..).zip(bytes.chunks_exact_mut(BLOCK).zip(sums)) {
            match sum.load(Ordering::Acquire) {
                0 => bytes.fill(0),
                sum if sum == checksum(self.nonce, number, bytes) => {}
                _ => return Err(self.damaged(number, "it fails its checksum")),
            }
        }
        Ok(())
    }

    fn write_run(&self, block: u64, bytes: &[u8]) -> io::Result<()> {
        let group = self.group(block)?;
        let sums = group.sums_from(block, bytes.len() / BLOCK);
        let _writing = self.writing.lock();
        self.file.write_at(bytes, place(block))?;
        for (number, (bytes, sum)) in (block..).zip(bytes.chunks_exact(BLOCK).zip(sums)) {
            sum.store(checksum(self.nonce, number, bytes), Ordering::Release);
        }
        group.changed.store(true, Ordering::Release);
        Ok(())
    }

    fn damaged(&self, block: u64, how: &str) -> io::Error {
        let damage = Damage(format!(
            "block {block} of {} is damaged, at byte {}: {how}",
            self.name,
            place(block)
        ));
        let _ = self.damage.set(damage.clone());
        io::Error::other(damage)
    }

    /// Writes what changed of checksums and header into the slots of before, and syncs.
    fn sync(&self) -> io::Result<()> {
        let mut header = self.header.lock();
        let sync = header.sync + 1;
        let groups: Vec<_> = self.groups.read().iter().cloned().collect();
        for (number, group) in (0_u64..).zip(&groups) {
            let is_new = number >= header.groups;
            if !group.changed.swap(false, Ordering::AcqRel) && !is_new {
                continue;
            }
            let slot = u64::from(group.slot.load(Ordering::Relaxed) ^ 1);
            let bytes = group.encode(self.nonce, number, sync);
            self.file
                .write_at(&bytes, group_start(number) + slot * BLOCK_BYTES)?;
            group
                .slot
                .store(u32::try_from(slot).unwrap_or(0), Ordering::Relaxed);
            group.sync.store(sync, Ordering::Relaxed);
        }
        header.sync = sync;
        header.slot ^= 1;
        header.groups = groups.len() as u64;
        let length = self.length.load(Ordering::Acquire);
        let bytes = encode_header(&header, self.nonce, length);
        for copy in 0..2 {
            let slot = header.slot + 2 * copy;
            self.file.write_at(&bytes, slot * BLOCK_BYTES)?;
        }
        self.file.sync_data()?;
        // Only now may what was cut off go: until now, an older header counted on it.
        let wanted = file_length(length);
        if self.file.length()? > wanted {
            self.file.set_length(wanted)?;
        }
        Ok(())
    }

    /// Calls `run` with each part of a range that is within one group, or within one block if it is
    /// not whole blocks.
    fn parts(
        offset: u64,
        length: usize,
        mut run: impl FnMut(u64, usize, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let block = at / BLOCK_BYTES;
            let within = usize::try_from(at % BLOCK_BYTES).unwrap_or(0);
            let left = length - done;
            let count = if within > 0 || left < BLOCK || block == 0 {
                left.min(BLOCK - within)
            } else {
                let in_group = usize::try_from(GROUP - block % GROUP).unwrap_or(1);
                (left / BLOCK).min(in_group) * BLOCK
            };
            run(block, within, done..done + count)?;
            done += count;
        }
        Ok(())
    }
}

impl Group {
    fn new() -> Self {
        Self {
            sums: (0..GROUP).map(|_| AtomicU32::new(0)).collect(),
            changed: AtomicBool::new(false),
            sync: AtomicU64::new(0),
            slot: AtomicU32::new(0),
        }
    }

    fn sums_from(&self, block: u64, count: usize) -> &[AtomicU32] {
        let at = usize::try_from(block % GROUP).unwrap_or(0);
        &self.sums[at..at + count]
    }

    fn encode(&self, nonce: u64, number: u64, sync: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BLOCK);
        bytes.extend_from_slice(GROUP_MAGIC);
        bytes.extend_from_slice(&[0; 4]);
        for value in [nonce, number, sync] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        for sum in &self.sums {
            bytes.extend_from_slice(&sum.load(Ordering::Acquire).to_le_bytes());
        }
        bytes.resize(BLOCK, 0);
        let sum = crc32fast::hash(&bytes[8..]);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// The newer one of two slots.
    fn decode(slots: &[u8], nonce: u64, number: u64) -> Option<Self> {
        let mut newest: Option<Self> = None;
        for (slot, bytes) in (0_u32..).zip(slots.chunks_exact(BLOCK)) {
            if &bytes[..4] != GROUP_MAGIC
                || crc32fast::hash(&bytes[8..]).to_le_bytes() != bytes[4..8]
                || u64_at(bytes, 8) != nonce
                || u64_at(bytes, 16) != number
            {
                continue;
            }
            let sync = u64_at(bytes, 24);
            if newest
                .as_ref()
                .is_some_and(|newest| newest.sync.load(Ordering::Relaxed) > sync)
            {
                continue;
            }
            let sums = bytes[GROUP_HEADER..].chunks_exact(4).take(1000);
            newest = Some(Self {
                sums: sums
                    .map(|sum| AtomicU32::new(u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]])))
                    .collect(),
                changed: AtomicBool::new(false),
                sync: AtomicU64::new(sync),
                slot: AtomicU32::new(slot),
            });
        }
        newest
    }
}

/// Lets the engine use the blocks.
#[derive(Debug)]
pub(super) struct Backend(pub(super) Arc<Blocks>);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.length.load(Ordering::Acquire))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if offset + out.len() as u64 > self.0.length.load(Ordering::Acquire) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Blocks::parts(offset, out.len(), |block, within, part| {
            let out = &mut out[part];
            if block == 0 {
                let header = self.0.header.lock();
                for (at, byte) in out.iter_mut().enumerate() {
                    *byte = header.first.get(within + at).copied().unwrap_or(0);
                }
                return Ok(());
            }
            if out.len().is_multiple_of(BLOCK) {
                return self.0.read_run(block, out);
            }
            let mut bytes = vec![0; BLOCK];
            self.0.read_run(block, &mut bytes)?;
            out.copy_from_slice(&bytes[within..within + out.len()]);
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        Blocks::parts(offset, data.len(), |block, within, part| {
            let data = &data[part];
            if block == 0 {
                let mut header = self.0.header.lock();
                let place = header.first.get_mut(within..within + data.len());
                place
                    .ok_or(io::ErrorKind::InvalidInput)?
                    .copy_from_slice(data);
                return Ok(());
            }
            if data.len().is_multiple_of(BLOCK) {
                return self.0.write_run(block, data);
            }
            let mut bytes = vec![0; BLOCK];
            self.0.read_run(block, &mut bytes)?;
            bytes[within..within + data.len()].copy_from_slice(data);
            self.0.write_run(block, &bytes)
        })
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let blocks = &self.0;
        let _writing = blocks.writing.lock();
        let before = blocks.length.load(Ordering::Acquire);
        {
            let mut groups = blocks.groups.write();
            let count = usize::try_from(group_count(length)).unwrap_or(usize::MAX);
            while groups.len() < count {
                groups.push(Arc::new(Group::new()));
            }
            groups.truncate(count);
            // What is cut off reads as zeros if it comes back.
            let cut = length.div_ceil(BLOCK_BYTES)..before.div_ceil(BLOCK_BYTES);
            for block in cut {
                let at = usize::try_from(block / GROUP).unwrap_or(usize::MAX);
                if let Some(group) = groups.get(at) {
                    group.sums_from(block, 1)[0].store(0, Ordering::Release);
                    group.changed.store(true, Ordering::Release);
                }
            }
        }
        blocks.length.store(length, Ordering::Release);
        let wanted = file_length(length);
        if blocks.file.length()? < wanted {
            blocks.file.set_length(wanted)?;
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }
}

fn encode_header(header: &Header, nonce: u64, length: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK);
    bytes.extend_from_slice(MAGIC);
    for value in [FORMAT, nonce, header.sync, length, header.groups] {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&header.first);
    let sum = crc32fast::hash(&bytes);
    bytes[HEADER - 4..HEADER].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The file's random number, the engine's length, and the rest; `None` if the slot is not whole.
fn decode_header(block: &[u8], name: &str) -> Result<Option<(u64, u64, Header)>, MemberError> {
    if &block[..8] != MAGIC {
        return Ok(None);
    }
    let mut zeroed = block.to_vec();
    zeroed[HEADER - 4..HEADER].fill(0);
    if crc32fast::hash(&zeroed).to_le_bytes() != block[HEADER - 4..HEADER] {
        return Ok(None);
    }
    if u64_at(block, 8) > FORMAT {
        return Err(MemberError::Newer {
            what: name.to_owned(),
            found: u64_at(block, 8),
            known: FORMAT,
        });
    }
    let header = Header {
        sync: u64_at(block, 24),
        slot: 0,
        first: block[HEADER..].into(),
        groups: u64_at(block, 40),
    };
    Ok(Some((u64_at(block, 16), u64_at(block, 32), header)))
}

/// Where a group's checksums are.
fn group_start(number: u64) -> u64 {
    (HEADER_BLOCKS + number * (GROUP + 2)) * BLOCK_BYTES
}

/// Where a block is.
fn place(block: u64) -> u64 {
    group_start(block / GROUP) + (2 + block % GROUP) * BLOCK_BYTES
}

/// Groups for so many bytes of the engine.
fn group_count(length: u64) -> u64 {
    length.div_ceil(BLOCK_BYTES).div_ceil(GROUP)
}

/// Length of the file for so many bytes of the engine.
fn file_length(length: u64) -> u64 {
    match length.div_ceil(BLOCK_BYTES) {
        0 => HEADER_BLOCKS * BLOCK_BYTES,
        blocks => place(blocks - 1) + BLOCK_BYTES,
    }
}

/// Never 0: that is a block which was never written.
///
/// CRC-32C: records hold a CRC-32 of themselves, so that by the same polynomial, a block would have
/// the checksum of each other one whose records are as long.
fn checksum(nonce: u64, block: u64, bytes: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&nonce.to_le_bytes());
    let sum = crc32c::crc32c_append(sum, &block.to_le_bytes());
    crc32c::crc32c_append(sum, bytes).max(1)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}
