//! Source NAT to uplinks and forwarded ports (maps `UPLINKS` and `NAT_*`).
//!
//! What is wanted is kept as a whole, and the maps are made to agree with it whenever it or the attached
//! interfaces change. Every step can be cut short: the next agent begins again from what it finds.

mod forwards;
mod guests;
mod pools;
mod statistics;
pub(crate) mod uplinks;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use keelson_ebpf_common::{NAT_POOLS, PolicyEntry};

pub use statistics::ExternalUse;

use crate::datapath::Datapath;
use crate::error::DatapathError;
use crate::policy::Protocol;

/// External addresses that a host can have for source NAT and forwards.
pub const MAX_EXTERNAL_ADDRESSES: usize = NAT_POOLS as usize;
/// Ports that a host can forward, all together.
pub const MAX_FORWARDED_PORTS: usize = keelson_ebpf_common::PORT_FORWARDS as usize;
/// External ports that one guest's interface can have at a time.
const MAPPINGS: RangeInclusive<u32> = 64..=65_536;

/// How guests of a network share addresses of an uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceNat {
    /// Number of the network, as [`InterfacePolicy::network`](crate::InterfacePolicy::network).
    pub network: u32,
    /// The interface by which guests reach the outside.
    pub uplink: String,
    /// The address of the uplink that IPv4 packets get; without one they leave as they are.
    pub ipv4: Option<Ipv4Addr>,
    /// The address that IPv6 packets get; without one they leave as they are.
    pub ipv6: Option<Ipv6Addr>,
    /// The ports that guests get of it. Whatever the host itself uses is to be apart from them.
    pub ports: RangeInclusive<u16>,
    /// External ports that each interface can have at a time; the least recently used make room.
    pub max_mappings: u32,
}

/// A port of an uplink's address that leads to a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortForward {
    /// The interface by which packets come.
    pub uplink: String,
    /// Its address.
    pub address: IpAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port of that address.
    pub port: u16,
    /// The guest's interface; what is forwarded to one that isn't attached waits until it is.
    pub interface: String,
    /// The guest's port. No other forward can have it: what the guest sends from there comes from `port`.
    pub guest_port: u16,
}

/// An address of an uplink.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ExternalAddress {
    uplink: String,
    address: IpAddr,
}

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nat {
    networks: BTreeMap<u32, SourceNat>,
    forwards: Vec<PortForward>,
    /// Each address with the ports that guests get of it.
    addresses: BTreeMap<ExternalAddress, RangeInclusive<u16>>,
}

/// The ports of an address that is there for forwards only.
#[allow(clippy::reversed_empty_ranges, reason = "it is to be empty")]
const NO_PORTS: RangeInclusive<u16> = 1..=0;

impl Datapath {
    /// Makes this the host's source NAT and its forwards; what stays as it was is not disturbed. Gives the
    /// names of uplinks that are not there: what was in force on them stays, for when they come back.
    ///
    /// # Errors
    /// [`DatapathError::InvalidNat`] before anything is changed; [`DatapathError::Hook`],
    /// [`DatapathError::Full`].
    pub fn set_nat(
        &mut self,
        networks: &[SourceNat],
        forwards: &[PortForward],
    ) -> Result<Vec<String>, DatapathError> {
        let wanted = Nat::new(networks, forwards)?;
        uplinks::check(&wanted)?;
        self.nat = Some(wanted.clone());
        let present = self.note_uplinks(&wanted)?;
        let pools = self.settle_pools(&wanted, &present)?;
        self.settle_nat_guests(&wanted, &pools)?;
        self.settle_forwards(&wanted, &pools)?;
        self.settle_addresses(&pools)?;
        self.settle_uplinks(&present)?;
        self.remove_pools_except(&pools)?;
        let missing = wanted.uplinks();
        Ok(missing
            .into_iter()
            .filter(|name| !present.contains_key(name))
            .collect())
    }

    /// After an interface was attached or changed: as [`Self::set_nat`], as far as that one is concerned.
    pub(crate) fn settle_nat(
        &mut self,
        ifindex: u32,
        entry: &PolicyEntry,
    ) -> Result<(), DatapathError> {
        let Some(wanted) = self.nat.take() else {
            return Ok(());
        };
        let settled = self.settle_nat_of(&wanted, ifindex, entry);
        self.nat = Some(wanted);
        settled
    }

