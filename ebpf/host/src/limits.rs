//! Rate limits, as the programs take them.

use std::time::Duration;

use keelson_ebpf_common::{
    BYTE_COST_BITS, Bucket, Direction, Limit, TICKS_PER_NS, flag, map_name, passed_index,
};

use crate::error::DatapathError;
use crate::object::Object;
use crate::policy::InterfacePolicy;

const NS_PER_SECOND: u128 = 1_000_000_000;
/// Below this one large packet would take minutes.
const MIN_BITS_PER_SECOND: u64 = 8_000;
/// More costs less than the programs can count.
const MAX_BITS_PER_SECOND: u64 = 1_000_000_000_000;
const MAX_PACKETS_PER_SECOND: u64 = 1_000_000_000;
const BURSTS: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_mins(1);

/// What may pass an interface in one direction, on average. What comes too fast is dropped, not
/// queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Bits per second, from the Ethernet header on: 8,000 to 10^12.
    pub bits_per_second: Option<u64>,
    /// Packets per second: 1 to 10^9. Of a large packet that the kernel cuts later, its parts count.
    pub packets_per_second: Option<u64>,
    /// For how long's worth of both may pass at once after idle time: 1 ms to 60 s.
    pub burst: Duration,
}

/// The limits of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterfaceLimits {
    /// What the guest may send.
    pub from_guest: RateLimit,
    /// What may be sent to the guest.
    pub to_guest: RateLimit,
}

impl Default for RateLimit {
    /// No limit.
    fn default() -> Self {
        Self {
            bits_per_second: None,
            packets_per_second: None,
            burst: Duration::from_millis(100),
        }
    }
}

impl RateLimit {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.bits_per_second.is_none() && self.packets_per_second.is_none()
    }

    /// What is wrong with it, with the field's name.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        let bits = MIN_BITS_PER_SECOND..=MAX_BITS_PER_SECOND;
        let packets = 1..=MAX_PACKETS_PER_SECOND;
        let rates = [
            ("bits_per_second", self.bits_per_second, bits),
            ("packets_per_second", self.packets_per_second, packets),
        ];
        for (field, rate, range) in rates {
            if let Some(rate) = rate.filter(|rate| !range.contains(rate)) {
                let (least, most) = range.into_inner();
                return Err((field, format!("{rate} is not within {least} to {most}")));
            }
        }
        if BURSTS.contains(&self.burst) {
            return Ok(());
        }
        let problem = format!("{:?} is not within 1ms to 60s", self.burst);
        Err(("burst", problem))
    }

    fn to_map(self) -> Limit {
        if self.is_unlimited() {
            return Limit::default();
        }
        let ticks = NS_PER_SECOND * u128::from(TICKS_PER_NS);
        let cost = |ticks: u128, rate: Option<u64>| {
            let cost = rate.map_or(0, |rate| (ticks / u128::from(rate)).max(1));
            u64::try_from(cost).unwrap_or(u64::MAX)
        };
        let burst = self.burst.as_nanos() * u128::from(TICKS_PER_NS);
        Limit {
            byte_cost: cost((ticks * 8) << BYTE_COST_BITS, self.bits_per_second),
            packet_cost: cost(ticks, self.packets_per_second),
            burst: u64::try_from(burst).unwrap_or(u64::MAX),
        }
    }
}

impl InterfaceLimits {
    /// The bits of a policy entry that say what is limited.
    pub(crate) fn flags(&self) -> u16 {
        let mut flags = 0;
        if !self.from_guest.is_unlimited() {
            flags |= flag::LIMITED_FROM_GUEST;
        }
        if !self.to_guest.is_unlimited() {
            flags |= flag::LIMITED_TO_GUEST;
        }
        flags
    }
}

/// Writes the limits of a slot. Those that are there already go on with what was used of them.
pub fn write(
    object: &mut Object,
    slot: u32,
    policy: &InterfacePolicy,
) -> Result<(), DatapathError> {
    let limits = &policy.limits;
    for (direction, limit) in [
        (Direction::FromGuest, &limits.from_guest),
        (Direction::ToGuest, &limits.to_guest),
    ] {
        let index = passed_index(slot, direction);
        let limit = limit.to_map();
        let present = object.limits.get(&index, 0);
        if present.map_err(DatapathError::map("read", map_name::LIMITS))? == limit {
            continue;
        }
        // A packet in between may see a part of the new limit: it is charged wrongly, once.
        object
            .limits
            .set(index, limit, 0)
            .map_err(DatapathError::map("write", map_name::LIMITS))?;
        object
            .buckets
            .set(index, Bucket::default(), 0)
            .map_err(DatapathError::map("write", map_name::BUCKETS))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bits_per_second: u64) -> RateLimit {
        RateLimit {
            bits_per_second: Some(bits_per_second),
            ..RateLimit::default()
        }
    }

    #[test]
    fn a_second_of_bytes_costs_a_second() {
        for rate in [8_000, 9_999, 1_000_000, 25_000_000_000, MAX_BITS_PER_SECOND] {
            let Limit { byte_cost, .. } = limit(rate).to_map();
            let frame = 1_500_u64;
            let cost = u128::from((frame * byte_cost) >> BYTE_COST_BITS);
            let frames = u128::from(rate) / 8 / u128::from(frame);
            let seconds = cost * frames * 1000 / NS_PER_SECOND / u128::from(TICKS_PER_NS);
            // Within 1.5% at the highest rate, where a frame takes 12 ns.
            assert!(
                (985..=1000).contains(&seconds) || frames < 100,
                "{rate}: {seconds}"
            );
        }
    }

    #[test]
    fn costs_of_the_largest_packets_fit() {
        let slowest = limit(MIN_BITS_PER_SECOND).to_map();
        assert!(slowest.byte_cost.checked_mul(512 << 10).is_some());
    }

    #[test]
    fn limits_out_of_range_name_the_field() {
        let wrong = [
            limit(0),
            limit(7_999),
            RateLimit {
                packets_per_second: Some(0),
                ..RateLimit::default()
            },
            RateLimit {
                burst: Duration::ZERO,
                ..limit(8_000)
            },
        ];
        let fields = wrong.map(|limit| limit.check().expect_err("wrong").0);
        assert_eq!(
            fields,
            [
                "bits_per_second",
                "bits_per_second",
                "packets_per_second",
                "burst"
            ]
        );
    }
}
