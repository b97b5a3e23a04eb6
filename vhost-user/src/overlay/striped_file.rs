//! A sparse file of stripes: header, map and data.
//!
//! The order that makes it safe: a stripe's data is written, then its bit is set in memory. A
//! flush takes the bits that are set, makes the data durable, writes the map's changed blocks
//! over their older copies, makes those durable, and only then brings the other copies up to
//! date. So at any moment at most one copy of a block is being written, and the other one
//! describes the last flush.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::header::{self, BLOCK_BYTES, Header, HeaderError};
use super::map::{BlockBits, StripeMap, encode_block};
use super::map_file::{
    BlockState, block_state, load_map, read_block, write_block, write_empty_blocks,
};
use super::session::{self, Session};
use super::{OverlayError, Storage};
use crate::sector_cipher::SectorCipher;

/// Buffers for the file start at multiples of this, which suits every O_DIRECT.
pub(crate) const MEMORY_ALIGNMENT: usize = 4096;
/// How a striped file is opened.
#[derive(Clone, Debug, Default)]
pub struct StripedOptions {
    /// Nothing is written, not even repairs.
    pub read_only: bool,
    /// A failed sync loses nothing that was written before, since no page cache is between
    /// (O_DIRECT).
    pub uncached: bool,
    /// The key, for an encrypted file.
    pub cipher: Option<Arc<SectorCipher>>,
    /// Where to note what isn't flushed, and the file's device and inode; nowhere in tests.
    pub session: Option<(PathBuf, (u64, u64))>,
}

/// An open striped file.
#[derive(Debug)]
pub struct StripedFile {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    options: StripedOptions,
    header: Mutex<Header>,
    stripe_bytes: u64,
    data_offset: u64,
    bytes: AtomicU64,
    map: StripeMap,
    changed: Mutex<BTreeSet<u64>>,
    changes: AtomicU64,
    durable_changes: AtomicU64,
    writer: Mutex<Vec<BlockState>>,
    lost_writes: AtomicBool,
    session: Option<Session>,
    /// Some write could not be noted.
    unnoted: AtomicBool,
}

impl StripedFile {
    /// Writes a new file's header and map. The file is empty, or all zero.
    pub fn format(storage: &dyn Storage, header: &Header) -> io::Result<()> {
        let length = header.data_offset() + header.stripes() * u64::from(header.stripe_bytes);
        storage.set_len(length)?;
        write_empty_blocks(storage, header, 0)?;
        storage.sync()?;
        // Last, so that a file is a striped file only when it is complete.
        let copy = header.to_bytes();
        write_block(storage, &copy, 0)?;
        write_block(storage, &copy, BLOCK_BYTES as u64)?;
        storage.sync()
    }

    /// Reads the header alone.
    pub fn read_header(storage: &dyn Storage, path: &Path) -> Result<Header, OverlayError> {
        let failed = |source| OverlayError::io("read the header of", path, source);
        let mut best: Option<Header> = None;
        let mut worst = HeaderError::NotStriped;
        for copy in 0..2 {
            let block = read_block(storage, copy * BLOCK_BYTES as u64).map_err(failed)?;
            match Header::parse(&block) {
                Ok(header) => {
                    if best
                        .as_ref()
                        .is_none_or(|best| best.generation < header.generation)
                    {
                        best = Some(header);
                    }
                }
                Err(HeaderError::NotStriped) => {}
                Err(error) => worst = error,
            }
        }
        best.ok_or_else(|| match worst {
            HeaderError::NewerVersion(found) => OverlayError::NewerVersion {
                path: path.into(),
                found,
                known: header::VERSION,
            },
            HeaderError::UnknownFeatures(features) => OverlayError::UnknownFeatures {
                path: path.into(),
                features,
            },
            error => OverlayError::BadHeader {
                path: path.into(),
                reason: error.to_string(),
            },
        })
    }

