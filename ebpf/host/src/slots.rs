//! What each attached interface has of its own in the maps that hold one element or one map per
//! interface: its flows, its fragments, its count of passed packets.

use aya::maps::{ArrayOfMaps, MapData, PerCpuValues};
use keelson_ebpf_common::{Direction, SLOTS, Tally, map_name, passed_index};

use crate::error::DatapathError;
use crate::object::Object;

/// Datagrams in fragments that one guest can have on the way at a time.
const FRAGMENTED_DATAGRAMS: u32 = 1024;
/// Flows that wait for their first answer, as a part of all.
const OPENING_PART: u32 = 4;
/// Translations of services, as a part of all flows.
const TRANSLATIONS_PART: u32 = 2;

/// The lowest slot that none of `taken` has. Slot zero is nobody's.
pub fn lowest_free(taken: impl Iterator<Item = u32>) -> Result<u32, DatapathError> {
    let taken: std::collections::BTreeSet<u32> = taken.collect();
    (1..SLOTS)
        .find(|slot| !taken.contains(slot))
        .ok_or(DatapathError::Full {
            map: map_name::POLICIES,
        })
}

/// Gives a slot empty maps for `max_flows` flows, and sets its counters to zero. Before any policy
/// refers to the slot.
pub fn fill(object: &mut Object, slot: u32, max_flows: u32) -> Result<(), DatapathError> {
    set_maps(
        object,
        slot,
        max_flows,
        max_flows / OPENING_PART,
        FRAGMENTED_DATAGRAMS,
    )?;
    for direction in [Direction::FromGuest, Direction::ToGuest] {
        let zeros = per_cpu(Tally::default())?;
        object
            .passed
            .set(passed_index(slot, direction), zeros, 0)
            .map_err(DatapathError::map("write", map_name::PASSED))?;
    }
    object
        .question_times
        .set(slot, 0, 0)
        .map_err(DatapathError::map("write", map_name::QUESTION_TIMES))
}

/// Gives the memory of a slot's maps back. After no policy refers to it any more.
pub fn empty(object: &mut Object, slot: u32) -> Result<(), DatapathError> {
    set_maps(object, slot, 1, 1, 1)?;
    if translations(object, slot) > 0 {
        set_translations(object, slot, 1)?;
    }
    match capacity(&object.nat_mappings, slot) {
        0 => Ok(()),
        _ => set_mappings(object, slot, 1),
    }
}

/// Gives a slot a map of this many external ports, unless it has one.
pub fn ensure_mappings(object: &mut Object, slot: u32, limit: u32) -> Result<(), DatapathError> {
    if capacity(&object.nat_mappings, slot) == limit {
        return Ok(());
    }
    set_mappings(object, slot, limit)
}

fn set_mappings(object: &mut Object, slot: u32, limit: u32) -> Result<(), DatapathError> {
    let mappings = object.inner.create(map_name::NAT_MAPPINGS, limit)?;
    object
        .nat_mappings
        .set(slot, &mappings, 0)
        .map_err(DatapathError::map("write", map_name::NAT_MAPPINGS))
}

/// Gives a slot a map of the translations of services, unless it has one. Two for each flow, and not
/// all flows are with services.
pub fn ensure_translations(
    object: &mut Object,
    slot: u32,
    max_flows: u32,
) -> Result<(), DatapathError> {
    if translations(object, slot) > 1 {
        return Ok(());
    }
    set_translations(object, slot, max_flows / TRANSLATIONS_PART)
}

/// How many translations a slot has room for; zero where it has no map of them.
fn translations(object: &Object, slot: u32) -> u32 {
    capacity(&object.translations, slot)
}

/// How much a slot's map has room for; zero where it has none.
fn capacity(maps: &ArrayOfMaps<MapData>, slot: u32) -> u32 {
    let map = maps.get(&slot, 0);
    let info = map.ok().and_then(|map: MapData| map.info().ok());
    info.map_or(0, |info| info.max_entries())
}

fn set_translations(object: &mut Object, slot: u32, entries: u32) -> Result<(), DatapathError> {
    let translations = object.inner.create(map_name::TRANSLATIONS, entries)?;
    object
        .translations
        .set(slot, &translations, 0)
        .map_err(DatapathError::map("write", map_name::TRANSLATIONS))
}

fn set_maps(
    object: &mut Object,
    slot: u32,
    flows: u32,
    opening: u32,
    fragments: u32,
) -> Result<(), DatapathError> {
    let established = object.inner.create(map_name::FLOWS, flows)?;
    let opening = object.inner.create(map_name::OPENING_FLOWS, opening)?;
    let fragments = object.inner.create(map_name::FRAGMENTS, fragments)?;
    object
        .flows
        .set(slot, &established, 0)
        .map_err(DatapathError::map("write", map_name::FLOWS))?;
    object
        .opening_flows
        .set(slot, &opening, 0)
        .map_err(DatapathError::map("write", map_name::OPENING_FLOWS))?;
    object
        .fragments
        .set(slot, &fragments, 0)
        .map_err(DatapathError::map("write", map_name::FRAGMENTS))
}

/// The same value for each CPU.
pub fn per_cpu<T: aya::Pod>(value: T) -> Result<PerCpuValues<T>, DatapathError> {
    values(value, value)
}

/// A value for the first CPU, and the default for the others.
pub fn on_one_cpu<T: aya::Pod + Default>(value: T) -> Result<PerCpuValues<T>, DatapathError> {
    values(value, T::default())
}

fn values<T: aya::Pod>(first: T, others: T) -> Result<PerCpuValues<T>, DatapathError> {
    let cpus = aya::util::nr_cpus().map_err(|(path, error)| DatapathError::Load {
        what: "the number of CPUs".into(),
        problem: format!("{path}: {error}"),
    })?;
    let mut values = vec![others; cpus];
    if let Some(place) = values.first_mut() {
        *place = first;
    }
    PerCpuValues::try_from(values).map_err(|error| DatapathError::Load {
        what: "values for each CPU".into(),
        problem: error.to_string(),
    })
}
