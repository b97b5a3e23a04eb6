//! The maps, all pinned by the host under the names they have here.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{self, ArrayOfMaps};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{
    Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, ProgramArray, RingBuf,
};
use keelson_ebpf_common::{
    Address, Bucket, CAPTURED_BYTES, COUNTED_BACKENDS, CaptureRecord, CounterKey, DirectionTallies,
    EVENTS_BYTES, ExternalKey, FlowKey, FlowState, ForwardKey, ForwardedPort, FragmentKey,
    FragmentState, GatewayEntry, Limit, Mapping, MappingKey, NAT_FRAGMENTS as NAT_FRAGMENT_COUNT,
    NAT_POOLS as POOL_COUNT, NEAR_STATION_PLACES, NatClaim, NatFragment, NatFragmentKey, NatGuest,
    NatPool, NatSlot, NearStation, Neighbour, NeighbourKey, OVERLAYS as OVERLAY_COUNT, POOL_PORTS,
    PORT_FORWARDS, PeerKey, PolicyEntry, PortKey, QUESTIONS_BYTES,
    REMOTE_STATIONS as REMOTE_STATION_COUNT, RemoteStation, RuleKey, SERVICES as SERVICE_COUNT,
    SLOTS, Served, ServedKey, ServiceEntry, ServiceKey, StationKey, Tally, Translation,
    TranslationKey, TunnelEntry, UplinkEntry, Workspace, stage,
};

use crate::ip::Ip;

/// Interface index → what the programs enforce there.
#[map]
pub static POLICIES: HashMap<u32, PolicyEntry> = HashMap::with_max_entries(SLOTS, 0);

/// Rule table and peer address → class of peers.
#[map]
pub static PEER_CLASSES: LpmTrie<PeerKey, u32> =
    LpmTrie::with_max_entries(1 << 22, BPF_F_NO_PREALLOC);

/// Class of peers, protocol and port → counter of the rule that allows it.
#[map]
pub static ALLOWED_PORTS: LpmTrie<PortKey, u64> =
    LpmTrie::with_max_entries(1 << 22, BPF_F_NO_PREALLOC);

/// Flows of one interface. The host makes them, as large as it wants; the least recently used go
/// first when one is full.
pub type Flows = btf_maps::LruHashMap<FlowKey, FlowState, 1>;

/// Slot → the interface's flows in which both sides have sent.
#[btf_map]
pub static FLOWS: ArrayOfMaps<Flows, { SLOTS as usize }> = ArrayOfMaps::new();

/// Slot → the interface's flows in which only one side has sent: a flood of these can't push out
/// the others.
#[btf_map]
pub static OPENING_FLOWS: ArrayOfMaps<Flows, { SLOTS as usize }> = ArrayOfMaps::new();

/// Fragmented datagrams of one interface whose first fragment passed.
pub type Fragments = btf_maps::LruHashMap<FragmentKey, FragmentState, 1>;

/// Slot → the interface's fragmented datagrams.
#[btf_map]
pub static FRAGMENTS: ArrayOfMaps<Fragments, { SLOTS as usize }> = ArrayOfMaps::new();

/// Network and MAC address → index of the guest's interface on this host.
#[map]
pub static STATIONS: HashMap<StationKey, u32> = HashMap::with_max_entries(SLOTS, 0);

/// A place that follows from a network and a MAC address → who has it, of those in `STATIONS`: found without a call.
#[map]
pub static NEAR_STATIONS: Array<NearStation> = Array::with_max_entries(NEAR_STATION_PLACES, 0);

/// Network and address → who has it.
#[map]
pub static NEIGHBOURS: HashMap<NeighbourKey, Neighbour> =
    HashMap::with_max_entries(3 * SLOTS, BPF_F_NO_PREALLOC);

/// Address, protocol and port → who answers for a service.
#[map]
pub static SERVICES: HashMap<ServiceKey, ServiceEntry> =
    HashMap::with_max_entries(SERVICE_COUNT, BPF_F_NO_PREALLOC);

/// Service and backend → what went between it and its clients. The host creates the entries.
#[map]
pub static SERVED: PerCpuHashMap<ServedKey, Served> =
    PerCpuHashMap::with_max_entries(COUNTED_BACKENDS + 2 * SERVICE_COUNT, BPF_F_NO_PREALLOC);

/// What packets of the services that one interface uses become.
pub type Translations = btf_maps::LruHashMap<TranslationKey, Translation, 1>;

/// Slot → the interface's translations; slot zero is the host's.
#[btf_map]
pub static TRANSLATIONS: ArrayOfMaps<Translations, { SLOTS as usize }> = ArrayOfMaps::new();

/// What a CPU has at hand while it translates a packet.
#[map]
pub static WORKSPACE: PerCpuArray<Workspace> = PerCpuArray::with_max_entries(1, 0);

/// What the headers of the packet that a CPU is at said.
#[map]
pub static HEADERS: PerCpuArray<Ip> = PerCpuArray::with_max_entries(1, 0);

/// Interface index of a bridge → its network.
#[map]
pub static GATEWAYS: HashMap<u32, GatewayEntry> = HashMap::with_max_entries(SLOTS, 0);

/// The programs that others go on with.
#[map]
pub static STAGES: ProgramArray = ProgramArray::with_max_entries(stage::COUNT, 0);

/// Slot and direction → what went on.
#[map]
pub static PASSED: PerCpuArray<Tally> = PerCpuArray::with_max_entries(2 * SLOTS, 0);

