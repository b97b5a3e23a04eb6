//! Pages that the guest gives back to the host.

use std::io::Read;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{self, GuestMemory, PAGE, Ram};

/// The most page numbers that one chain is read for: what Linux sends at most is 256.
const MAX_LISTED: usize = 4096;

/// Gives back the pages whose numbers, of 4 KiB pages, are in the chain's buffers (5.5.6).
pub fn give_back_listed(memory: &GuestMemory, chain: DescriptorChain<GuestMemory>) {
    let Ok(reader) = chain.reader(&**memory) else {
        tracing::debug!("an inflation's buffers are not usable");
        return;
    };
    let mut numbers = Vec::new();
    let most = MAX_LISTED * size_of::<u32>();
    if reader.take(most as u64).read_to_end(&mut numbers).is_err() {
        return;
    }
    let (numbers, _) = numbers.as_chunks::<4>();
    let mut range: Option<(u64, u64)> = None;
    for number in numbers {
        let page = u64::from(u32::from_le_bytes(*number));
        range = Some(match range {
            Some((first, count)) if first + count == page => (first, count + 1),
            // Linux' balloon is filled from above.
            Some((first, count)) if page + 1 == first => (page, count + 1),
            Some((first, count)) => {
                give_back(memory, first * PAGE, count * PAGE);
                (page, 1)
            }
            None => (page, 1),
        });
    }
    if let Some((first, count)) = range {
        give_back(memory, first * PAGE, count * PAGE);
    }
}

/// Gives back the buffers themselves, which are free pages (5.5.6.7); returns the bytes.
pub fn give_back_buffers(memory: &GuestMemory, chain: DescriptorChain<GuestMemory>) -> u64 {
    let buffers = chain
        .writable()
        .map(|descriptor| give_back(memory, descriptor.addr().0, u64::from(descriptor.len())));
    buffers.sum()
}

/// Gives back the whole pages of a range, as far as it is RAM; returns the bytes.
fn give_back(ram: &Ram, address: u64, length: u64) -> u64 {
    let end = address.saturating_add(length) / PAGE * PAGE;
    let whole = address.checked_next_multiple_of(PAGE).and_then(|first| {
        let length = end.checked_sub(first).filter(|length| *length > 0)?;
        Some((first, length))
    });
    let Some((first, length)) = whole else {
        return 0;
    };
    // A guest's range doesn't cross the hole, for there is none of its pages in it.
    let Some((region, start)) = ram.to_region_addr(GuestAddress(first)) else {
        tracing::debug!("the guest gives back {first:#x}, which is no RAM");
        return 0;
    };
    let length = length.min(region.len().saturating_sub(start.0));
    match memory::discard(region, start, length) {
        Ok(()) => length,
        Err(e) => {
            tracing::debug!("{length} bytes at {first:#x} can't be given back: {e}");
            0
        }
    }
}
