//! The compiled programs, loaded with the pinned maps.

use std::error::Error;
use std::io;

use aya::maps::{
    Array, ArrayOfMaps, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuHashMap,
    ProgramArray, RingBuf,
};
use aya::programs::{ProgramError, SchedClassifier};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfError, EbpfLoader};
use keelson_ebpf_common::{
    Address, Bucket, CounterKey, DirectionTallies, ExternalKey, ForwardKey, ForwardedPort,
    GatewayEntry, Limit, NatGuest, NatPool, NatSlot, NearStation, Neighbour, NeighbourKey, PeerKey,
    PolicyEntry, PortKey, RemoteStation, RuleKey, Served, ServedKey, ServiceEntry, ServiceKey,
    StationKey, Tally, TunnelEntry, UplinkEntry, map_name, program_name, stage,
};

use crate::error::DatapathError;
use crate::inner_map::InnerMaps;
use crate::kernel;
use crate::pin_root::PinRoot;

/// Of one program.
const LOAD_ATTEMPTS: u32 = 5;

/// What ebpf/programs was compiled to, aligned as the ELF reader wants it.
static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/programs.o")));

#[repr(C, align(32))]
struct Aligned<T: ?Sized>(T);

/// The loaded programs and the maps that the host writes.
pub struct Object {
    // Owns the programs.
    ebpf: Ebpf,
    pub policies: HashMap<MapData, u32, PolicyEntry>,
    pub peer_classes: LpmTrie<MapData, PeerKey, u32>,
    pub allowed_ports: LpmTrie<MapData, PortKey, u64>,
    pub flows: ArrayOfMaps<MapData>,
    pub opening_flows: ArrayOfMaps<MapData>,
    pub fragments: ArrayOfMaps<MapData>,
    pub inner: InnerMaps,
    pub services: HashMap<MapData, ServiceKey, ServiceEntry>,
    pub served: PerCpuHashMap<MapData, ServedKey, Served>,
    pub translations: ArrayOfMaps<MapData>,
    pub gateways: HashMap<MapData, u32, GatewayEntry>,
    pub stations: HashMap<MapData, StationKey, u32>,
    pub near_stations: Array<MapData, NearStation>,
    pub neighbours: HashMap<MapData, NeighbourKey, Neighbour>,
    pub uplinks: HashMap<MapData, u32, UplinkEntry>,
    pub nat_addresses: HashMap<MapData, ExternalKey, u32>,
    pub nat_pools: Array<MapData, NatPool>,
    pub nat_ports: ArrayOfMaps<MapData>,
    pub nat_guests: HashMap<MapData, Address, NatGuest>,
    pub nat_slots: Array<MapData, NatSlot>,
    pub nat_mappings: ArrayOfMaps<MapData>,
    pub nat_forwards: HashMap<MapData, ForwardKey, ForwardedPort>,
    pub translated: PerCpuArray<MapData, Tally>,
    pub tunnel: Array<MapData, TunnelEntry>,
    pub overlays: HashMap<MapData, u32, u32>,
    pub remote_stations: HashMap<MapData, StationKey, RemoteStation>,
    pub remote_neighbours: HashMap<MapData, NeighbourKey, Neighbour>,
    pub tunnelled: PerCpuArray<MapData, Tally>,
    pub passed: PerCpuArray<MapData, Tally>,
    pub dropped: PerCpuHashMap<MapData, CounterKey, DirectionTallies>,
    pub allowed: PerCpuHashMap<MapData, RuleKey, Tally>,
    pub limits: Array<MapData, Limit>,
    pub buckets: Array<MapData, Bucket>,
    pub question_times: Array<MapData, u64>,
    pub observed: Array<MapData, u32>,
    /// Until someone takes it.
    pub captured: Option<RingBuf<MapData>>,
    /// Until someone takes it.
    pub questions: Option<RingBuf<MapData>>,
    /// Until someone takes it.
    pub events: Option<RingBuf<MapData>>,
}

