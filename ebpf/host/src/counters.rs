//! What the programs counted, summed over the CPUs.

use std::collections::BTreeMap;

use keelson_ebpf_common::{
    CounterKey, Direction, DirectionTallies, DropReason, Tally, map_name, passed_index,
};

use crate::datapath::{Datapath, entries};
use crate::error::DatapathError;
use crate::flow_list::FlowUse;
use crate::rule_tables::ignore_missing;
use crate::{interface, slots};

/// The counters of one interface since it was attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceCounters {
    /// Packets that the guest sent.
    pub from_guest: DirectionCounters,
    /// Packets on their way to the guest.
    pub to_guest: DirectionCounters,
}

/// The counters of one direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectionCounters {
    /// What went on.
    pub passed: Tally,
    /// What was dropped, for each reason that occurred.
    pub dropped: BTreeMap<DropReason, Tally>,
    /// What the rules let pass that name a counter ([`Rule::counter`](crate::Rule::counter)), for each
    /// counter: the packets that open flows or belong to none, but not what follows in a flow.
    pub allowed: BTreeMap<u64, Tally>,
}

impl Datapath {
    /// What was counted on an interface since it was attached.
    ///
    /// # Errors
    /// [`DatapathError::NotAttached`].
    pub fn counters(&self, interface: &str) -> Result<InterfaceCounters, DatapathError> {
        let (ifindex, entry) = self.find(interface)?;
        let counters = self.read_counters(ifindex, entry.slot)?;
        Ok(counters.unwrap_or_default())
    }

    /// What the programs counted on interfaces that have no counters of their own: nothing, unless a
    /// hook was left without a policy.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel doesn't let the map be read.
    pub fn unattributed_counters(&self) -> Result<InterfaceCounters, DatapathError> {
        Ok(self.read_counters(0, 0)?.unwrap_or_default())
    }

    /// The counters and the use of flows of all interfaces, by their names.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel doesn't let a map be read.
    pub fn statistics(
        &self,
    ) -> Result<BTreeMap<String, (InterfaceCounters, FlowUse)>, DatapathError> {
        let entries = entries(&self.object)?.into_iter();
        let statistics = entries.map(|(ifindex, entry)| {
            let counters = self.read_counters(ifindex, entry.slot)?;
            let flows = self.flow_use(&entry)?;
            let name = interface::from_bytes(&entry.name);
            Ok((name, (counters.unwrap_or_default(), flows)))
        });
        statistics.collect()
    }

    /// What was counted on an interface; interface zero has slot zero. `None` if it has no counters.
    pub(crate) fn read_counters(
        &self,
        ifindex: u32,
        slot: u32,
    ) -> Result<Option<InterfaceCounters>, DatapathError> {
        let read = |direction| {
            let passed = self
                .object
                .passed
                .get(&passed_index(slot, direction), 0)
                .map_err(DatapathError::map("read", map_name::PASSED))?;
            let allowed = self.rule_counters.read(&self.object, slot, direction)?;
            match self.object.dropped.get(&counter_key(ifindex, direction), 0) {
                Ok(dropped) => Ok(Some(DirectionCounters::sum(
                    passed.iter(),
                    dropped.iter(),
                    allowed,
                ))),
                Err(error) => ignore_missing(Err(error))
                    .map(|()| None)
                    .map_err(DatapathError::map("read", map_name::DROPPED)),
            }
        };
        let from_guest = read(Direction::FromGuest)?;
        let to_guest = read(Direction::ToGuest)?;
        Ok(from_guest
            .zip(to_guest)
            .map(|(from_guest, to_guest)| InterfaceCounters {
                from_guest,
                to_guest,
            }))
    }

    pub(crate) fn remove_counters(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        for direction in [Direction::FromGuest, Direction::ToGuest] {
            ignore_missing(self.object.dropped.remove(&counter_key(ifindex, direction)))
                .map_err(DatapathError::map("write", map_name::DROPPED))?;
        }
        Ok(())
    }

    pub(crate) fn zero_counters(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        for direction in [Direction::FromGuest, Direction::ToGuest] {
            let zeros = slots::per_cpu(DirectionTallies::default())?;
            self.object
                .dropped
                .insert(counter_key(ifindex, direction), zeros, 0)
                .map_err(DatapathError::map("write", map_name::DROPPED))?;
        }
        Ok(())
    }
}

impl DirectionCounters {
    /// The tally of one reason; zero if it never occurred.
    pub fn dropped_for(&self, reason: DropReason) -> Tally {
        self.dropped.get(&reason).copied().unwrap_or_default()
    }

    /// Sums what each CPU counted.
    pub(crate) fn sum<'a>(
        passed: impl Iterator<Item = &'a Tally>,
        dropped: impl Iterator<Item = &'a DirectionTallies>,
        allowed: BTreeMap<u64, Tally>,
    ) -> Self {
        let mut sum = Self {
            passed: total(passed),
            allowed,
            ..Self::default()
        };
        for tallies in dropped {
            for reason in DropReason::ALL {
                let tally = tallies.dropped[reason.slot()];
                if tally.packets != 0 {
                    add(sum.dropped.entry(reason).or_default(), tally);
                }
            }
        }
        sum
    }
}

/// What all CPUs counted.
pub fn total<'a>(tallies: impl Iterator<Item = &'a Tally>) -> Tally {
    let mut sum = Tally::default();
    for tally in tallies {
        add(&mut sum, *tally);
    }
    sum
}

fn add(sum: &mut Tally, tally: Tally) {
    sum.packets = sum.packets.wrapping_add(tally.packets);
    sum.bytes = sum.bytes.wrapping_add(tally.bytes);
}

/// Where an interface's drops of one direction are.
pub fn counter_key(ifindex: u32, direction: Direction) -> CounterKey {
    CounterKey {
        ifindex,
        direction: direction as u32,
    }
}
