//! A disk that loses what was not synced.
//!
//! Files are pages of 4096 bytes. What was written since the last sync of a file is kept beside what
//! a loss of power would leave: then each sector of 512 bytes is the old or the new one. Creations,
//! renames and removals since the last sync of the folder are a journal, of which a loss of power
//! keeps any beginning. The loss happens inside a call, when a fuse burns down.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use keelson_member::disk::{Disk, DiskFile};
use parking_lot::Mutex;

use crate::random::Random;

const PAGE: usize = 4096;
const SECTOR: usize = 512;
/// Pages of a file that are known as those that were synced last.
const RECENT: usize = 8;

type Page = Arc<[u8; PAGE]>;

/// A machine's disk; clones are the same one.
#[derive(Debug, Clone)]
pub struct SimulatedDisk(Arc<Mutex<State>>);

/// What a stop of the machine takes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing: only the process ended.
    Nothing,
    /// Everything that was not synced.
    Unsynced,
    /// Any sectors that were not synced, and the end of the folder's journal.
    Some,
}

/// How a disk lies about its syncs, to plant a bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lie {
    /// It does not.
    #[default]
    None,
    /// Syncs of the log's files do nothing.
    SkipsLogSyncs,
    /// A sync of a log's file makes durable what the one before it should have.
    LateLogSyncs,
}

#[derive(Debug)]
struct State {
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    journal: Vec<NameChange>,
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    /// Files opened before the machine stopped are of no use after it.
    boot: u64,
    stopped: bool,
    /// Calls that change something, until the power is lost.
    fuse: Option<u64>,
    full: bool,
    lie: Lie,
    /// Time that calls took since it was asked for, in microseconds.
    elapsed: u64,
    /// The next sync takes this much longer.
    stall: u64,
    syncs: u64,
    flips: Vec<Flip>,
    random: Random,
}

/// A bit that was flipped.
#[derive(Debug, Clone, Copy)]
struct Flip {
    inode: u64,
    page: u64,
    at: usize,
    /// The byte since then.
    byte: u8,
}

#[derive(Debug, Clone)]
enum NameChange {
    Create(String, u64),
    Rename(String, String),
    Remove(String),
}

#[derive(Debug, Default)]
struct Inode {
    pages: BTreeMap<u64, Page>,
    length: u64,
    /// Pages changed since the last sync, as they were then.
    unsynced: BTreeMap<u64, Option<Page>>,
    /// Those of the sync before, where syncs are late.
    late: BTreeMap<u64, Option<Page>>,
    durable_length: u64,
    /// Pages that were synced last.
    recent: VecDeque<u64>,
}

#[derive(Debug)]
struct SimulatedFile {
    disk: SimulatedDisk,
    inode: u64,
    boot: u64,
    is_log: bool,
}

impl SimulatedDisk {
    /// An empty disk.
    pub fn new(random: Random) -> Self {
        Self(Arc::new(Mutex::new(State {
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            journal: Vec::new(),
            inodes: BTreeMap::new(),
            next_inode: 1,
            boot: 0,
            stopped: false,
            fuse: None,
            full: false,
            lie: Lie::None,
            elapsed: 0,
            stall: 0,
            syncs: 0,
            flips: Vec::new(),
            random,
        })))
    }

    /// Has it lie.
    pub fn set_lie(&self, lie: Lie) {
        self.0.lock().lie = lie;
    }

    /// The power is lost in the call that changes something after `calls` others.
    pub fn set_fuse(&self, calls: u64) {
        self.0.lock().fuse = Some(calls);
    }

    /// Whether it takes no more bytes than it has.
    pub fn set_full(&self, full: bool) {
        self.0.lock().full = full;
    }

    /// Whether it takes no more bytes than it has.
    pub fn is_full(&self) -> bool {
        self.0.lock().full
    }

    /// The next sync takes this many microseconds longer.
    pub fn stall(&self, microseconds: u64) {
        self.0.lock().stall += microseconds;
    }