impl Object {
    /// Opens or creates the maps and loads the programs. Attaches nothing.
    pub fn load(root: &PinRoot) -> Result<Self, DatapathError> {
        require_kernel()?;
        let mut loader = EbpfLoader::new();
        for name in map_name::ALL {
            loader.map_pin_path(name, root.map(name));
        }
        let mut ebpf = loader.load(&OBJECT.0).map_err(|error| load_error(&error))?;
        for name in program_name::ALL {
            load_program(program(&mut ebpf, name)?).map_err(|error| program_error(name, &error))?;
        }
        let inner = InnerMaps::new(&OBJECT.0, program(&mut ebpf, program_name::FROM_GUEST)?)?;
        Ok(Self {
            inner,
            policies: take(&mut ebpf, map_name::POLICIES)?,
            peer_classes: take(&mut ebpf, map_name::PEER_CLASSES)?,
            allowed_ports: take(&mut ebpf, map_name::ALLOWED_PORTS)?,
            flows: take(&mut ebpf, map_name::FLOWS)?,
            opening_flows: take(&mut ebpf, map_name::OPENING_FLOWS)?,
            fragments: take(&mut ebpf, map_name::FRAGMENTS)?,
            services: take(&mut ebpf, map_name::SERVICES)?,
            served: take(&mut ebpf, map_name::SERVED)?,
            translations: take(&mut ebpf, map_name::TRANSLATIONS)?,
            gateways: take(&mut ebpf, map_name::GATEWAYS)?,
            stations: take(&mut ebpf, map_name::STATIONS)?,
            near_stations: take(&mut ebpf, map_name::NEAR_STATIONS)?,
            neighbours: take(&mut ebpf, map_name::NEIGHBOURS)?,
            uplinks: take(&mut ebpf, map_name::UPLINKS)?,
            nat_addresses: take(&mut ebpf, map_name::NAT_ADDRESSES)?,
            nat_pools: take(&mut ebpf, map_name::NAT_POOLS)?,
            nat_ports: take(&mut ebpf, map_name::NAT_PORTS)?,
            nat_guests: take(&mut ebpf, map_name::NAT_GUESTS)?,
            nat_slots: take(&mut ebpf, map_name::NAT_SLOTS)?,
            nat_mappings: take(&mut ebpf, map_name::NAT_MAPPINGS)?,
            nat_forwards: take(&mut ebpf, map_name::NAT_FORWARDS)?,
            translated: take(&mut ebpf, map_name::TRANSLATED)?,
            tunnel: take(&mut ebpf, map_name::TUNNEL)?,
            overlays: take(&mut ebpf, map_name::OVERLAYS)?,
            remote_stations: take(&mut ebpf, map_name::REMOTE_STATIONS)?,
            remote_neighbours: take(&mut ebpf, map_name::REMOTE_NEIGHBOURS)?,
            tunnelled: take(&mut ebpf, map_name::TUNNELLED)?,
            passed: take(&mut ebpf, map_name::PASSED)?,
            dropped: take(&mut ebpf, map_name::DROPPED)?,
            allowed: take(&mut ebpf, map_name::ALLOWED)?,
            limits: take(&mut ebpf, map_name::LIMITS)?,
            buckets: take(&mut ebpf, map_name::BUCKETS)?,
            question_times: take(&mut ebpf, map_name::QUESTION_TIMES)?,
            observed: take(&mut ebpf, map_name::OBSERVED)?,
            captured: Some(take(&mut ebpf, map_name::CAPTURED)?),
            questions: Some(take(&mut ebpf, map_name::QUESTIONS)?),
            events: Some(take(&mut ebpf, map_name::EVENTS)?),
            ebpf,
        })
    }

    /// A loaded program by its name in the object.
    pub fn program(&mut self, name: &'static str) -> Result<&mut SchedClassifier, DatapathError> {
        program(&mut self.ebpf, name)
    }

    /// Lets the programs find those that they go on with; the map is pinned, so that it keeps them. Those of an earlier
    /// agent that are attached go on with them from now on: whatever they read is there before.
    pub fn set_stages(&mut self) -> Result<(), DatapathError> {
        let mut stages: ProgramArray<MapData> = take(&mut self.ebpf, map_name::STAGES)?;
        for (index, name) in [
            (stage::SERVICE_FROM_GUEST, program_name::SERVICE_FROM_GUEST),
            (stage::FROM_CLIENT, program_name::FROM_CLIENT),
            (stage::SERVICE_TO_GUEST, program_name::SERVICE_TO_GUEST),
            (stage::CLAIM_PORT, program_name::CLAIM_PORT),
            (stage::TO_UPLINK, program_name::TO_UPLINK),
            (stage::TO_PEER, program_name::TO_PEER),
            (stage::TURN_BACK, program_name::TURN_BACK),
            (stage::JUDGE_FROM_GUEST, program_name::JUDGE_FROM_GUEST),
            (stage::JUDGE_TO_GUEST, program_name::JUDGE_TO_GUEST),
        ] {
            let program = program(&mut self.ebpf, name)?.fd();
            let program = program.map_err(|error| program_error(name, &error))?;
            stages
                .set(index, program, 0)
                .map_err(DatapathError::map("write", map_name::STAGES))?;
        }
        Ok(())
    }
}

/// The verifier gives up with EAGAIN where a signal is pending, and takes long enough for that.
fn load_program(program: &mut SchedClassifier) -> Result<(), ProgramError> {
    for _ in 1..LOAD_ATTEMPTS {
        match program.load() {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
    program.load()
}

/// Debian 12's kernel is the oldest that the project is tried on.
fn require_kernel() -> Result<(), DatapathError> {
    if kernel::is_at_least(KernelVersion::new(6, 1, 0)) {
        return Ok(());
    }
    Err(DatapathError::KernelTooOld {
        found: kernel::release(),
        required: "6.1",
        needs: "the eBPF network",
    })
}

fn program<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, DatapathError> {
    ebpf.program_mut(name)
        .and_then(|program| <&mut SchedClassifier>::try_from(program).ok())
        .ok_or_else(|| DatapathError::Load {
            what: format!("the program {name}"),
            problem: "it is not in the object".into(),
        })
}

fn take<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, DatapathError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or_else(|| DatapathError::Load {
        what: format!("the map {name}"),
        problem: "it is not in the object".into(),
    })?;
    T::try_from(map).map_err(DatapathError::map("use", name))
}

fn load_error(error: &EbpfError) -> DatapathError {
    let what = "the maps of the eBPF object".to_owned();
    if let Some(error) = not_permitted(error, "to create BPF maps") {
        return error;
    }
    DatapathError::Load {
        what,
        problem: chain(error),
    }
}

fn program_error(name: &str, error: &ProgramError) -> DatapathError {
    if let Some(error) = not_permitted(error, "to load a BPF program") {
        return error;
    }
    DatapathError::Load {
        what: format!("the program {name}"),
        problem: chain(error),
    }
}

fn not_permitted(error: &(dyn Error + 'static), action: &str) -> Option<DatapathError> {
    let mut next = Some(error);
    while let Some(error) = next {
        let errno = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error);
        if errno == Some(libc::EPERM) {
            return Some(DatapathError::NotPermitted {
                action: action.to_owned(),
            });
        }
        next = error.source();
    }
    None
}

/// The error and its causes in one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
