//! What guests need and hosts have.

use keelson_api::{HostResources, HugepageSize, VirtualMachineSpec};

/// What guests need and hosts have, as far as it can run out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Virtual processors.
    pub cpus: u64,
    /// MiB of memory in ordinary pages.
    pub memory_mib: u64,
    /// Huge pages of 2 MiB.
    pub hugepages_2mi: u64,
    /// Huge pages of 1 GiB.
    pub hugepages_1gi: u64,
}

impl Resources {
    /// What a guest needs.
    pub fn of_guest(spec: &VirtualMachineSpec) -> Self {
        let mib = spec.memory.mib();
        let mut needs = Self {
            cpus: spec.cpus.into(),
            ..Self::default()
        };
        match spec.hugepages {
            None => needs.memory_mib = mib,
            Some(HugepageSize::Size2Mi) => needs.hugepages_2mi = mib.div_ceil(2),
            Some(HugepageSize::Size1Gi) => needs.hugepages_1gi = mib.div_ceil(1024),
        }
        needs
    }

    /// What guests can have of a host.
    pub fn of_host(allocatable: &HostResources) -> Self {
        Self {
            cpus: allocatable.cpus.into(),
            memory_mib: allocatable.memory.mib(),
            hugepages_2mi: allocatable.hugepages_2mi,
            hugepages_1gi: allocatable.hugepages_1gi,
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.map(other, u64::saturating_add)
    }

    /// Without the other; nothing is less than nothing.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        self.map(other, u64::saturating_sub)
    }

    /// What of it is too little for `needs`, for people.
    pub fn lacks(&self, needs: &Self) -> Option<&'static str> {
        let pairs = [
            ("memory", self.memory_mib, needs.memory_mib),
            ("processors", self.cpus, needs.cpus),
            (
                "huge pages of 2 MiB",
                self.hugepages_2mi,
                needs.hugepages_2mi,
            ),
            (
                "huge pages of 1 GiB",
                self.hugepages_1gi,
                needs.hugepages_1gi,
            ),
        ];
        let lacking = |&&(_, has, needs): &&(&str, u64, u64)| has < needs;
        pairs.iter().find(lacking).map(|(what, ..)| *what)
    }

    /// The scarcest part of what is left, in thousandths of `all`.
    pub fn free_share(&self, all: &Self) -> u64 {
        let share = |free: u64, all: u64| (free * 1000).checked_div(all);
        [
            share(self.cpus, all.cpus),
            share(self.memory_mib, all.memory_mib),
        ]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(0)
    }

    fn map(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            cpus: f(self.cpus, other.cpus),
            memory_mib: f(self.memory_mib, other.memory_mib),
            hugepages_2mi: f(self.hugepages_2mi, other.hugepages_2mi),
            hugepages_1gi: f(self.hugepages_1gi, other.hugepages_1gi),
        }
    }
}
