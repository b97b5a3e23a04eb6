//! The maps, all pinned by the host under the names they have here.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, LpmTrie, LruHashMap, PerCpuHashMap};
use keelson_ebpf_common::{
    CounterKey, DirectionTallies, FlowKey, FlowState, FragmentKey, PolicyEntry, PortKey, SourceKey,
};

/// Interface index → what the programs enforce there.
#[map]
pub static POLICIES: HashMap<u32, PolicyEntry> = HashMap::with_max_entries(4096, 0);

/// Rule table and peer address → class of peers.
#[map]
pub static PEER_CLASSES: LpmTrie<SourceKey, u32> =
    LpmTrie::with_max_entries(1 << 20, BPF_F_NO_PREALLOC);

/// Class of peers, protocol and port → allowed; the value is never read.
#[map]
pub static ALLOWED_PORTS: LpmTrie<PortKey, u32> =
    LpmTrie::with_max_entries(1 << 22, BPF_F_NO_PREALLOC);

/// Flows that guests opened. The least recently used go first when it is full.
#[map]
pub static FLOWS: LruHashMap<FlowKey, FlowState> = LruHashMap::with_max_entries(1 << 17, 0);

/// Fragmented datagrams whose first fragment passed → when that was.
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, u64> = LruHashMap::with_max_entries(1 << 12, 0);

/// Interface and direction → counters. The host creates the entries.
#[map]
pub static COUNTERS: PerCpuHashMap<CounterKey, DirectionTallies> =
    PerCpuHashMap::with_max_entries(2 * 4096 + 2, BPF_F_NO_PREALLOC);
