//! The storage engine's file in blocks with checksums: what is read is what was written, or an error.
//!
//! The file is a header and groups. A group is two blocks of checksums and the [`GROUP`] blocks that
//! they are of. A checksum is over the block, its number, and the file's own random number, so that a
//! block of another place or another file is told, too.
//!
//! Torn writes: the engine never overwrites a block that its last commit needs, but for its own
//! header, the first block. That one is in our header. Header and checksums are written each time into
//! the slot that was not written the last time, so that a write that is torn harms nothing that an
//! earlier sync made durable. The header's slots are there twice, for one flipped bit in the newest
//! must not bring back the one of before.
//!
//! A block that was being written when the power went may be torn, and is no damage: nothing that was
//! committed refers to it. So that such a block is told from one that is damaged, it is marked in the
//! checksums, durably, before anything is written to it. A sync is
//!
//! 1. the checksums, with marks instead of those of blocks that will be written,
//! 2. the blocks, then the checksums with theirs,
//! 3. the header,
//!
//! each made durable before the next. The header's number says which of a group's slots counts: marks
//! do as long as there is no later header, checksums as soon as there is one of their number. So one
//! slot counts at a time: if it is damaged, that is told, and nothing older is taken for it.

mod backend;
mod group;
mod header;
mod layout;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};

pub(super) use self::backend::Backend;
use self::group::{BEING_WRITTEN, Group, NEVER_WRITTEN, checksum};
use self::header::{FORMAT, Header};
use self::layout::{
    BLOCK_BYTES, GROUP, HEADER_BLOCKS, file_length, group_count, group_start, place,
};
use crate::MemberError;
use crate::disk::{BLOCK, Disk, DiskFile};
use crate::error::Damage;

/// What a file of the first format begins with.
const FIRST_FORMAT_MAGIC: &[u8; 4] = b"redb";
/// Blocks that wait in memory for their marks: 4 MiB.
const QUEUED_BLOCKS: usize = 1024;
/// Bytes that are written at once.
const RUN_BYTES: usize = 256 * 1024;

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
    unsynced: Mutex<Unsynced>,
    /// Blocks that are still to be written to the file: only who holds `unsynced` changes them.
    queue: RwLock<BTreeMap<u64, Box<[u8]>>>,
    damage: OnceLock<Damage>,
}

/// What was changed since the last sync.
#[derive(Debug, Default)]
struct Unsynced {
    /// Blocks that were written, and whether they had other contents at that time.
    blocks: BTreeMap<u64, bool>,
    /// Groups with marks.
    marked: BTreeSet<u64>,
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
            header: Mutex::new(Header::new()),
            length: AtomicU64::new(0),
            unsynced: Mutex::default(),
            queue: RwLock::default(),
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
        let header::Found {
            nonce,
            length: engine_length,
            mut header,
        } = newest_header(&*file, name, length)?;
        let mut groups = Vec::new();
        let mut slots = vec![0; 2 * BLOCK];
        let written = header.sync;
        for number in 0..header.groups {
            let start = group_start(number);
            if start + 2 * BLOCK_BYTES > length {
                return Err(corrupt("is cut off"));
            }
            file.read_at(&mut slots, start).map_err(what())?;
            let found = Group::decode(&slots, nonce, number, written).ok_or_else(|| {
                corrupt(&format!("has no checksums at {start}: they are damaged"))
            })?;
            // A sync that was broken off may have written it.
            header.sync = header.sync.max(found.sync);
            groups.push(Arc::new(found.group));
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
            unsynced: Mutex::default(),
            queue: RwLock::default(),
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
            let _unsynced = self.unsynced.lock();
            if block * BLOCK_BYTES >= self.length.load(Ordering::Acquire) {
                break;
            }
            let sum = self.group(block)?.sums_from(block, 1)[0].load(Ordering::Acquire);
            // What a stop of the machine left half written is nobody's.
            if sum != BEING_WRITTEN {
                self.read_run(block, &mut bytes)?;
            }
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
        if sums
            .iter()
            .all(|sum| sum.load(Ordering::Acquire) == NEVER_WRITTEN)
        {
            bytes.fill(0);
            return Ok(());
        }
        // Looked at first: what it lacks is in the file.
        let queue = self.queue.read();
        let end = block + sums.len() as u64;
        if queue.range(block..end).next().is_some() {
            for (number, bytes) in (block..).zip(bytes.chunks_exact_mut(BLOCK)) {
                match queue.get(&number) {
                    Some(written) => bytes.copy_from_slice(written),
                    None => self.read_written(number, bytes, group.sums_from(number, 1))?,
                }
            }
            return Ok(());
        }
        drop(queue);
        self.read_written(block, bytes, sums)
    }