    /// Nothing works any more until [`SimulatedDisk::boot`].
    pub fn stop(&self) {
        self.0.lock().stopped = true;
    }

    /// Whether the machine has stopped.
    pub fn is_stopped(&self) -> bool {
        self.0.lock().stopped
    }

    /// The time that calls took since this was asked last, in microseconds.
    pub fn take_elapsed(&self) -> u64 {
        std::mem::take(&mut self.0.lock().elapsed)
    }

    /// The time that calls took since [`SimulatedDisk::take_elapsed`].
    pub fn elapsed(&self) -> u64 {
        self.0.lock().elapsed
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.0.lock().syncs
    }

    /// The machine starts again, after a loss.
    pub fn boot(&self, loss: Loss) {
        let state = &mut *self.0.lock();
        state.boot += 1;
        state.stopped = false;
        state.fuse = None;
        state.stall = 0;
        state.elapsed = 0;
        if loss != Loss::Nothing {
            state.lose(loss);
        }
    }

    /// Flips one bit of a file that `wanted` names, if there is one, in a page that was synced: one of
    /// those that were synced last, if it is to be a `recent` one. Returns its name and place.
    pub fn flip_bit(&self, wanted: &dyn Fn(&str) -> bool, recent: bool) -> Option<(String, u64)> {
        let state = &mut *self.0.lock();
        let named = state.names.iter().filter(|(name, _)| wanted(name));
        let used: Vec<(String, u64, Vec<u64>)> = named
            .filter_map(|(name, inode)| {
                let file = state.inodes.get(inode)?;
                let mut pages = file.synced_pages();
                pages.retain(|page| !recent || file.recent.contains(page));
                (!pages.is_empty()).then(|| (name.clone(), *inode, pages))
            })
            .collect();
        if used.is_empty() {
            return None;
        }
        let (name, inode, pages) = state.random.pick(&used).clone();
        let page = *state.random.pick(&pages);
        let bit = state.random.below(PAGE as u64 * 8);
        let at = usize::try_from(bit / 8).unwrap_or(0);
        let bytes = state.inodes.get_mut(&inode)?.pages.get_mut(&page)?;
        let byte = &mut Arc::make_mut(bytes)[at];
        *byte ^= 1 << (bit % 8);
        let byte = *byte;
        state.flips.push(Flip {
            inode,
            page,
            at,
            byte,
        });
        Some((name, page * PAGE as u64 + bit / 8))
    }

    /// Whether a bit is still flipped.
    pub fn has_flipped_bits(&self) -> bool {
        let state = self.0.lock();
        state.flips.iter().any(|flip| {
            let Some(inode) = state.inodes.get(&flip.inode) else {
                return false;
            };
            let is_in = |page: &Page| page[flip.at] == flip.byte;
            let before = [&inode.unsynced, &inode.late].map(|pages| pages.get(&flip.page));
            let mut before = before.into_iter().flatten().flatten();
            inode.pages.get(&flip.page).is_some_and(is_in) || before.any(is_in)
        })
    }
}

impl State {
    /// Refuses what comes after the power was lost, and lets the fuse burn.
    fn change(&mut self, boot: u64) -> io::Result<()> {
        self.check(boot)?;
        if self.burn() {
            return Err(power_lost());
        }
        Ok(())
    }

    /// Whether the power is lost in this call.
    fn burn(&mut self) -> bool {
        match &mut self.fuse {
            Some(0) => self.stopped = true,
            Some(calls) => *calls -= 1,
            None => {}
        }
        self.stopped
    }

    fn check(&self, boot: u64) -> io::Result<()> {
        if self.stopped || self.boot != boot {
            return Err(power_lost());
        }
        Ok(())
    }

