use crate::{Address, NAME_LENGTH};

/// Guests of other hosts that one host can know, counted by their interfaces.
pub const REMOTE_STATIONS: u32 = 1 << 16;

/// Networks that span hosts.
pub const OVERLAYS: u32 = 4096;

/// This host's end of the tunnel to other hosts. All zeros: there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelEntry {
    /// The address that other hosts send to, and from which this one sends.
    pub address: Address,
    /// The VXLAN device.
    pub ifindex: u32,
    /// The UDP port, of all hosts.
    pub port: u16,
    /// How the host attached the program, for its own use: 1 TCX, 2 clsact.
    pub hook: u8,
    /// Zero.
    pub reserved: u8,
    /// The device's name, zero-terminated, for the host's use.
    pub name: [u8; NAME_LENGTH],
}

/// Where a guest of another host is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteStation {
    /// Its host's end of the tunnel.
    pub host: Address,
    /// The network's VXLAN network identifier (24 bits).
    pub vni: u32,
}
