//! An overlay and the layers below it, as one disk.

use std::fmt::Debug;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::striped_file::MEMORY_ALIGNMENT;
use super::{Storage, StripedFile};
use crate::aligned_buffer::AlignedBuffer;

/// Stripes that can be brought up at the same time.
const STRIPE_LOCKS: usize = 16;

/// Called once when a chunk is in the top layer, or why it isn't (an errno). From any thread.
pub type Fetched = Box<dyn FnOnce(Result<(), i32>) + Send>;

/// Where the lowest layer's base is, if not on this host.
pub trait Source: Debug + Send + Sync {
    /// What it fetches at once, in bytes: a multiple of the stripe. Chunks are counted from the
    /// start of the disk.
    fn chunk_bytes(&self) -> u64;

    /// Fetches a chunk, and waits for it. The last one may be shorter.
    fn load(&self, chunk: u64) -> io::Result<Vec<u8>>;

    /// Has a chunk fetched and put into the attached chain, without waiting.
    fn fetch(&self, chunk: u64, done: Fetched);

    /// From now on chunks go to this chain; with `None`, nothing goes anywhere once this returns.
    fn attach(&self, chain: Option<&Arc<Chain>>);

    /// What it did.
    fn counters(&self) -> SourceCounters {
        SourceCounters::default()
    }
}

/// What a source did since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SourceCounters {
    /// Its address.
    pub url: String,
    /// Bytes fetched, verified and kept.
    pub fetched_bytes: u64,
    /// Attempts that failed and may have been repeated.
    pub failed_attempts: u64,
    /// Chunks that came with a wrong checksum.
    pub corrupt_chunks: u64,
}

/// What the lowest striped file stands on.
#[derive(Clone, Debug)]
pub enum Bottom {
    /// Nothing: all is zero.
    Zero,
    /// A raw image or device of this many bytes, after which all is zero.
    Raw(Arc<dyn Storage>, u64),
    /// A server's image of a size in bytes. What is fetched of it is kept in the top layer.
    Source(Arc<dyn Source>, u64),
}

/// Where a stretch of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a striped file: 0 is the top.
    Layer(usize),
    /// In the raw image at the bottom, at the same offset.
    Raw,
    /// Nowhere: it is zero.
    Zero,
    /// On a server still.
    Absent,
}

/// A stretch of the disk that is in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it is.
    pub place: Place,
    /// How many bytes.
    pub len: u64,
}

/// An overlay on its layers. Only the top one is ever written.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Arc<StripedFile>>,
    bottom: Bottom,
    locks: [Mutex<()>; STRIPE_LOCKS],
}

impl Chain {
    /// A disk of these layers, the top one first, with stripes of one size.
    ///
    /// # Errors
    /// The stripes differ in size, or there is no layer.
    pub fn new(layers: Vec<Arc<StripedFile>>, bottom: Bottom) -> io::Result<Self> {
        let sizes = layers.iter().map(|layer| layer.stripe_bytes());
        if layers.is_empty() || sizes.clone().max() != sizes.min() {
            return Err(io::Error::other("layers with stripes of several sizes"));
        }
        Ok(Self {
            layers,
            bottom,
            locks: [const { Mutex::new(()) }; STRIPE_LOCKS],
        })
    }

    /// The layers, the top one first.
    pub fn layers(&self) -> &[Arc<StripedFile>] {
        &self.layers
    }

    /// What the lowest layer stands on.
    pub fn bottom(&self) -> &Bottom {
        &self.bottom
    }

    /// The layer that is written.
    pub fn top(&self) -> &StripedFile {
        // `new` refuses an empty list.
        &self.layers[0]
    }

    /// The disk's size in bytes.
    pub fn bytes(&self) -> u64 {
        self.top().bytes()
    }

