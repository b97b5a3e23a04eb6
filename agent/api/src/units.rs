//! Values with a written form of their own: memory sizes, bit rates, time limits, MAC addresses.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// An amount of memory in bytes, written as `256Mi` or `2Gi`; always whole MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemorySize(u64);

impl MemorySize {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// So many MiB; `None` where that is not countable in bytes.
    pub fn from_mib(mib: u64) -> Option<Self> {
        mib.checked_mul(MIB).map(Self)
    }

    /// The amount in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// The amount in MiB.
    pub fn mib(self) -> u64 {
        self.0 / MIB
    }
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unit_at = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (digits, unit) = text.split_at(unit_at);
        let factor = match unit {
            "Mi" => MIB,
            "Gi" => GIB,
            "" => return Err(format!("{text:?} has no unit; write e.g. 256Mi or 2Gi")),
            other => {
                return Err(format!(
                    "{text:?} has the unknown unit {other:?}; write e.g. 256Mi or 2Gi"
                ));
            }
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| format!("{text:?} is no size; write e.g. 256Mi or 2Gi"))?;
        number
            .checked_mul(factor)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is too large to count"))
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(GIB) && self.0 > 0 {
            write!(formatter, "{}Gi", self.0 / GIB)
        } else {
            write!(formatter, "{}Mi", self.mib())
        }
    }
}

/// Bits per second, written as `64k`, `100M` or `10G`: decimal multiples, as networks have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "BitRateText", into = "String")]
pub struct BitRate(u64);

const BIT_RATE_UNITS: [(&str, u64); 4] =
    [("G", 1_000_000_000), ("M", 1_000_000), ("k", 1000), ("", 1)];

impl BitRate {
    /// So many bits per second.
    pub const fn new(bits_per_second: u64) -> Self {
        Self(bits_per_second)
    }

    /// The rate as a number.
    pub fn bits_per_second(self) -> u64 {
        self.0
    }
}

impl FromStr for BitRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is no bit rate; write e.g. 64k, 100M or 10G");
        let unit_at = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (digits, unit) = text.split_at(unit_at);
        let mut units = BIT_RATE_UNITS.iter();
        let (_, factor) = units.find(|(name, _)| *name == unit).ok_or_else(error)?;
        let number: u64 = digits.parse().map_err(|_| error())?;
        let rate = number.checked_mul(*factor);
        rate.map(Self)
            .ok_or_else(|| format!("{text:?} is too large to count"))
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut units = BIT_RATE_UNITS.iter();
        let fitting = units.find(|(_, factor)| self.0 > 0 && self.0.is_multiple_of(*factor));
        let (unit, factor) = fitting.unwrap_or(&("", 1));
        write!(formatter, "{}{unit}", self.0 / factor)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum BitRateText {
    Number(u64),
    Text(String),
}

impl TryFrom<BitRateText> for BitRate {
    type Error = String;

    fn try_from(text: BitRateText) -> Result<Self, String> {
        match text {
            BitRateText::Number(number) => Ok(Self(number)),
            BitRateText::Text(text) => text.parse(),
        }
    }
}

impl From<BitRate> for String {
    fn from(rate: BitRate) -> Self {
        rate.to_string()
    }
}

/// A limit on a wait, written as `500ms`, `30s` or `2m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TimeLimit(Duration);

impl TimeLimit {
    /// A limit of whole seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// A limit of whole milliseconds.
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }

    /// The limit as a duration.
    pub fn duration(self) -> Duration {
        self.0
    }
}

impl FromStr for TimeLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<jiff::SignedDuration>()
            .ok()
            .and_then(|duration| Duration::try_from(duration).ok())
            .map(Self)
            .ok_or_else(|| format!("{text:?} is no time limit; write e.g. 500ms, 30s or 2m"))
    }
}

impl fmt::Display for TimeLimit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::SignedDuration::try_from(self.0) {
            Ok(duration) => write!(formatter, "{duration:#}"),
            Err(_) => write!(formatter, "{}s", self.0.as_secs()),
        }
    }
}

/// An Ethernet address, written as `02:00:5e:10:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether the group bit (IEEE 802) is set, so that it can be no station's own address.
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// The IPv6 link-local address that hosts make of it (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let prefix = 0xfe80_u128 << 112;
        Ipv6Addr::from_bits(prefix | u128::from(self.interface_identifier()))
    }

    /// The modified EUI-64 of it, as hosts have it in their addresses (RFC 4291, appendix A).
    pub fn interface_identifier(self) -> u64 {
        let [first, second, third, rest @ ..] = self.0;
        let [fourth, fifth, sixth] = rest;
        u64::from_be_bytes([first ^ 2, second, third, 0xff, 0xfe, fourth, fifth, sixth])
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is no MAC address; write e.g. 02:00:5e:10:00:01");
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(error)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            Err(error())
        } else {
            Ok(Self(octets))
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(formatter, "{first:02x}")?;
        rest.iter()
            .try_for_each(|octet| write!(formatter, ":{octet:02x}"))
    }
}

macro_rules! written_as_text {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}

written_as_text!(MemorySize);
written_as_text!(TimeLimit);
written_as_text!(MacAddress);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_with_wrong_units_name_the_right_ones() {
        for text in [
            "256",
            "256MB",
            "256M",
            "Mi",
            "-1Mi",
            "1.5Gi",
            "",
            "99999999999999999999Mi",
        ] {
            let error = text.parse::<MemorySize>().unwrap_err();
            assert!(
                error.contains("256Mi") || error.contains("too large"),
                "{text}: {error}"
            );
        }
        assert_eq!(
            "17179869184Gi".parse::<MemorySize>().unwrap_err(),
            "\"17179869184Gi\" is too large to count"
        );
    }

    #[test]
    fn negative_time_limits_are_refused() {
        assert!("-30s".parse::<TimeLimit>().is_err());
        assert_eq!("2m".parse::<TimeLimit>(), Ok(TimeLimit::from_secs(120)));
    }

    #[test]
    fn bit_rates_are_decimal() {
        for (text, bits) in [
            ("64k", 64_000),
            ("100M", 100_000_000),
            ("10G", 10_000_000_000),
        ] {
            assert_eq!(text.parse(), Ok(BitRate(bits)));
            assert_eq!(BitRate(bits).to_string(), text);
        }
        for wrong in ["100m", "1Mi", "1.5G", "G", "", "-1k", "1 M"] {
            let error = wrong.parse::<BitRate>().unwrap_err();
            assert!(error.contains("100M"), "{wrong}: {error}");
        }
    }

    proptest! {
        #[test]
        fn written_values_are_read_back(
            mib in 0..1_u64 << 30,
            ms in 0..1_u64 << 40,
            octets: [u8; 6],
            bits: u64,
        ) {
            prop_assert_eq!(BitRate(bits).to_string().parse(), Ok(BitRate(bits)));
            let size = MemorySize(mib * MIB);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let limit = TimeLimit(Duration::from_millis(ms));
            prop_assert_eq!(limit.to_string().parse(), Ok(limit));
            let mac = MacAddress(octets);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}") {
            let _ = text.parse::<MemorySize>();
            let _ = text.parse::<TimeLimit>();
            let _ = text.parse::<BitRate>();
            let _ = text.parse::<MacAddress>();
        }
    }
}