    fn inode(&mut self, inode: u64) -> io::Result<&mut Inode> {
        self.inodes
            .get_mut(&inode)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn change_names(&mut self, change: NameChange) {
        apply(&mut self.names, &change);
        self.journal.push(change);
    }

    fn sync(&mut self) {
        let (least, most) = (150, 1500);
        self.elapsed += self.random.between(least, most) + std::mem::take(&mut self.stall);
        self.syncs += 1;
    }

    fn lose(&mut self, loss: Loss) {
        let kept = match loss {
            Loss::Some => self.random.index(self.journal.len() + 1),
            Loss::Unsynced | Loss::Nothing => 0,
        };
        for change in self.journal.drain(..).take(kept) {
            apply(&mut self.durable_names, &change);
        }
        self.names.clone_from(&self.durable_names);
        let named: std::collections::BTreeSet<u64> = self.names.values().copied().collect();
        self.inodes.retain(|number, _| named.contains(number));
        let random = &mut self.random;
        for inode in self.inodes.values_mut() {
            let mut old = std::mem::take(&mut inode.unsynced);
            old.extend(std::mem::take(&mut inode.late));
            // A write of several pages is often lost or kept as a whole.
            let mixed = random.percent(60);
            let keep_all = random.percent(50);
            for (number, before) in old {
                let keep = match loss {
                    Loss::Some if mixed => u8::try_from(random.below(256)).unwrap_or(0),
                    Loss::Some if keep_all => u8::MAX,
                    _ => 0,
                };
                inode.mix(number, before.as_ref(), keep);
            }
            if loss == Loss::Unsynced || random.percent(50) {
                inode.length = inode.durable_length;
            }
            inode.durable_length = inode.length;
            let pages = inode.length.div_ceil(PAGE as u64);
            inode.pages.retain(|number, _| *number < pages);
        }
    }
}

impl Inode {
    /// Pages that hold something, and were not changed since the last sync.
    fn synced_pages(&self) -> Vec<u64> {
        let pages = self.pages.iter().filter(|(number, page)| {
            let changed = self.unsynced.contains_key(number) || self.late.contains_key(number);
            !changed && page[..] != [0; PAGE]
        });
        pages.map(|(number, _)| *number).collect()
    }

    /// Takes back the sectors of a page whose bits are not set.
    fn mix(&mut self, number: u64, before: Option<&Page>, keep: u8) {
        let zeros = [0; PAGE];
        let before: &[u8; PAGE] = before.map_or(&zeros, |page| page);
        let page = self.pages.entry(number).or_insert_with(|| Arc::new(zeros));
        let page = Arc::make_mut(page);
        for sector in 0..PAGE / SECTOR {
            if keep & (1 << sector) == 0 {
                let place = sector * SECTOR..(sector + 1) * SECTOR;
                page[place.clone()].copy_from_slice(&before[place]);
            }
        }
    }

    fn write(&mut self, bytes: &[u8], offset: u64) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (number, start) = (
                at / PAGE as u64,
                usize::try_from(at % PAGE as u64).unwrap_or(0),
            );
            let length = rest.len().min(PAGE - start);
            let page = self.pages.get_mut(&number);
            self.unsynced
                .entry(number)
                .or_insert_with(|| page.as_ref().map(|page| Arc::clone(page)));
            let page = self
                .pages
                .entry(number)
                .or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[start..start + length].copy_from_slice(&rest[..length]);
            rest = &rest[length..];
            at += length as u64;
        }
        self.length = self.length.max(at);
    }

    fn read(&self, bytes: &mut [u8], offset: u64) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (number, start) = (
                at / PAGE as u64,
                usize::try_from(at % PAGE as u64).unwrap_or(0),
            );
            let length = rest.len().min(PAGE - start);
            let (now, later) = rest.split_at_mut(length);
            match self.pages.get(&number) {
                Some(page) => now.copy_from_slice(&page[start..start + length]),
                None => now.fill(0),
            }
            rest = later;
            at += length as u64;
        }
    }
}

