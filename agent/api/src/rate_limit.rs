//! How much may pass an interface of a guest.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::units::{BitRate, TimeLimit};

/// Bits per second that can be kept to.
const BIT_RATES: RangeInclusive<u64> = 8_000..=1_000_000_000_000;
/// Packets per second that can be kept to.
const PACKET_RATES: RangeInclusive<u64> = 1..=1_000_000_000;
/// For how long's worth may pass at once.
const BURSTS: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_mins(1);

/// Limits of an interface; each direction has its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct InterfaceLimits {
    /// Of what the guest sends.
    #[serde(skip_serializing_if = "RateLimit::is_unlimited")]
    pub from_guest: RateLimit,
    /// Of what is sent to the guest.
    #[serde(skip_serializing_if = "RateLimit::is_unlimited")]
    pub to_guest: RateLimit,
}

/// Averages that one direction keeps to; what comes too fast is dropped, not queued. Can be changed
/// while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RateLimit {
    /// Bits, Ethernet headers included, such as `100M`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_second: Option<BitRate>,
    /// Packets. Of a large packet that is cut into segments later, these count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets_per_second: Option<u64>,
    /// After idle time as much may pass at once as the averages allow in this time: 1 ms to 60 s.
    pub burst: TimeLimit,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self {
            bits_per_second: None,
            packets_per_second: None,
            burst: TimeLimit::from_millis(100),
        }
    }
}

impl RateLimit {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.bits_per_second.is_none() && self.packets_per_second.is_none()
    }

    fn validate(&self, field: &str, errors: &mut Vec<FieldError>) {
        let bits = self.bits_per_second.map(BitRate::bits_per_second);
        let rates = [
            ("bitsPerSecond", bits, BIT_RATES),
            ("packetsPerSecond", self.packets_per_second, PACKET_RATES),
        ];
        for (name, rate, range) in rates {
            if let Some(rate) = rate.filter(|rate| !range.contains(rate)) {
                let (least, most) = range.into_inner();
                errors.push(FieldError::new(
                    format!("{field}.{name}"),
                    format!("is {rate}; give {least} to {most}, or leave it out to lift the limit"),
                ));
            }
        }
        if !BURSTS.contains(&self.burst.duration()) {
            errors.push(FieldError::new(
                format!("{field}.burst"),
                format!("is {}; give 1ms to 60s", self.burst),
            ));
        }
    }
}

impl InterfaceLimits {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.from_guest.is_unlimited() && self.to_guest.is_unlimited()
    }

    pub(crate) fn validate(&self, field: &str, errors: &mut Vec<FieldError>) {
        let directions = [("fromGuest", &self.from_guest), ("toGuest", &self.to_guest)];
        for (name, limit) in directions {
            limit.validate(&format!("{field}.{name}"), errors);
        }
    }
}
