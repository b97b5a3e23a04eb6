//! Makes pinned maps look as the program with layout 5 left them.

use std::fs;

use aya::maps::{Array, HashMap, Map, MapData};
use keelson_ebpf::DatapathConfig;

type Bytes = [u8; 88];

fn open(path: &std::path::Path) -> Map {
    let data =
        MapData::from_pin(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Map::from_map_data(data).expect("a map")
}

/// Gives the policies the form that they had then, in the file that they had then, removes the maps that
/// came later, and says so. The programs that are attached go on with the map that they have.
pub fn make_older(config: &DatapathConfig) {
    let maps = config.pin_root.join("maps");
    let now: HashMap<MapData, u32, Bytes> =
        open(&maps.join("POLICIES_6")).try_into().expect("policies");
    let mut then = HashMap::<MapData, u32, Bytes>::create(4096, 0).expect("a map");
    for entry in &now {
        let (ifindex, mut bytes) = entry.expect("an entry");
        // Flags of two bytes and the hook; then, the hook and flags of one byte.
        let (flags, hook) = (bytes[64], bytes[66]);
        assert_eq!(bytes[65], 0);
        (bytes[64], bytes[65], bytes[66]) = (hook, flags, 0);
        then.insert(ifindex, bytes, 0).expect("written");
    }
    then.pin(maps.join("POLICIES")).expect("pinned");
    // The programs that are attached go on with these; without a file they would be gone.
    let stages = MapData::from_pin(maps.join("STAGES_7")).expect("stages");
    stages.pin(maps.join("STAGES")).expect("pinned");
    for later in [
        "POLICIES_6",
        "QUESTIONS",
        "QUESTION_TIMES",
        "STAGES_7",
        "NEAR_STATIONS_7",
    ] {
        fs::remove_file(maps.join(later)).expect("removed");
    }
    set_layout(config, 5);
}

pub fn set_layout(config: &DatapathConfig, layout: u64) {
    state(config).set(0, layout, 0).expect("written");
}

pub fn layout(config: &DatapathConfig) -> u64 {
    state(config).get(&0, 0).expect("read")
}

fn state(config: &DatapathConfig) -> Array<MapData, u64> {
    let state = open(&config.pin_root.join("state"));
    state.try_into().expect("an array")
}