fn apply(names: &mut BTreeMap<String, u64>, change: &NameChange) {
    match change {
        NameChange::Create(name, inode) => drop(names.insert(name.clone(), *inode)),
        NameChange::Rename(from, to) => {
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
        NameChange::Remove(name) => drop(names.remove(name)),
    }
}

fn power_lost() -> io::Error {
    io::Error::other("the power is lost")
}

impl Disk for SimulatedDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let state = &mut *self.0.lock();
        let boot = state.boot;
        state.check(boot)?;
        let inode = match state.names.get(name) {
            Some(inode) => *inode,
            None if create => {
                state.change(boot)?;
                if state.full {
                    return Err(io::ErrorKind::StorageFull.into());
                }
                let inode = state.next_inode;
                state.next_inode += 1;
                state.inodes.insert(inode, Inode::default());
                state.change_names(NameChange::Create(name.to_owned(), inode));
                inode
            }
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(Arc::new(SimulatedFile {
            disk: self.clone(),
            inode,
            boot,
            is_log: name.starts_with("log-"),
        }))
    }

    fn open_for_blocks(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        self.open(name, create)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let state = self.0.lock();
        state.check(state.boot)?;
        Ok(state.names.keys().cloned().collect())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let state = &mut *self.0.lock();
        state.change(state.boot)?;
        if !state.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.change_names(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let state = &mut *self.0.lock();
        state.change(state.boot)?;
        if !state.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.change_names(NameChange::Remove(name.to_owned()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let state = &mut *self.0.lock();
        state.change(state.boot)?;
        state.sync();
        state.journal.clear();
        state.durable_names = state.names.clone();
        Ok(())
    }
}

impl DiskFile for SimulatedFile {
    fn length(&self) -> io::Result<u64> {
        let state = &mut *self.disk.0.lock();
        state.check(self.boot)?;
        Ok(state.inode(self.inode)?.length)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let state = &mut *self.disk.0.lock();
        state.check(self.boot)?;
        let inode = state.inode(self.inode)?;
        if offset + bytes.len() as u64 > inode.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        inode.read(bytes, offset);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let state = &mut *self.disk.0.lock();
        state.check(self.boot)?;
        state.check_room(self.inode, offset + bytes.len() as u64)?;
        // The write in which the power is lost may have got to the disk, in part.
        let lost = state.burn();
        state.elapsed += 5 + bytes.len() as u64 / 4096;
        state.inode(self.inode)?.write(bytes, offset);
        if lost {
            return Err(power_lost());
        }
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let state = &mut *self.disk.0.lock();
        state.change(self.boot)?;
        state.check_room(self.inode, length)?;
        let inode = state.inode(self.inode)?;
        let pages = length.div_ceil(PAGE as u64);
        if length < inode.length {
            let gone: Vec<u64> = inode
                .pages
                .range(pages..)
                .map(|(number, _)| *number)
                .collect();
            for number in gone {
                let page = inode.pages.remove(&number);
                inode.unsynced.entry(number).or_insert(page);
            }
        }
        inode.length = length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let state = &mut *self.disk.0.lock();
        state.change(self.boot)?;
        state.sync();
        let lie = if self.is_log { state.lie } else { Lie::None };
        let inode = state.inode(self.inode)?;
        inode.recent.extend(inode.unsynced.keys());
        let excess = inode.recent.len().saturating_sub(RECENT);
        inode.recent.drain(..excess);
        match lie {
            Lie::None => inode.unsynced.clear(),
            Lie::SkipsLogSyncs => return Ok(()),
            Lie::LateLogSyncs => inode.late = std::mem::take(&mut inode.unsynced),
        }
        inode.durable_length = inode.length;
        Ok(())
    }
}

impl State {
    fn check_room(&mut self, inode: u64, end: u64) -> io::Result<()> {
        let full = self.full;
        let inode = self.inode(inode)?;
        if full && end > inode.length {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}
