//! Takes over what an agent with an earlier layout of maps left, while its programs go on.
//!
//! A map whose entries have another form than before has another file, too: it is made beside the old one,
//! which the old programs go on reading, and gets its entries before any program reads it. Then each
//! interface's programs are replaced in place, and at last the layout's number is written, in one step.
//! Until then the old maps say what counts: an upgrade that is cut short begins anew. Maps that did not
//! change are shared by old and new programs meanwhile, flows among them.

use aya::maps::{HashMap, Map, MapData};
use keelson_ebpf_common::{LAYOUT_VERSION, PolicyEntry, map_name};

use crate::error::DatapathError;
use crate::object::Object;
use crate::pin_root::{self, PinRoot};

/// The layout since which a map's entries have had their form; zero for the first.
pub fn formed_in(map: &str) -> u64 {
    match map {
        map_name::POLICIES => 6,
        map_name::NEAR_STATIONS | map_name::STAGES | map_name::WORKSPACE => 7,
        _ => 0,
    }
}

/// Removes the new maps of an upgrade that was cut short. Programs that read them already go on with them.
pub fn begin(root: &PinRoot) -> Result<(), DatapathError> {
    let found = root.layout();
    for name in map_name::ALL {
        if formed_in(name) > found {
            pin_root::remove(&root.map(name))?;
        }
    }
    Ok(())
}

/// Fills the new maps from the old ones.
pub fn carry_over(root: &PinRoot, object: &mut Object) -> Result<(), DatapathError> {
    let found = root.layout();
    if found < 6 {
        carry_over_policies(root, object)?;
    }
    if found != LAYOUT_VERSION {
        tracing::info!(
            from = found,
            to = LAYOUT_VERSION,
            "taking over the maps of an earlier version"
        );
    }
    Ok(())
}

/// From now on the new maps count. After every interface's programs were replaced.
pub fn finish(root: &mut PinRoot) -> Result<(), DatapathError> {
    if root.layout() == LAYOUT_VERSION {
        return Ok(());
    }
    root.set_layout(LAYOUT_VERSION)?;
    root.remove_maps_except(&map_name::ALL.map(|name| root.map(name)))
}

/// Bytes of an entry up to layout 5: as now, but for one byte of flags, behind the hook.
type PolicyBytes = [u8; size_of::<PolicyEntry>()];
const HOOK_THEN: usize = 64;
const FLAGS_THEN: usize = 65;

fn carry_over_policies(root: &PinRoot, object: &mut Object) -> Result<(), DatapathError> {
    let path = root.map_of_layout(map_name::POLICIES, 0);
    if !path.exists() {
        return Ok(());
    }
    let before: HashMap<MapData, u32, PolicyBytes> = MapData::from_pin(&path)
        .and_then(Map::from_map_data)
        .and_then(HashMap::try_from)
        .map_err(DatapathError::map("open", map_name::POLICIES))?;
    for entry in &before {
        let (ifindex, bytes) = entry.map_err(DatapathError::map("read", map_name::POLICIES))?;
        object
            .policies
            .insert(ifindex, policy_of_layout_5(bytes), 0)
            .map_err(DatapathError::map("write", map_name::POLICIES))?;
    }
    Ok(())
}

fn policy_of_layout_5(mut bytes: PolicyBytes) -> PolicyEntry {
    let (hook, flags) = (bytes[HOOK_THEN], bytes[FLAGS_THEN]);
    bytes[HOOK_THEN..HOOK_THEN + 2].copy_from_slice(&u16::from(flags).to_ne_bytes());
    bytes[HOOK_THEN + 2] = hook;
    // SAFETY: an entry is made of integers without padding, any bytes of which are valid, and they need not
    // be aligned for this.
    unsafe { bytes.as_ptr().cast::<PolicyEntry>().read_unaligned() }
}