    /// Where the stretch from `offset` on is, and how far, up to `len` bytes and the disk's end;
    /// behind that is nothing.
    pub fn locate(&self, offset: u64, len: u64) -> Segment {
        let bytes = self.bytes();
        if offset >= bytes {
            let place = Place::Zero;
            return Segment { place, len };
        }
        let stripe_bytes = self.top().stripe_bytes();
        let end = offset.saturating_add(len).min(bytes);
        let mut stripe = offset / stripe_bytes;
        let place = self.stripe_place(stripe, 0);
        let mut reached = ((stripe + 1) * stripe_bytes).min(end);
        while reached < end && self.stripe_place(stripe + 1, 0) == place {
            stripe += 1;
            reached = ((stripe + 1) * stripe_bytes).min(end);
        }
        self.clip(place, offset, reached - offset)
    }

    /// Whether a write to this range needs no stripe brought up: it can go to the top layer,
    /// at [`StripedFile::data_offset`] and the disk's offset.
    pub fn is_in_top(&self, offset: u64, len: u64) -> bool {
        let stripe_bytes = self.top().stripe_bytes();
        let last = (offset + len.max(1) - 1) / stripe_bytes;
        (offset / stripe_bytes..=last).all(|stripe| self.top().contains(stripe))
    }

    /// Reads any range of the disk, fetching what is absent.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let position = offset + done as u64;
            let rest = (buffer.len() - done) as u64;
            let segment = self.locate(position, rest.min(1 << 20));
            if segment.place == Place::Absent {
                self.load(position)?;
                continue;
            }
            let len = usize::try_from(segment.len).map_err(io::Error::other)?;
            let part = buffer.get_mut(done..done + len).unwrap_or_default();
            self.read_segment(segment.place, part, position)?;
            done += len;
        }
        Ok(())
    }

    /// Writes any whole sectors, bringing up the stripes that they are in.
    pub fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let position = offset + done as u64;
            let (stripe, within, room) = self.in_stripe(position);
            let len = room.min(bytes.len() - done);
            let part = bytes.get(done..done + len).unwrap_or_default();
            self.load_unless_whole(stripe, len)?;
            let _guard = self.lock_stripe(stripe);
            if self.top().contains(stripe) {
                let mut buffer = buffer(len)?;
                buffer.as_mut_slice().copy_from_slice(part);
                self.top().write_data(buffer.as_mut_slice(), position)?;
            } else {
                self.bring_up(stripe, within, len, |place| place.copy_from_slice(part))?;
            }
            done += len;
        }
        Ok(())
    }

    /// Makes whole sectors zero, and gives room back where that costs nothing.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        for stripe in self.edges(offset, len) {
            self.load_unless_whole(stripe, 0)?;
        }
        self.each_stripe(offset, len, |stripe, within, part, position| {
            if self.top().contains(stripe) {
                return self.top().zero_data(position, part as u64);
            }
            if self.stripe_place(stripe, 1) == Place::Zero {
                return Ok(());
            }
            if part as u64 == self.top().stripe_bytes() {
                self.top().zero_data(position, part as u64)?;
                self.top().insert(stripe);
                return Ok(());
            }
            self.bring_up(stripe, within, part, |place| place.fill(0))
        })
    }

    /// Forgets whole sectors: they read as zeroes, or, in a stripe that is only below and not
    /// covered whole, as they did before (virtio 1.2, 5.2.6.2 promises nothing).
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.each_stripe(offset, len, |stripe, _, part, position| {
            let whole = part as u64 == self.top().stripe_bytes();
            if self.top().contains(stripe) {
                return self.top().zero_data(position, part as u64);
            }
            if !whole || self.stripe_place(stripe, 1) == Place::Zero {
                return Ok(());
            }
            self.top().zero_data(position, part as u64)?;
            self.top().insert(stripe);
            Ok(())
        })
    }

    /// Makes all completed writes durable.
    pub fn flush(&self) -> io::Result<()> {
        self.top().flush()
    }

    /// Where what is absent comes from.
    pub fn source(&self) -> Option<&Arc<dyn Source>> {
        match &self.bottom {
            Bottom::Source(source, _) => Some(source),
            Bottom::Zero | Bottom::Raw(..) => None,
        }
    }

    /// The chunks of the source that have to be fetched before a range can be read.
    pub fn absent_for_reading(&self, offset: u64, len: u64) -> Vec<u64> {
        let stripe_bytes = self.top().stripe_bytes();
        let last = (offset + len.max(1) - 1) / stripe_bytes;
        self.absent_chunks(offset / stripe_bytes..=last)
    }

    /// The same before a range can be written, which needs what is around it in its stripes.
    pub fn absent_for_writing(&self, offset: u64, len: u64) -> Vec<u64> {
        self.absent_chunks(self.edges(offset, len))
    }

    /// Puts bytes of the source where nothing newer is: whole stripes, or up to the image's end.
    pub fn place(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let stripe_bytes = self.top().stripe_bytes();
        let size = usize::try_from(stripe_bytes).map_err(io::Error::other)?;
        for (stripe, part) in (offset / stripe_bytes..).zip(bytes.chunks(size)) {
            let _guard = self.lock_stripe(stripe);
            if self.stripe_place(stripe, 0) != Place::Absent {
                continue;
            }
            let start = stripe * stripe_bytes;
            if part.iter().all(|byte| *byte == 0) {
                self.top().zero_data(start, stripe_bytes)?;
            } else {
                let mut whole = buffer(size)?;
                let target = whole.as_mut_slice().get_mut(..part.len());
                target.unwrap_or_default().copy_from_slice(part);
                self.top().write_data(whole.as_mut_slice(), start)?;
            }
            self.top().insert(stripe);
        }
        Ok(())
    }

    // Fetches the chunk that holds a position, in this thread.
    fn load(&self, position: u64) -> io::Result<()> {
        let Some(source) = self.source() else {
            return Ok(());
        };
        let chunk = position / source.chunk_bytes();
        self.place(&source.load(chunk)?, chunk * source.chunk_bytes())
    }

    // Before its lock is taken.
    fn load_unless_whole(&self, stripe: u64, len: usize) -> io::Result<()> {
        let stripe_bytes = self.top().stripe_bytes();
        if (len as u64) < stripe_bytes && self.stripe_place(stripe, 0) == Place::Absent {
            self.load(stripe * stripe_bytes)?;
        }
        Ok(())
    }

    // The stripes that a range covers in part.
    fn edges(&self, offset: u64, len: u64) -> impl Iterator<Item = u64> + use<> {
        let stripe_bytes = self.top().stripe_bytes();
        let end = offset + len;
        let first =
            (len > 0 && !offset.is_multiple_of(stripe_bytes)).then(|| offset / stripe_bytes);
        let last = (len > 0 && !end.is_multiple_of(stripe_bytes)).then(|| end / stripe_bytes);
        first
            .into_iter()
            .chain(last.filter(|last| Some(*last) != first))
    }

    fn absent_chunks(&self, stripes: impl Iterator<Item = u64>) -> Vec<u64> {
        let Some(source) = self.source() else {
            return Vec::new();
        };
        let per_chunk = (source.chunk_bytes() / self.top().stripe_bytes()).max(1);
        let absent = stripes.filter(|stripe| self.stripe_place(*stripe, 0) == Place::Absent);
        let mut chunks: Vec<u64> = absent.map(|stripe| stripe / per_chunk).collect();
        chunks.dedup();
        chunks
    }

    fn each_stripe(
        &self,
        offset: u64,
        len: u64,
        mut act: impl FnMut(u64, usize, usize, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let position = offset + done;
            let (stripe, within, room) = self.in_stripe(position);
            let part = usize::try_from(len - done).unwrap_or(room).min(room);
            let _guard = self.lock_stripe(stripe);
            act(stripe, within, part, position)?;
            done += part as u64;
        }
        Ok(())
    }

    // The stripe of a position, its place in there, and the bytes from there to the stripe's end.
    #[allow(clippy::cast_possible_truncation, reason = "a stripe is at most 1 MiB")]
    fn in_stripe(&self, position: u64) -> (u64, usize, usize) {
        let stripe_bytes = self.top().stripe_bytes();
        let within = position % stripe_bytes;
        (
            position / stripe_bytes,
            within as usize,
            (stripe_bytes - within) as usize,
        )
    }

    // The first layer from `first` on that has the stripe.
    fn stripe_place(&self, stripe: u64, first: usize) -> Place {
        let lower = self.layers.iter().enumerate().skip(first);
        for (index, layer) in lower {
            if layer.contains(stripe) {
                return Place::Layer(index);
            }
        }
        let start = stripe * self.top().stripe_bytes();
        match &self.bottom {
            Bottom::Raw(_, bytes) if start < *bytes => Place::Raw,
            Bottom::Source(_, bytes) if start < *bytes => Place::Absent,
            Bottom::Zero | Bottom::Raw(..) | Bottom::Source(..) => Place::Zero,
        }
    }

    // A raw image may end within a stripe, even within a sector; the reader fills that up.
    fn clip(&self, place: Place, offset: u64, len: u64) -> Segment {
        let end = match (&self.bottom, place) {
            (Bottom::Raw(_, bytes), Place::Raw) => bytes.next_multiple_of(512),
            _ => u64::MAX,
        };
        if offset >= end {
            let place = Place::Zero;
            return Segment { place, len };
        }
        Segment {
            place,
            len: len.min(end - offset),
        }
    }

    fn read_segment(&self, place: Place, part: &mut [u8], position: u64) -> io::Result<()> {
        let (storage, layer): (Option<&Arc<dyn Storage>>, Option<&Arc<StripedFile>>) = match place {
            Place::Layer(index) => (None, self.layers.get(index)),
            Place::Raw => match &self.bottom {
                Bottom::Raw(storage, _) => (Some(storage), None),
                Bottom::Zero | Bottom::Source(..) => (None, None),
            },
            Place::Zero | Place::Absent => (None, None),
        };
        // Around what was asked for, as O_DIRECT may need it.
        let block = MEMORY_ALIGNMENT as u64;
        let start = position - position % block;
        let before = usize::try_from(position - start).map_err(io::Error::other)?;
        let span = (before + part.len()).next_multiple_of(MEMORY_ALIGNMENT);
        let mut buffer = buffer(span)?;
        match (storage, layer) {
            (Some(storage), _) => storage.read_at(buffer.as_mut_slice(), start)?,
            (None, Some(layer)) => layer.read_data(buffer.as_mut_slice(), start)?,
            (None, None) => {}
        }
        let bytes = buffer.as_slice().get(before..before + part.len());
        part.copy_from_slice(bytes.unwrap_or_default());
        Ok(())
    }

    // Writes a whole stripe to the top layer: what is below, with a part of it changed.
    fn bring_up(
        &self,
        stripe: u64,
        within: usize,
        len: usize,
        change: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        let stripe_bytes = self.top().stripe_bytes();
        let size = usize::try_from(stripe_bytes).map_err(io::Error::other)?;
        let start = stripe * stripe_bytes;
        let mut whole = buffer(size)?;
        if len < size {
            self.read(whole.as_mut_slice(), start)?;
        }
        change(
            whole
                .as_mut_slice()
                .get_mut(within..within + len)
                .unwrap_or_default(),
        );
        self.top().write_data(whole.as_mut_slice(), start)?;
        self.top().insert(stripe);
        Ok(())
    }

    fn lock_stripe(&self, stripe: u64) -> MutexGuard<'_, ()> {
        let index = usize::try_from(stripe % STRIPE_LOCKS as u64).unwrap_or(0);
        self.locks[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn buffer(bytes: usize) -> io::Result<AlignedBuffer> {
    AlignedBuffer::new(bytes, MEMORY_ALIGNMENT).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}
