//! How the vCPUs look to the guest, and where they run on the host.

use serde::{Deserialize, Serialize};

use super::{ConfigError, field};

/// APIC ids from here on are not for processors in the local APIC's 8-bit mode.
const APIC_ID_LIMIT: u32 = 255;
/// More than any host has (`CONFIG_NR_CPUS` of Linux on x86 is at most 8192).
const MAX_HOST_CPU: u16 = 8191;

/// How the vCPUs look to the guest, and where they run on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// How the vCPUs are arranged: one socket of cores with one thread each if not given.
    #[serde(default)]
    pub topology: Option<Topology>,
    /// The processor that the guest is shown.
    #[serde(default)]
    pub template: CpuTemplate,
    /// For each vCPU the host's processors that it may run on; empty, or as many lists as vCPUs.
    #[serde(default)]
    pub pinning: Vec<Vec<u16>>,
}

/// Sockets of cores of threads, together as many as vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Sockets, 1 to 64.
    pub sockets: u8,
    /// Cores of each socket, 1 to 64.
    pub cores: u8,
    /// Threads of each core, 1 to 64.
    pub threads: u8,
}

/// A processor that a guest is shown, so that it can move between hosts that have at least that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// All that the host's KVM supports.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// The features of x86-64-v2 (x86-64 psABI), with what virtual machines need besides.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// The features of x86-64-v3: AVX2, BMI, FMA and those of v2.
    #[serde(rename = "x86-64-v3")]
    V3,
}

impl CpuTemplate {
    /// Its name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
        }
    }
}

impl Topology {
    /// One socket of `vcpus` cores.
    pub const fn flat(vcpus: u8) -> Self {
        Self {
            sockets: 1,
            cores: vcpus,
            threads: 1,
        }
    }

    /// Bits of an APIC id that number the threads of a core.
    pub fn thread_bits(self) -> u32 {
        bits(self.threads)
    }

    /// Bits of an APIC id that number the threads of a socket.
    pub fn socket_bits(self) -> u32 {
        self.thread_bits() + bits(self.cores)
    }

    /// The APIC id of vCPU `index`: its socket, core and thread, each in bits of its own.
    pub fn apic_id(self, index: u8) -> u32 {
        let (threads, cores) = (u32::from(self.threads), u32::from(self.cores));
        let index = u32::from(index);
        let (thread, core, socket) = (
            index % threads,
            index / threads % cores,
            index / (threads * cores),
        );
        socket << self.socket_bits() | core << self.thread_bits() | thread
    }
}

fn bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

impl CpuConfig {
    /// How `vcpus` vCPUs are arranged.
    pub fn topology(&self, vcpus: u8) -> Topology {
        self.topology.unwrap_or(Topology::flat(vcpus))
    }

    pub(super) fn validate(&self, vcpus: u8) -> Result<(), ConfigError> {
        let topology = self.topology(vcpus);
        let Topology {
            sockets,
            cores,
            threads,
        } = topology;
        let product = u32::from(sockets) * u32::from(cores) * u32::from(threads);
        if product != u32::from(vcpus) {
            return Err(field(
                "cpu.topology",
                format!(
                    "{sockets} sockets of {cores} cores of {threads} threads are {product}, but \
                     vcpus is {vcpus}"
                ),
            ));
        }
        let highest = topology.apic_id(vcpus - 1);
        if highest >= APIC_ID_LIMIT {
            return Err(field(
                "cpu.topology",
                format!(
                    "its highest APIC id is {highest}, the limit is {}",
                    APIC_ID_LIMIT - 1
                ),
            ));
        }
        self.validate_pinning(vcpus)
    }

    fn validate_pinning(&self, vcpus: u8) -> Result<(), ConfigError> {
        let lists = self.pinning.len();
        if lists != 0 && lists != usize::from(vcpus) {
            return Err(field(
                "cpu.pinning",
                format!("{lists} lists, but vcpus is {vcpus}: it must be empty, or one for each"),
            ));
        }
        for (index, list) in self.pinning.iter().enumerate() {
            let path = format!("cpu.pinning[{index}]");
            if list.is_empty() {
                return Err(field(path, "must name a processor of the host"));
            }
            if let Some(cpu) = list.iter().find(|cpu| **cpu > MAX_HOST_CPU) {
                return Err(field(
                    path,
                    format!("{cpu} is out of range, it must be 0 to {MAX_HOST_CPU}"),
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(json: serde_json::Value, vcpus: u8) -> String {
        let config: CpuConfig = serde_json::from_value(json).unwrap();
        config.validate(vcpus).unwrap_err().to_string()
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        use serde_json::json;
        let six = json!({"topology": {"sockets": 2, "cores": 3, "threads": 1}});
        assert!(refusal(six, 4).contains("are 6, but vcpus is 4"));
        let none = json!({"topology": {"sockets": 0, "cores": 1, "threads": 1}});
        assert!(refusal(none, 1).contains("are 0"));
        assert!(refusal(json!({"pinning": [[0]]}), 2).contains("1 lists"));
        assert!(refusal(json!({"pinning": [[0], []]}), 2).contains("cpu.pinning[1]"));
        assert!(refusal(json!({"pinning": [[9000]]}), 1).contains("out of range"));
        let unknown = serde_json::from_value::<CpuConfig>(json!({"template": "pentium"}));
        assert!(unknown.unwrap_err().to_string().contains("x86-64-v3"));
    }

    proptest! {
        #[test]
        fn apic_ids_are_unique_and_tell_sockets_and_cores_apart(
            sockets in 1u8..=4, cores in 1u8..=5, threads in 1u8..=3,
        ) {
            let topology = Topology { sockets, cores, threads };
            let ids: Vec<u32> = (0..sockets * cores * threads).map(|i| topology.apic_id(i)).collect();
            let count = |shift: u32| {
                ids.iter().map(|id| id >> shift).collect::<std::collections::BTreeSet<_>>().len()
            };
            prop_assert_eq!(count(0), ids.len());
            prop_assert_eq!(count(topology.thread_bits()), usize::from(sockets * cores));
            prop_assert_eq!(count(topology.socket_bits()), usize::from(sockets));
        }
    }
}
