//! Copies packets of captured interfaces for whoever reads them (maps `CAPTURING`, `CAPTURED`). What is
//! not captured costs one look at the policy's flags.

use core::hint::black_box;
use core::slice;

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes};
use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{CaptureHeader, Direction, PolicyEntry, SNAP_LIMIT, flag};

use network_types::eth::EthHdr;

use crate::frame;
use crate::maps::{CAPTURED, CAPTURING};

/// `BPF_RB_NO_WAKEUP`: the reader looks by itself.
const NO_WAKEUP: u64 = 1;

/// Copies a packet as it came, before anyone answers it in place. What is copied is found again by
/// `end`: whatever were handed over would have the verifier go through the whole decision once more.
#[inline(always)]
pub fn begin(packet: &TcContext, policy: &PolicyEntry) {
    if policy.flags & flag::CAPTURED == 0 {
        return;
    }
    let Some(record) = CAPTURING.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: the map is per CPU and the tc hooks run with preemption off: no one else has it.
    let record = unsafe { &mut *record };
    record.header.captured = 0;
    // The verifier must see both bounds on the very number that the helper gets; before Linux 6.8 it
    // learns nothing from a comparison with zero.
    let length = black_box(packet.len().min(SNAP_LIMIT as u32));
    if length < EthHdr::LEN as u32 || length > SNAP_LIMIT as u32 {
        return;
    }
    let data = (&raw mut record.data).cast();
    // SAFETY: the data has room for `length` bytes.
    if unsafe { bpf_skb_load_bytes(packet.skb.skb.cast(), 0, data, length) } == 0 {
        record.header.captured = length as u16;
    }
}

/// Hands a copied packet over, with what became of it: a [`CaptureHeader::verdict`].
#[inline(always)]
pub fn end(
    packet: &TcContext,
    policy: &PolicyEntry,
    direction: Direction,
    length: u32,
    verdict: u8,
) {
    if policy.flags & flag::CAPTURED == 0 {
        return;
    }
    let Some(record) = CAPTURING.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: see `begin`.
    let header = unsafe { &mut (*record).header };
    let captured = usize::from(header.captured);
    if captured < EthHdr::LEN || captured > SNAP_LIMIT {
        return;
    }
    // SAFETY: the helper has no preconditions.
    header.time_ns = unsafe { bpf_ktime_get_ns() };
    header.ifindex = frame::ifindex(packet);
    header.length = length;
    header.direction = direction as u8;
    header.verdict = verdict;
    // SAFETY: the record has the header and `captured` bytes behind it.
    let bytes =
        unsafe { slice::from_raw_parts(record.cast(), size_of::<CaptureHeader>() + captured) };
    let is_written = CAPTURED.output::<[u8]>(bytes, NO_WAKEUP).is_ok();
    // SAFETY: see `begin`.
    let header = unsafe { &mut (*record).header };
    header.lost = if is_written { 0 } else { header.lost + 1 };
}
