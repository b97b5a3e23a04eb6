//! Encryption of what a device below holds: see [`SectorCipher`].

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::{
    BlockDevice, Buffers, ChannelContext, IoChannel, IoCompletion, IoRequest, Operation,
    Properties, RingOperations, Token,
};
use crate::sector_cipher::{SECTOR_BYTES, SectorCipher};

/// Memory for encrypted copies of what a queue writes. More is held back.
const COPY_LIMIT: u64 = 16 << 20;
/// Bytes that are ciphered at once.
const CHUNK: usize = 4096;

/// A device whose content is encrypted on the one below.
#[derive(Clone, Debug)]
pub struct CryptDevice {
    below: Arc<dyn BlockDevice>,
    cipher: Arc<SectorCipher>,
    origin: u64,
}

impl CryptDevice {
    /// Of the device below. Its byte `origin` is in sector 0; what lies before isn't touched.
    pub fn new(below: Arc<dyn BlockDevice>, cipher: Arc<SectorCipher>, origin: u64) -> Self {
        Self {
            below,
            cipher,
            origin,
        }
    }
}

impl BlockDevice for CryptDevice {
    fn properties(&self) -> Properties {
        self.below.properties()
    }

    fn open_channel(&self, context: &mut ChannelContext<'_>) -> io::Result<Box<dyn IoChannel>> {
        Ok(Box::new(CryptChannel {
            alignment: self.properties().alignment.max(CHUNK),
            below: self.below.open_channel(context)?,
            cipher: Arc::clone(&self.cipher),
            origin: self.origin,
            pending: Vec::new(),
            free: Vec::new(),
            copied: 0,
            held_back: VecDeque::new(),
        }))
    }

    fn sync(&self) -> io::Result<()> {
        self.below.sync()
    }

    fn remeasure(&self) -> io::Result<u64> {
        self.below.remeasure()
    }
}

#[derive(Debug)]
struct Pending {
    tag: u64,
    operation: Operation,
    sector: u64,
    /// The submitter's buffers, while a copy is written.
    plain: Option<Buffers>,
}

#[derive(Debug)]
struct CryptChannel {
    below: Box<dyn IoChannel>,
    cipher: Arc<SectorCipher>,
    origin: u64,
    alignment: usize,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    copied: u64,
    held_back: VecDeque<IoRequest>,
}

impl CryptChannel {
    fn start(&mut self, mut request: IoRequest, ring: &mut RingOperations) {
        let sector = request.offset.saturating_sub(self.origin) / SECTOR_BYTES as u64;
        let mut plain = None;
        if request.operation == Operation::Write {
            let copy = usize::try_from(request.len)
                .ok()
                .and_then(|len| Buffers::zeroed(len, self.alignment));
            // Where a copy can't be had, nothing can be written; the device below refuses a
            // request without buffers.
            let copy = copy.unwrap_or_else(Buffers::none);
            let cipher = &self.cipher;
            cipher_through(&request.buffers, &copy, |number, bytes| {
                cipher.encrypt(sector + number, bytes);
            });
            self.copied += copy.len();
            plain = Some(std::mem::replace(&mut request.buffers, copy));
        }
        let pending = Some(Pending {
            tag: request.tag,
            operation: request.operation,
            sector,
            plain,
        });
        let slot = self.free.pop().unwrap_or(self.pending.len());
        match self.pending.get_mut(slot) {
            Some(entry) => *entry = pending,
            None => self.pending.push(pending),
        }
        request.tag = slot as u64;
        self.below.submit(request, ring);
    }

    fn start_held_back(&mut self, ring: &mut RingOperations) {
        while self.copied < COPY_LIMIT
            && let Some(request) = self.held_back.pop_front()
        {
            self.start(request, ring);
        }
    }
}

impl IoChannel for CryptChannel {
    fn submit(&mut self, request: IoRequest, ring: &mut RingOperations) {
        if request.operation == Operation::Write && self.copied >= COPY_LIMIT {
            self.held_back.push_back(request);
        } else {
            self.start(request, ring);
        }
    }

    fn complete(&mut self, token: Token, result: i32, ring: &mut RingOperations) -> bool {
        let ours = self.below.complete(token, result, ring);
        if ours {
            self.start_held_back(ring);
        }
        ours
    }

    fn take_completion(&mut self) -> Option<IoCompletion> {
        let completion = self.below.take_completion()?;
        let slot = usize::try_from(completion.tag).ok()?;
        let pending = self.pending.get_mut(slot)?.take()?;
        self.free.push(slot);
        let mut buffers = completion.buffers;
        if let Some(plain) = pending.plain {
            self.copied -= buffers.len();
            buffers = plain;
        } else if pending.operation == Operation::Read && completion.result.is_ok() {
            cipher_through(&buffers, &buffers, |number, bytes| {
                self.cipher.decrypt(pending.sector + number, bytes);
            });
        }
        Some(IoCompletion {
            tag: pending.tag,
            result: completion.result,
            buffers,
        })
    }

    fn wake(&mut self, now: Instant, ring: &mut RingOperations) {
        self.below.wake(now, ring);
        self.start_held_back(ring);
    }

    fn deadline(&self) -> Option<Instant> {
        // Room for what is held back may have come with a completion that was just taken.
        if self.copied < COPY_LIMIT && !self.held_back.is_empty() {
            return Some(Instant::now());
        }
        self.below.deadline()
    }
}

// A guest may change its memory at any time, so it is ciphered in a copy.
fn cipher_through(from: &Buffers, to: &Buffers, mut cipher: impl FnMut(u64, &mut [u8])) {
    let mut chunk = [0; CHUNK];
    let mut place = 0;
    while place < to.len() {
        let len = usize::try_from(to.len() - place)
            .unwrap_or(CHUNK)
            .min(CHUNK);
        let part = chunk.get_mut(..len).unwrap_or_default();
        from.copy_to(place, part);
        cipher(place / SECTOR_BYTES as u64, part);
        to.copy_from(place, part);
        place += len as u64;
    }
}
