//! What a rule of a security group matches.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A protocol over IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Every protocol.
    Any,
    /// ICMP over IPv4.
    Icmp,
    /// ICMPv6; neighbour discovery needs no rule.
    Icmpv6,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Ports from `first` to `last`, both included; written as `80` or `8000-8100`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PortRangeText", into = "PortRangeText")]
pub struct PortRange {
    /// The lowest port.
    pub first: u16,
    /// The highest port.
    pub last: u16,
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is no port; write e.g. 80 or 8000-8100");
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = Self {
            first: first.parse().map_err(|_| error())?,
            last: last.parse().map_err(|_| error())?,
        };
        if range.first == 0 || range.first > range.last {
            Err(error())
        } else {
            Ok(range)
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(formatter, "{}", self.first)
        } else {
            write!(formatter, "{}-{}", self.first, self.last)
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PortRangeText {
    Number(u64),
    Text(String),
}

impl TryFrom<PortRangeText> for PortRange {
    type Error = String;

    fn try_from(text: PortRangeText) -> Result<Self, String> {
        match text {
            PortRangeText::Number(number) => number.to_string().parse(),
            PortRangeText::Text(text) => text.parse(),
        }
    }
}

impl From<PortRange> for PortRangeText {
    fn from(range: PortRange) -> Self {
        if range.first == range.last {
            Self::Number(range.first.into())
        } else {
            Self::Text(range.to_string())
        }
    }
}

/// An ICMP type, of which rules may name one code; written as `8` or `3/4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "IcmpTypeText", into = "IcmpTypeText")]
pub struct IcmpType {
    /// The type, as in RFC 792 and RFC 4443.
    pub number: u8,
    /// The code; every code where not given.
    pub code: Option<u8>,
}

impl FromStr for IcmpType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is no ICMP type; write e.g. 8, or 3/4 for one code");
        let (number, code) = match text.split_once('/') {
            Some((number, code)) => (number, Some(code.parse().map_err(|_| error())?)),
            None => (text, None),
        };
        let number = number.parse().map_err(|_| error())?;
        Ok(Self { number, code })
    }
}

impl fmt::Display for IcmpType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(formatter, "{}/{code}", self.number),
            None => write!(formatter, "{}", self.number),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum IcmpTypeText {
    Number(u64),
    Text(String),
}

impl TryFrom<IcmpTypeText> for IcmpType {
    type Error = String;

    fn try_from(text: IcmpTypeText) -> Result<Self, String> {
        match text {
            IcmpTypeText::Number(number) => number.to_string().parse(),
            IcmpTypeText::Text(text) => text.parse(),
        }
    }
}

impl From<IcmpType> for IcmpTypeText {
    fn from(icmp_type: IcmpType) -> Self {
        match icmp_type.code {
            None => Self::Number(icmp_type.number.into()),
            Some(_) => Self::Text(icmp_type.to_string()),
        }
    }
}