    /// Opens a file, and repairs damaged copies if it may be written.
    pub fn open(
        storage: Arc<dyn Storage>,
        path: &Path,
        options: StripedOptions,
    ) -> Result<Self, OverlayError> {
        let header = Self::read_header(storage.as_ref(), path)?;
        check_key(&header, path, options.cipher.as_deref())?;
        if header.sealed && !options.read_only {
            return Err(OverlayError::Sealed { path: path.into() });
        }
        let map = StripeMap::new(header.map_capacity);
        let (blocks, damaged) = load_map(storage.as_ref(), path, &header, &map)?;
        let mut file = Self {
            session: None,
            unnoted: AtomicBool::new(false),
            path: path.into(),
            storage,
            options,
            stripe_bytes: u64::from(header.stripe_bytes),
            data_offset: header.data_offset(),
            bytes: AtomicU64::new(header.bytes),
            header: Mutex::new(header),
            map,
            changed: Mutex::default(),
            changes: AtomicU64::new(0),
            durable_changes: AtomicU64::new(0),
            writer: Mutex::new(blocks),
            lost_writes: AtomicBool::new(false),
        };
        let failed = |source| OverlayError::io("write the header and map of", path, source);
        if !file.options.read_only {
            file.repair(&damaged).map_err(failed)?;
        }
        file.take_over_session().map_err(|source| {
            OverlayError::io("take over the unflushed writes of", path, source)
        })?;
        if !file.options.read_only {
            file.change_header(|header| header.opened += 1)
                .map_err(failed)?;
            file.begin_session();
        }
        Ok(file)
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says about itself.
    pub fn header(&self) -> Header {
        lock(&self.header).clone()
    }

    /// The disk's size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// The stripe's size in bytes.
    pub fn stripe_bytes(&self) -> u64 {
        self.stripe_bytes
    }

    /// Where the disk's byte 0 is in the file.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// What its data is encrypted with.
    pub fn cipher(&self) -> Option<&Arc<SectorCipher>> {
        self.options.cipher.as_ref()
    }

    /// Whether a stripe is here rather than below.
    pub fn contains(&self, stripe: u64) -> bool {
        self.map.contains(stripe)
    }

    /// Stripes that are here.
    pub fn stripes_present(&self) -> u64 {
        self.map.count()
    }

    /// Whether a sync of the data alone makes all completed writes durable: no bit of the map
    /// has changed since the last flush.
    pub fn map_is_durable(&self) -> bool {
        let changes = self.changes.load(Ordering::Acquire);
        self.durable_changes.load(Ordering::Acquire) == changes
            && !self.lost_writes.load(Ordering::Acquire)
    }

    /// Reads from stripes that are here. Offset, length and the buffer's address are aligned.
    pub fn read_data(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.storage.read_at(buffer, self.data_offset + offset)?;
        if let Some(cipher) = &self.options.cipher {
            cipher.decrypt(offset / 512, buffer);
        }
        Ok(())
    }

    /// Writes to stripes that are here, or will be once [`insert`](Self::insert) is told. The
    /// buffer is encrypted in place.
    pub fn write_data(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if let Some(cipher) = &self.options.cipher {
            cipher.encrypt(offset / 512, buffer);
        }
        self.storage.write_at(buffer, self.data_offset + offset)
    }

    /// Makes a range zero, in stripes that are here or will be.
    pub fn zero_data(&self, offset: u64, len: u64) -> io::Result<()> {
        self.storage.punch_hole(self.data_offset + offset, len)
    }

    /// Says that all of a stripe is written.
    pub fn insert(&self, stripe: u64) {
        // Noted first: once the bit is seen, others write to the stripe and are answered.
        if let Some(session) = self.session.as_ref().filter(|_| !self.contains(stripe))
            && let Err(error) = session.note(stripe)
            && !self.unnoted.swap(true, Ordering::AcqRel)
        {
            let path = self.path.display();
            tracing::warn!(image = %path, %error, "can't note writes; flushing them instead");
        }
        if let Some(block) = self.map.insert(stripe) {
            let mut changed = lock(&self.changed);
            changed.insert(block);
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Whether what was written outlives this process without a flush.
    pub fn outlives_process(&self) -> bool {
        self.map_is_durable() || self.session.is_some() && !self.unnoted.load(Ordering::Acquire)
    }

    /// Makes everything that was written durable, data before map.
    pub fn flush(&self) -> io::Result<()> {
        let mut blocks = lock(&self.writer);
        let (changed, target) = {
            let mut changed = lock(&self.changed);
            let target = self.changes.load(Ordering::Acquire);
            (std::mem::take(&mut *changed), target)
        };
        // Copied now: bits that are set from here on may be of data that the sync misses.
        let bits: Vec<(u64, BlockBits)> = changed
            .iter()
            .map(|block| (*block, self.map.block(*block)))
            .collect();
        let outcome = self
            .sync()
            .and_then(|()| self.write_blocks(&mut blocks, &bits));
        match outcome {
            Ok(()) => {
                self.durable_changes.fetch_max(target, Ordering::AcqRel);
                Ok(())
            }
            Err(error) => {
                lock(&self.changed).extend(changed);
                Err(error)
            }
        }
    }

    /// Makes the disk larger. Says so only when the larger size is durable.
    pub fn grow(&self, bytes: u64) -> Result<(), OverlayError> {
        let refuse = |reason: String| OverlayError::Refused {
            path: self.path.clone(),
            reason,
        };
        let mut header = self.header();
        if bytes < header.bytes {
            return Err(refuse(format!(
                "it has {} bytes, and {bytes} are fewer; images only grow",
                header.bytes
            )));
        }
        if bytes > header.largest_size() || !bytes.is_multiple_of(512) {
            return Err(refuse(format!(
                "it can't have {bytes} bytes: its map has room for {}, in multiples of 512",
                header.largest_size()
            )));
        }
        if bytes == header.bytes {
            return Ok(());
        }
        let before = header.map_blocks();
        header.bytes = bytes;
        let mut blocks = lock(&self.writer);
        let length = self.data_offset + header.stripes() * self.stripe_bytes;
        let prepared = self
            .storage
            .set_len(length)
            .and_then(|()| write_empty_blocks(self.storage.as_ref(), &header, before))
            .and_then(|()| self.sync())
            .and_then(|()| self.change_header(|header| header.bytes = bytes));
        prepared.map_err(|source| OverlayError::io("grow", &self.path, source))?;
        let new = BlockState {
            generation: 1,
            copy: 0,
        };
        blocks.resize(usize::try_from(header.map_blocks()).unwrap_or(0), new);
        self.bytes.store(bytes, Ordering::Release);
        Ok(())
    }

    /// Refuses all later writers.
    pub fn seal(&self) -> io::Result<()> {
        self.flush()?;
        self.change_header(|header| header.sealed = true)
    }

    /// Changes the header, durably, one copy after the other.
    pub fn change_header(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let mut current = lock(&self.header);
        let mut header = current.clone();
        change(&mut header);
        header.generation += 1;
        header.check().map_err(io::Error::other)?;
        let bytes = header.to_bytes();
        // The older copy first. The other is only touched when that one is durable.
        let first = header.generation % 2 * BLOCK_BYTES as u64;
        write_block(self.storage.as_ref(), &bytes, first)?;
        self.sync()?;
        write_block(self.storage.as_ref(), &bytes, BLOCK_BYTES as u64 - first)?;
        self.sync()?;
        *current = header;
        Ok(())
    }

    // Through the page cache a failed sync is final: what it was to write is gone, and the next
    // one succeeds all the same.
    fn sync(&self) -> io::Result<()> {
        if self.lost_writes.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "an earlier sync failed, so flushed data may be lost",
            ));
        }
        self.storage.sync().inspect_err(|_| {
            if !self.options.uncached {
                self.lost_writes.store(true, Ordering::Release);
            }
        })
    }

