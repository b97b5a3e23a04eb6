//! What guests on this host have used.

use std::collections::BTreeMap;

use super::GuestPaths;
use crate::Agent;
use crate::host::{Usage, recorded_process};

/// What a guest has used since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestUsage {
    /// Its virtual machine.
    pub machine: Usage,
    /// Its disks' backends, all together.
    pub disks: Usage,
}

/// What each guest on this host has used.
pub fn usage(agent: &Agent) -> BTreeMap<String, GuestUsage> {
    let known = agent.guests.known_guests(&agent.config).into_iter();
    known
        .filter_map(|name| {
            let paths = GuestPaths::new(&agent.config, &name);
            let machine = Usage::of_process(recorded_process(&paths.vmm_record())?);
            let mut disks = Usage::default();
            for record in paths.disk_records() {
                let used = recorded_process(&record).map(Usage::of_process);
                let used = used.unwrap_or_default();
                disks.cpu += used.cpu;
                disks.memory_bytes += used.memory_bytes;
                disks.read_bytes += used.read_bytes;
                disks.written_bytes += used.written_bytes;
            }
            Some((name, GuestUsage { machine, disks }))
        })
        .collect()
}
