//! Packets of interfaces, as they came, for whoever captures them.

use aya::maps::{MapData, RingBuf};
use keelson_ebpf_common::{
    CaptureHeader, Direction, DropReason, NOT_DROPPED, PolicyEntry, SNAP_LIMIT, flag,
};

use crate::datapath::{Datapath, entries};
use crate::error::DatapathError;
use crate::interface;

/// Bytes of a packet that are captured at most.
pub const MAX_SNAP_LENGTH: usize = SNAP_LIMIT;

/// A captured packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapturedPacket {
    /// When, in nanoseconds of the monotonic clock (`CLOCK_MONOTONIC`).
    pub time_ns: u64,
    /// The interface; empty if it is gone.
    pub interface: String,
    /// Which way the packet went.
    pub direction: Direction,
    /// Why it was dropped; `None` if it went on.
    pub dropped: Option<DropReason>,
    /// Bytes of the packet, from the Ethernet header on.
    pub length: u32,
    /// Packets of captured interfaces that were lost before this one, since nobody read fast enough.
    pub lost: u32,
    /// Its first bytes, at most [`MAX_SNAP_LENGTH`].
    pub data: Vec<u8>,
}

/// Reads captured packets; there is one of it.
pub struct CaptureReader {
    ring: RingBuf<MapData>,
}

impl Datapath {
    /// The reader of captured packets; `None` from the second call on.
    pub fn take_capture_reader(&mut self) -> Option<CaptureReader> {
        let ring = self.object.captured.take()?;
        Some(CaptureReader { ring })
    }

    /// Begins or ends to capture an interface's packets in both directions. It ends by itself when the
    /// datapath is opened anew. What nobody reads stays in the ring buffer, and later packets are lost.
    ///
    /// # Errors
    /// [`DatapathError::NotAttached`], [`DatapathError::Map`].
    pub fn capture(&mut self, interface: &str, wanted: bool) -> Result<(), DatapathError> {
        let (ifindex, entry) = self.find(interface)?;
        self.set_captured(ifindex, &entry, wanted)
    }

    /// Ends all captures.
    pub(crate) fn end_captures(&mut self) -> Result<(), DatapathError> {
        for (ifindex, entry) in entries(&self.object)? {
            self.set_captured(ifindex, &entry, false)?;
        }
        Ok(())
    }

    fn set_captured(
        &mut self,
        ifindex: u32,
        entry: &PolicyEntry,
        wanted: bool,
    ) -> Result<(), DatapathError> {
        let captured = if wanted { flag::CAPTURED } else { 0 };
        let flags = entry.flags & !flag::CAPTURED | captured;
        if flags == entry.flags {
            return Ok(());
        }
        self.write_entry(ifindex, PolicyEntry { flags, ..*entry })
    }
}

impl CaptureReader {
    /// The packets that are there, at most `limit`. Interface names are those of the calling thread's
    /// network namespace.
    pub fn read(&mut self, limit: usize) -> Vec<CapturedPacket> {
        let mut packets = Vec::new();
        while packets.len() < limit {
            let Some(item) = self.ring.next() else { break };
            packets.extend(translate(&item));
        }
        packets
    }
}

impl std::fmt::Debug for CaptureReader {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("CaptureReader")
            .finish_non_exhaustive()
    }
}

/// `None` if a later version wrote it.
fn translate(item: &[u8]) -> Option<CapturedPacket> {
    let (bytes, data) = item.split_at_checked(size_of::<CaptureHeader>())?;
    // SAFETY: these are the bytes of a header, any of which are valid; they need not be aligned for
    // this.
    let header: CaptureHeader = unsafe { bytes.as_ptr().cast::<CaptureHeader>().read_unaligned() };
    let dropped = match header.verdict {
        NOT_DROPPED => None,
        reason => Some(*DropReason::ALL.get(usize::from(reason))?),
    };
    Some(CapturedPacket {
        time_ns: header.time_ns,
        interface: interface::name(header.ifindex).unwrap_or_default(),
        direction: match header.direction {
            0 => Direction::FromGuest,
            _ => Direction::ToGuest,
        },
        dropped,
        length: header.length,
        lost: header.lost,
        data: data.to_vec(),
    })
}
