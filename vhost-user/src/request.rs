//! From a descriptor chain to a virtio-blk request (virtio 1.2, 5.2.6).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use crate::descriptor_chain::{DescriptorChain, Segment};
use crate::image::SECTOR_SIZE;

const HEADER_SIZE: usize = 16;

/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_SIZE: usize = 16;

/// Most ranges in one request, told to the driver.
pub const MAX_RANGES: usize = 32;

/// Most sectors in one range, told to the driver: 1 GiB, so that no request takes long.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `VIRTIO_BLK_T_IN` from this sector on.
    Read {
        /// The first sector, of 512 bytes.
        sector: u64,
    },
    /// `VIRTIO_BLK_T_OUT` from this sector on.
    Write {
        /// The first sector, of 512 bytes.
        sector: u64,
    },
    /// `VIRTIO_BLK_T_FLUSH`.
    Flush,
    /// `VIRTIO_BLK_T_DISCARD`.
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`.
    WriteZeroes,
    /// `VIRTIO_BLK_T_GET_ID`.
    GetId,
    /// A type that this device doesn't offer.
    Unsupported(u32),
}

/// A request whose answer has a place to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What the guest asks for.
    pub operation: Operation,
    /// Where the status byte goes; known to be in guest memory.
    pub status: GuestAddress,
    /// Bytes of the data buffers in the direction of the operation.
    pub data_len: u64,
}

/// Why a chain is no request. The queue can't go on, since no status can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Fewer than 16 readable bytes, or they aren't in guest memory.
    #[error("the request's header is missing or outside guest memory")]
    Header,
    /// No writable byte, or it isn't in guest memory.
    #[error("the request's status byte is missing or outside guest memory")]
    Status,
}

/// Takes the header and the status byte off the chain and leaves the data buffers in it.
///
/// The framing is the driver's choice (virtio 1.2, 2.7.4.1): the header is the first 16
/// readable bytes and the status the last writable one, wherever descriptors begin and end.
pub fn parse(
    memory: &GuestMemoryMmap,
    chain: &mut DescriptorChain,
) -> Result<Request, RequestError> {
    let header = take_header(memory, &mut chain.readable)?;
    let status = take_status(memory, &mut chain.writable)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let operation = match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => Operation::Read { sector },
        VIRTIO_BLK_T_OUT => Operation::Write { sector },
        VIRTIO_BLK_T_FLUSH => Operation::Flush,
        VIRTIO_BLK_T_GET_ID => Operation::GetId,
        VIRTIO_BLK_T_DISCARD => Operation::Discard,
        VIRTIO_BLK_T_WRITE_ZEROES => Operation::WriteZeroes,
        other => Operation::Unsupported(other),
    };
    let data = match operation {
        Operation::Write { .. } | Operation::Discard | Operation::WriteZeroes => &chain.readable,
        _ => &chain.writable,
    };
    Ok(Request {
        operation,
        status,
        data_len: data.iter().map(|segment| u64::from(segment.len)).sum(),
    })
}

/// Where a transfer lies in the image in bytes, if it lies in the disk and in whole sectors.
///
/// `block` is the unit that both ends have to keep to, a multiple of 512 bytes.
pub fn transfer_offset(
    sector: u64,
    data_len: u64,
    capacity_sectors: u64,
    block: u64,
) -> Option<u64> {
    if !data_len.is_multiple_of(SECTOR_SIZE) {
        return None;
    }
    let end = sector.checked_add(data_len / SECTOR_SIZE)?;
    if end > capacity_sectors {
        return None;
    }
    let offset = sector.checked_mul(SECTOR_SIZE)?;
    (offset.is_multiple_of(block) && data_len.is_multiple_of(block)).then_some(offset)
}

/// A stretch of the disk to discard or to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether the space of zeroes may be given back.
    pub unmap: bool,
}

/// Why the ranges of a discard or write-zeroes request were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// No whole ranges, too many, or some outside the disk.
    Invalid,
    /// A flag that isn't known, or not allowed here.
    UnsupportedFlag,
}

impl RangeError {
    /// The status that virtio 1.2, 5.2.6.2 asks for.
    pub fn status(self) -> u32 {
        match self {
            Self::Invalid => VIRTIO_BLK_S_IOERR,
            Self::UnsupportedFlag => VIRTIO_BLK_S_UNSUPP,
        }
    }
}

/// Reads the `struct virtio_blk_discard_write_zeroes` of a request, replacing what is in `ranges`.
pub fn ranges(
    memory: &GuestMemoryMmap,
    data: &[Segment],
    zeroes: bool,
    capacity_sectors: u64,
    ranges: &mut Vec<Range>,
) -> Result<(), RangeError> {
    ranges.clear();
    let len: u64 = data.iter().map(|segment| u64::from(segment.len)).sum();
    let count = len / RANGE_SIZE as u64;
    if count == 0 || !len.is_multiple_of(RANGE_SIZE as u64) || count > MAX_RANGES as u64 {
        return Err(RangeError::Invalid);
    }
    let mut bytes = [0; RANGE_SIZE * MAX_RANGES];
    let mut filled = 0;
    for segment in data {
        let part = bytes.get_mut(filled..filled + segment.len as usize);
        let part = part.ok_or(RangeError::Invalid)?;
        memory
            .read_slice(part, segment.address)
            .map_err(|_| RangeError::Invalid)?;
        filled += part.len();
    }
    let (entries, _) = bytes[..filled].as_chunks::<RANGE_SIZE>();
    for entry in entries {
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = *entry;
        let sector = u64::from_le_bytes(sector);
        let sectors = u64::from(u32::from_le_bytes([n0, n1, n2, n3]));
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // Unmap is for zeroes only, and the other bits are reserved.
        if flags & !u32::from(zeroes) != 0 {
            return Err(RangeError::UnsupportedFlag);
        }
        if sector
            .checked_add(sectors)
            .is_none_or(|end| end > capacity_sectors)
            || sectors > u64::from(MAX_RANGE_SECTORS)
        {
            return Err(RangeError::Invalid);
        }
        ranges.push(Range {
            offset: sector * SECTOR_SIZE,
            len: sectors * SECTOR_SIZE,
            unmap: flags & 1 != 0,
        });
    }
    Ok(())
}

fn take_header(
    memory: &GuestMemoryMmap,
    readable: &mut Vec<Segment>,
) -> Result<[u8; HEADER_SIZE], RequestError> {
    let mut header = [0; HEADER_SIZE];
    let mut filled = 0;
    let mut used_up = 0;
    for segment in readable.iter_mut() {
        let Some(rest) = header.get_mut(filled..).filter(|rest| !rest.is_empty()) else {
            break;
        };
        let taken = rest.len().min(segment.len as usize);
        memory
            .read_slice(&mut rest[..taken], segment.address)
            .map_err(|_| RequestError::Header)?;
        filled += taken;
        if taken == segment.len as usize {
            used_up += 1;
        } else {
            segment.address = segment
                .address
                .checked_add(taken as u64)
                .ok_or(RequestError::Header)?;
            segment.len -= u32::try_from(taken).map_err(|_| RequestError::Header)?;
        }
    }
    if filled < HEADER_SIZE {
        return Err(RequestError::Header);
    }
    readable.drain(..used_up);
    Ok(header)
}

fn take_status(
    memory: &GuestMemoryMmap,
    writable: &mut Vec<Segment>,
) -> Result<GuestAddress, RequestError> {
    let last = writable.last_mut().ok_or(RequestError::Status)?;
    last.len -= 1;
    let status = last
        .address
        .checked_add(u64::from(last.len))
        .ok_or(RequestError::Status)?;
    if last.len == 0 {
        writable.pop();
    }
    if GuestMemory::check_range(memory, status, 1, Permissions::Write) {
        Ok(status)
    } else {
        Err(RequestError::Status)
    }
}
