//! What rules allowed, by their counters.

use std::collections::{BTreeMap, BTreeSet};

use keelson_ebpf_common::{Direction, RuleKey, Tally, map_name};

use crate::counters::total;
use crate::error::DatapathError;
use crate::object::Object;
use crate::policy::{EgressPolicy, InterfacePolicy, counters};
use crate::rule_tables::ignore_missing;
use crate::slots;

/// Which counters there are.
#[derive(Default)]
pub struct RuleCounters {
    keys: BTreeSet<RuleKey>,
}

impl RuleCounters {
    /// Takes over the counters in the map and removes those of slots that nobody has.
    pub fn adopt(object: &mut Object, slots: &BTreeSet<u32>) -> Result<Self, DatapathError> {
        let keys: Result<BTreeSet<RuleKey>, _> = object.allowed.keys().collect();
        let keys = keys.map_err(DatapathError::map("read", map_name::ALLOWED))?;
        let mut adopted = Self { keys };
        let strays = adopted.keys.iter().filter(|key| !slots.contains(&key.slot));
        for key in strays.copied().collect::<Vec<_>>() {
            adopted.remove(object, key)?;
        }
        Ok(adopted)
    }

    /// Makes the counters that a policy names, at zero; those that are there go on. Where the map is
    /// full, the others are not counted.
    pub fn add(
        &mut self,
        object: &mut Object,
        slot: u32,
        policy: &InterfacePolicy,
    ) -> Result<(), DatapathError> {
        for key in keys(slot, policy) {
            if self.keys.contains(&key) {
                continue;
            }
            let zeros = slots::per_cpu(Tally::default())?;
            match object.allowed.insert(key, zeros, 0) {
                Ok(()) => drop(self.keys.insert(key)),
                Err(error) => match DatapathError::map("write", map_name::ALLOWED)(error) {
                    DatapathError::Full { .. } => {
                        let interface = &policy.name;
                        tracing::warn!(interface, "no room to count what each rule allows");
                        return Ok(());
                    }
                    other => return Err(other),
                },
            }
        }
        Ok(())
    }

    /// Removes a slot's counters, but for those that `policy` names.
    pub fn remove_others(
        &mut self,
        object: &mut Object,
        slot: u32,
        policy: Option<&InterfacePolicy>,
    ) -> Result<(), DatapathError> {
        let kept = policy.map_or_else(BTreeSet::new, |policy| keys(slot, policy));
        let present: Vec<RuleKey> = self.of(slot).copied().collect();
        for key in present.into_iter().filter(|key| !kept.contains(key)) {
            self.remove(object, key)?;
        }
        Ok(())
    }

    /// What a slot's rules allowed in one direction, by counter.
    pub fn read(
        &self,
        object: &Object,
        slot: u32,
        direction: Direction,
    ) -> Result<BTreeMap<u64, Tally>, DatapathError> {
        let keys = self.of(slot);
        keys.filter(|key| key.direction == direction as u32)
            .map(|key| {
                let tallies = object.allowed.get(key, 0);
                let tallies = tallies.map_err(DatapathError::map("read", map_name::ALLOWED))?;
                Ok((key.counter, total(tallies.iter())))
            })
            .collect()
    }

    fn of(&self, slot: u32) -> impl Iterator<Item = &RuleKey> {
        let edge = |slot| RuleKey {
            slot,
            direction: 0,
            counter: 0,
        };
        self.keys.range(edge(slot)..edge(slot + 1))
    }

    fn remove(&mut self, object: &mut Object, key: RuleKey) -> Result<(), DatapathError> {
        ignore_missing(object.allowed.remove(&key))
            .map_err(DatapathError::map("write", map_name::ALLOWED))?;
        self.keys.remove(&key);
        Ok(())
    }
}

fn keys(slot: u32, policy: &InterfacePolicy) -> BTreeSet<RuleKey> {
    let egress: &[_] = match &policy.egress {
        EgressPolicy::AllowAll => &[],
        EgressPolicy::Only(rules) => rules,
    };
    let directions = [
        (Direction::ToGuest, policy.ingress.as_slice()),
        (Direction::FromGuest, egress),
    ];
    directions
        .into_iter()
        .flat_map(|(direction, rules)| {
            counters(rules).into_iter().map(move |counter| RuleKey {
                slot,
                direction: direction as u32,
                counter,
            })
        })
        .collect()
}
