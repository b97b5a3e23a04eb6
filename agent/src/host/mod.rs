//! What the agent does on its host: processes, control groups, network devices.

mod bridge;
mod captures;
mod cgroup;
mod flows;
mod guest_configuration;
mod inventory;
mod launch;
mod link;
mod network;
mod packet_events;
mod ports;
mod process;
mod rules;
mod services;
mod tap;
mod tunnel;
mod uplink;
mod usage;

pub use inventory::{Inventory, check_abilities};
pub use network::{GuestPort, HostNetwork, network_number};
pub use ports::HostPorts;
pub use process::{
    Exit, LaunchRequest, ProcessHandle, kill_recorded, recorded_process, write_atomically,
};
pub use rules::{ResolvedRule, Rules};
pub use tunnel::refuse_address as refuse_tunnel_address;
pub use uplink::{UplinkDevice, Watched, follow_devices, route_ipv4, route_ipv6};
pub use usage::Usage;