/// Interface and direction → what was dropped. The host creates the entries.
#[map]
pub static DROPPED: PerCpuHashMap<CounterKey, DirectionTallies> =
    PerCpuHashMap::with_max_entries(2 * SLOTS, BPF_F_NO_PREALLOC);

/// Interface, direction and counter → what rules allowed. The host creates the entries.
#[map]
pub static ALLOWED: PerCpuHashMap<RuleKey, Tally> =
    PerCpuHashMap::with_max_entries(1 << 18, BPF_F_NO_PREALLOC);

/// Slot and direction → what may pass.
#[map]
pub static LIMITS: Array<Limit> = Array::with_max_entries(2 * SLOTS, 0);

/// Slot and direction → what was used of that.
#[map]
pub static BUCKETS: Array<Bucket> = Array::with_max_entries(2 * SLOTS, 0);

/// The packet that a CPU is capturing.
#[map]
pub static CAPTURING: PerCpuArray<CaptureRecord> = PerCpuArray::with_max_entries(1, 0);

/// Captured packets, for whoever reads them.
#[map]
pub static CAPTURED: RingBuf = RingBuf::with_byte_size(CAPTURED_BYTES, 0);

/// What guests ask the host about their configuration.
#[map]
pub static QUESTIONS: RingBuf = RingBuf::with_byte_size(QUESTIONS_BYTES, 0);

/// Slot → until when the questions that were asked are paid for.
#[map]
pub static QUESTION_TIMES: Array<u64> = Array::with_max_entries(SLOTS, 0);

/// What happened to packets, for whoever waits for it.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_BYTES, 0);

/// Which kinds of events someone waits for.
#[map]
pub static OBSERVED: Array<u32> = Array::with_max_entries(1, 0);

/// Interface index of an uplink → how the host attached the programs there; for the host.
#[map]
pub static UPLINKS: HashMap<u32, UplinkEntry> = HashMap::with_max_entries(POOL_COUNT, 0);

/// Uplink and address → the address's place in `NAT_POOLS`.
#[map]
pub static NAT_ADDRESSES: HashMap<ExternalKey, u32> = HashMap::with_max_entries(POOL_COUNT, 0);

/// External addresses, with the ports that guests get of them.
#[map]
pub static NAT_POOLS: Array<NatPool> = Array::with_max_entries(POOL_COUNT, 0);

/// Who has the ports of one external address.
pub type Ports = btf_maps::Array<u64, { POOL_PORTS as usize }>;

/// Place in `NAT_POOLS` → the ports of that address.
#[btf_map]
pub static NAT_PORTS: ArrayOfMaps<Ports, { POOL_COUNT as usize }> = ArrayOfMaps::new();

/// A guest's address → what its packets get at an uplink.
#[map]
pub static NAT_GUESTS: HashMap<Address, NatGuest> =
    HashMap::with_max_entries(2 * SLOTS, BPF_F_NO_PREALLOC);

/// Slot → the addresses of the interface that has it.
#[map]
pub static NAT_SLOTS: Array<NatSlot> = Array::with_max_entries(SLOTS, 0);

/// External ports of one interface. The host makes them, as many as it wants; the least recently used
/// go first.
pub type Mappings = btf_maps::LruHashMap<MappingKey, Mapping, 1>;

/// Slot → the interface's external ports.
#[btf_map]
pub static NAT_MAPPINGS: ArrayOfMaps<Mappings, { SLOTS as usize }> = ArrayOfMaps::new();

/// The port that a CPU is looking for an external one for.
#[map]
pub static NAT_CLAIMS: PerCpuArray<NatClaim> = PerCpuArray::with_max_entries(1, 0);

/// A guest's port → the external one that is forwarded to it.
#[map]
pub static NAT_FORWARDS: HashMap<ForwardKey, ForwardedPort> =
    HashMap::with_max_entries(PORT_FORWARDS, BPF_F_NO_PREALLOC);

/// Fragmented datagrams to external addresses whose first fragment came.
#[map]
pub static NAT_FRAGMENTS: LruHashMap<NatFragmentKey, NatFragment> =
    LruHashMap::with_max_entries(NAT_FRAGMENT_COUNT, 0);

/// External address and direction → what was translated.
#[map]
pub static TRANSLATED: PerCpuArray<Tally> = PerCpuArray::with_max_entries(2 * POOL_COUNT, 0);

/// The host's end of the tunnel to other hosts.
#[map]
pub static TUNNEL: Array<TunnelEntry> = Array::with_max_entries(1, 0);

/// VXLAN network identifier → number of the network.
#[map]
pub static OVERLAYS: HashMap<u32, u32> =
    HashMap::with_max_entries(OVERLAY_COUNT, BPF_F_NO_PREALLOC);

/// Network and MAC address → where the guest is, of guests of other hosts.
#[map]
pub static REMOTE_STATIONS: HashMap<StationKey, RemoteStation> =
    HashMap::with_max_entries(REMOTE_STATION_COUNT, BPF_F_NO_PREALLOC);

/// Network and address → who has it on another host.
#[map]
pub static REMOTE_NEIGHBOURS: HashMap<NeighbourKey, Neighbour> =
    HashMap::with_max_entries(3 * REMOTE_STATION_COUNT, BPF_F_NO_PREALLOC);

/// Direction → what passed the tunnel.
#[map]
pub static TUNNELLED: PerCpuArray<Tally> = PerCpuArray::with_max_entries(2, 0);