    fn write_blocks(
        &self,
        states: &mut [BlockState],
        blocks: &[(u64, BlockBits)],
    ) -> io::Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let (uuid, offsets) = {
            let header = lock(&self.header);
            (header.uuid, [header.map_offset(0), header.map_offset(1)])
        };
        let place = |copy: u8, block: u64| offsets[usize::from(copy)] + block * BLOCK_BYTES as u64;
        let missing = || io::Error::other("a block of the map that isn't there");
        for (block, bits) in blocks {
            let state = block_state(states, *block).ok_or_else(missing)?;
            // Only an image that was made so has counted that far.
            let next = state.generation.checked_add(1);
            let next =
                next.ok_or_else(|| io::Error::other("a generation of the map is the last"))?;
            let bytes = encode_block(uuid, *block, next, bits);
            write_block(self.storage.as_ref(), &bytes, place(1 - state.copy, *block))?;
        }
        self.sync()?;
        for (block, bits) in blocks {
            let state = block_state(states, *block).ok_or_else(missing)?;
            state.generation += 1;
            state.copy = 1 - state.copy;
            // Durable with the next flush, before anything is written over the other copy. If
            // it fails, that copy is just the older one.
            let bytes = encode_block(uuid, *block, state.generation, bits);
            let other = place(1 - state.copy, *block);
            if let Err(error) = write_block(self.storage.as_ref(), &bytes, other) {
                tracing::warn!(image = %self.path.display(), block, %error, "a copy of the map stays behind");
            }
        }
        Ok(())
    }

    // Adds what a killed process had written and not flushed.
    fn take_over_session(&self) -> io::Result<()> {
        let Some((folder, identity)) = self.session_identity() else {
            return Ok(());
        };
        let stripes = session::left_behind(&folder, &identity)?;
        if stripes.is_empty() {
            return Ok(());
        }
        tracing::info!(
            image = %self.path.display(), stripes = stripes.len(),
            "taking over what a killed process had not flushed"
        );
        for stripe in stripes {
            self.insert(stripe);
        }
        if self.options.read_only {
            return Ok(());
        }
        // Before the session is replaced.
        self.flush()
    }

    fn begin_session(&mut self) {
        let session = self
            .session_identity()
            .map(|(folder, identity)| Session::begin(&folder, &identity));
        match session {
            Some(Ok(session)) => self.session = Some(session),
            Some(Err(error)) => {
                tracing::warn!(%error, "can't note writes; flushing them instead");
            }
            None => {}
        }
    }

    fn session_identity(&self) -> Option<(PathBuf, session::Identity)> {
        let (folder, inode) = self.options.session.clone()?;
        let header = lock(&self.header);
        let identity = session::Identity {
            uuid: header.uuid,
            opened: header.opened,
            inode,
        };
        Some((folder, identity))
    }

    // Makes both copies of what was found damaged or behind equal again.
    fn repair(&self, blocks: &[u64]) -> io::Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        tracing::info!(
            image = %self.path.display(), blocks = blocks.len(),
            "bringing copies of the map up to date after an unclean end"
        );
        let mut states = lock(&self.writer);
        let bits: Vec<_> = blocks
            .iter()
            .map(|block| (*block, self.map.block(*block)))
            .collect();
        // What was read may have been in the page cache alone.
        self.sync()?;
        self.write_blocks(&mut states, &bits)?;
        self.sync()
    }
}

impl Drop for StripedFile {
    fn drop(&mut self) {
        if let Some(session) = &self.session
            && self.flush().is_ok()
        {
            session.end();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_key(
    header: &Header,
    path: &Path,
    cipher: Option<&SectorCipher>,
) -> Result<(), OverlayError> {
    let reason = match (&header.key_check, cipher) {
        (None, None) => return Ok(()),
        (Some(check), Some(cipher)) if cipher.matches(check) => return Ok(()),
        (Some(_), Some(_)) => "this key is not the one that it is encrypted with",
        (Some(_), None) => "it is encrypted; give its key with --key-fd",
        (None, Some(_)) => "it is not encrypted, but a key was given",
    };
    Err(OverlayError::Key {
        path: path.into(),
        reason: reason.into(),
    })
}