    fn settle_nat_of(
        &mut self,
        wanted: &Nat,
        ifindex: u32,
        entry: &PolicyEntry,
    ) -> Result<(), DatapathError> {
        if wanted.addresses.is_empty() {
            return Ok(());
        }
        let pools = self.known_pools(wanted)?;
        self.settle_nat_guest(wanted, &pools, ifindex, entry)?;
        self.settle_forwards_to(wanted, &pools, entry)
    }
}

impl Nat {
    fn new(networks: &[SourceNat], forwards: &[PortForward]) -> Result<Self, DatapathError> {
        let mut nat = Self::default();
        for network in networks {
            network.validate()?;
            for address in network.external_addresses() {
                let taken = nat.addresses.insert(address, network.ports.clone());
                if taken.is_some_and(|taken| taken != network.ports) {
                    return Err(network.invalid(
                        "has other ports of the uplink's address than another network; give it the same",
                    ));
                }
            }
            if nat
                .networks
                .insert(network.network, network.clone())
                .is_some()
            {
                return Err(network.invalid("stands in the list twice"));
            }
        }
        forwards::check_unique(forwards)?;
        for forward in forwards {
            forward.validate()?;
            nat.addresses
                .entry(forward.external_address())
                .or_insert(NO_PORTS);
        }
        if nat.addresses.len() > MAX_EXTERNAL_ADDRESSES {
            return Err(DatapathError::Full {
                map: keelson_ebpf_common::map_name::NAT_POOLS,
            });
        }
        nat.forwards = forwards.to_vec();
        Ok(nat)
    }

    fn uplinks(&self) -> Vec<String> {
        let mut names: Vec<_> = self.addresses.keys().map(|a| a.uplink.clone()).collect();
        names.dedup();
        names
    }
}

impl SourceNat {
    fn external_addresses(&self) -> Vec<ExternalAddress> {
        let ipv4 = self.ipv4.map(IpAddr::from);
        let ipv6 = self.ipv6.map(IpAddr::from);
        let addresses = ipv4.into_iter().chain(ipv6);
        addresses
            .map(|address| ExternalAddress {
                uplink: self.uplink.clone(),
                address,
            })
            .collect()
    }

    fn validate(&self) -> Result<(), DatapathError> {
        if self.network == 0 {
            return Err(self.invalid("is in no network"));
        }
        if self.ports.is_empty() || *self.ports.start() == 0 {
            return Err(self.invalid("has no ports"));
        }
        if !MAPPINGS.contains(&self.max_mappings) {
            return Err(self.invalid("has a limit of ports outside of 64 to 65536"));
        }
        if self
            .external_addresses()
            .iter()
            .any(|external| is_nobodys(external.address))
        {
            return Err(self.invalid("has an address that can't be one host's"));
        }
        Ok(())
    }

    fn invalid(&self, problem: &str) -> DatapathError {
        DatapathError::InvalidNat {
            what: format!("source NAT of network {} to {}", self.network, self.uplink),
            problem: problem.to_owned(),
        }
    }
}

impl PortForward {
    fn external_address(&self) -> ExternalAddress {
        ExternalAddress {
            uplink: self.uplink.clone(),
            address: self.address,
        }
    }

    fn validate(&self) -> Result<(), DatapathError> {
        if !matches!(self.protocol, Protocol::Tcp | Protocol::Udp) {
            return Err(self.invalid("is neither TCP nor UDP"));
        }
        if self.port == 0 || self.guest_port == 0 {
            return Err(self.invalid("has a port of zero"));
        }
        if is_nobodys(self.address) {
            return Err(self.invalid("has an address that can't be one host's"));
        }
        Ok(())
    }

    fn invalid(&self, problem: &str) -> DatapathError {
        DatapathError::InvalidNat {
            what: format!("forward of {self}"),
            problem: problem.to_owned(),
        }
    }
}

fn is_nobodys(address: IpAddr) -> bool {
    address.is_unspecified() || address.is_multicast() || address.is_loopback()
}

impl fmt::Display for PortForward {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            uplink,
            address,
            protocol,
            port,
            ..
        } = self;
        write!(formatter, "{address} {protocol} {port} at {uplink}")
    }
}