    /// As [`Blocks::read_run`], of blocks that are in the file.
    fn read_written(&self, block: u64, bytes: &mut [u8], sums: &[AtomicU32]) -> io::Result<()> {
        match self.file.read_at(bytes, place(block)) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(self.damaged(block, "it is cut off"));
            }
            other => other?,
        }
        for (number, (bytes, sum)) in (block..).zip(bytes.chunks_exact_mut(BLOCK).zip(sums)) {
            match sum.load(Ordering::Acquire) {
                NEVER_WRITTEN => bytes.fill(0),
                BEING_WRITTEN => {
                    return Err(self.damaged(number, "it is needed, and was only being written"));
                }
                sum if sum == checksum(self.nonce, number, bytes) => {}
                _ => return Err(self.damaged(number, "it fails its checksum")),
            }
        }
        Ok(())
    }

    /// Takes whole blocks of one group, which are written once they are marked.
    fn write_run(&self, block: u64, bytes: &[u8]) -> io::Result<()> {
        let group = self.group(block)?;
        let sums = group.sums_from(block, bytes.len() / BLOCK);
        let mut unsynced = self.unsynced.lock();
        let queue = {
            let mut queue = self.queue.write();
            for (number, (bytes, sum)) in (block..).zip(bytes.chunks_exact(BLOCK).zip(sums)) {
                queue.insert(number, bytes.into());
                let before = sum.swap(checksum(self.nonce, number, bytes), Ordering::AcqRel);
                let blocks = &mut unsynced.blocks;
                blocks.entry(number).or_insert(before != NEVER_WRITTEN);
            }
            queue.len()
        };
        group.changed.store(true, Ordering::Release);
        if queue >= QUEUED_BLOCKS {
            let marks = self.to_mark(&unsynced);
            self.write_queue(&mut unsynced, &mut self.header.lock(), marks)?;
        }
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

    /// Groups of blocks that wait and have other contents on disk.
    fn to_mark(&self, unsynced: &Unsynced) -> BTreeSet<u64> {
        let queue = self.queue.read();
        let overwritten = queue
            .keys()
            .filter(|block| unsynced.blocks.get(block) == Some(&true));
        overwritten.map(|block| block / GROUP).collect()
    }

    /// Writes the blocks that wait, after it has written marks for groups.
    fn write_queue(
        &self,
        unsynced: &mut Unsynced,
        header: &mut Header,
        to_mark: BTreeSet<u64>,
    ) -> io::Result<()> {
        if !to_mark.is_empty() {
            header.sync += 1;
            for number in to_mark {
                let group = self.group(number * GROUP)?;
                let marks = |block| unsynced.blocks.contains_key(&block);
                let bytes = group.encode_marks(self.nonce, number, header.sync, marks);
                self.write_slot(&group, number, &bytes)?;
                unsynced.marked.insert(number);
            }
            self.file.sync_data()?;
        }
        let queue = self.queue.read();
        let mut run = Vec::with_capacity(RUN_BYTES.min(queue.len() * BLOCK));
        let mut first = 0;
        for (block, bytes) in &*queue {
            let next = first + (run.len() / BLOCK) as u64;
            let follows = *block == next && !block.is_multiple_of(GROUP);
            if !run.is_empty() && (!follows || run.len() >= RUN_BYTES) {
                self.file.write_at(&run, place(first))?;
                run.clear();
            }
            if run.is_empty() {
                first = *block;
            }
            run.extend_from_slice(bytes);
        }
        if !run.is_empty() {
            self.file.write_at(&run, place(first))?;
        }
        drop(queue);
        self.queue.write().clear();
        Ok(())
    }

    fn write_slot(&self, group: &Group, number: u64, bytes: &[u8]) -> io::Result<()> {
        let slot = group.next_slot();
        self.file
            .write_at(bytes, group_start(number) + slot * BLOCK_BYTES)
    }

    /// Makes everything durable that was written.
    fn sync(&self) -> io::Result<()> {
        let mut unsynced = self.unsynced.lock();
        let mut header = self.header.lock();
        let length = self.length.load(Ordering::Acquire);
        let count = usize::try_from(group_count(length)).unwrap_or(usize::MAX);
        let groups: Vec<_> = self.groups.read().iter().take(count).cloned().collect();
        // Every group that is written: no older checksums may count if the new ones are damaged.
        let mut to_mark = self.to_mark(&unsynced);
        let changed = (0_u64..).zip(&groups).filter(|(number, group)| {
            group.changed.load(Ordering::Acquire) && !unsynced.marked.contains(number)
        });
        to_mark.extend(changed.map(|(number, _)| number));
        self.write_queue(&mut unsynced, &mut header, to_mark)?;
        header.sync += 1;
        let mut wrote = false;
        for (number, group) in (0_u64..).zip(&groups) {
            let is_new = number >= header.groups;
            if !group.changed.swap(false, Ordering::AcqRel) && !is_new {
                continue;
            }
            let bytes = group.encode(self.nonce, number, header.sync);
            self.write_slot(group, number, &bytes)?;
            wrote = true;
        }
        if wrote {
            self.file.sync_data()?;
        }
        header.slot ^= 1;
        header.groups = groups.len() as u64;
        let bytes = header.encode(self.nonce, length);
        for copy in 0..2 {
            let slot = header.slot + 2 * copy;
            self.file.write_at(&bytes, slot * BLOCK_BYTES)?;
        }
        self.file.sync_data()?;
        *unsynced = Unsynced::default();
        // Only now may what was cut off go: until now, an older header counted on it.
        self.groups.write().truncate(count);
        let wanted = file_length(length);
        if self.file.length()? > wanted {
            self.file.set_length(wanted)?;
        }
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let mut unsynced = self.unsynced.lock();
        let before = self.length.load(Ordering::Acquire);
        {
            let mut groups = self.groups.write();
            let count = usize::try_from(group_count(length)).unwrap_or(usize::MAX);
            while groups.len() < count {
                groups.push(Arc::new(Group::new()));
            }
            // What is cut off reads as zeros if it comes back.
            let cut = length.div_ceil(BLOCK_BYTES)..before.div_ceil(BLOCK_BYTES);
            let mut queue = self.queue.write();
            for block in cut {
                queue.remove(&block);
                let at = usize::try_from(block / GROUP).unwrap_or(usize::MAX);
                if let Some(group) = groups.get(at) {
                    let sum = &group.sums_from(block, 1)[0];
                    let before = sum.swap(NEVER_WRITTEN, Ordering::AcqRel);
                    let blocks = &mut unsynced.blocks;
                    blocks.entry(block).or_insert(before != NEVER_WRITTEN);
                    group.changed.store(true, Ordering::Release);
                }
            }
        }
        self.length.store(length, Ordering::Release);
        let wanted = file_length(length);
        if self.file.length()? < wanted {
            self.file.set_length(wanted)?;
        }
        Ok(())
    }
}

/// The newest of the slots that are whole.
fn newest_header(
    file: &dyn DiskFile,
    name: &str,
    length: u64,
) -> Result<header::Found, MemberError> {
    let mut block = vec![0; BLOCK];
    let mut newest: Option<header::Found> = None;
    for slot in 0..HEADER_BLOCKS {
        if (slot + 1) * BLOCK_BYTES > length {
            break;
        }
        file.read_at(&mut block, slot * BLOCK_BYTES)
            .map_err(MemberError::disk(format!("read {name}")))?;
        if slot == 0 && block.starts_with(FIRST_FORMAT_MAGIC) {
            return Err(MemberError::Older {
                what: name.to_owned(),
                found: 1,
                known: FORMAT,
            });
        }
        let Some(mut found) = Header::decode(&block, name)? else {
            continue;
        };
        found.header.slot = slot % 2;
        if newest
            .as_ref()
            .is_none_or(|newest| newest.header.sync < found.header.sync)
        {
            newest = Some(found);
        }
    }
    newest.ok_or_else(|| MemberError::Corrupt(format!("{name} has no header")))
}
