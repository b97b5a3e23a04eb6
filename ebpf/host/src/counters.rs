//! What the programs counted, summed over the CPUs.

use std::collections::BTreeMap;

use keelson_ebpf_common::{DirectionTallies, DropReason, Tally};

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
    ) -> Self {
        let mut sum = Self::default();
        for tally in passed {
            add(&mut sum.passed, *tally);
        }
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

fn add(sum: &mut Tally, tally: Tally) {
    sum.packets = sum.packets.wrapping_add(tally.packets);
    sum.bytes = sum.bytes.wrapping_add(tally.bytes);
}
