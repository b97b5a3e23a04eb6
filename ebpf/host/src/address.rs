//! MAC addresses and IPv4 prefixes as people write them.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A MAC address; written `52:54:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether one station can have it: not a group address, not all zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ":" };
            write!(formatter, "{separator}{byte:02x}")?;
        }
        Ok(())
    }
}

/// Why text is not an address or prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not six two-digit hexadecimal numbers with colons.
    #[error("{0:?} is not a MAC address such as 52:54:00:12:34:56")]
    Mac(String),
    /// Not an address, or not a length from 0 to 32.
    #[error("{0:?} is not an IPv4 network such as 10.0.0.0/8 or an address such as 10.0.0.1")]
    Prefix(String),
    /// Bits are set behind the prefix.
    #[error("{address}/{length} has bits set behind the prefix; did you mean {masked}/{length}?")]
    HostBits {
        /// The address as given.
        address: Ipv4Addr,
        /// The prefix length.
        length: u8,
        /// The address without those bits.
        masked: Ipv4Addr,
    },
}

impl FromStr for MacAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || AddressError::Mac(text.to_owned());
        let mut parts = text.split(':');
        let mut bytes = [0; 6];
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(error()),
        }
    }
}

/// An IPv4 network: an address with no bits set behind the first `length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ipv4Prefix {
    address: Ipv4Addr,
    length: u8,
}

impl Ipv4Prefix {
    /// `0.0.0.0/0`, every address.
    pub const ANY: Self = Self {
        address: Ipv4Addr::UNSPECIFIED,
        length: 0,
    };

    /// The network of `address`, which must have no bits set behind the first `length` (0 to 32).
    pub fn new(address: Ipv4Addr, length: u8) -> Result<Self, AddressError> {
        if length > 32 {
            return Err(AddressError::Prefix(format!("{address}/{length}")));
        }
        let masked = Ipv4Addr::from_bits(address.to_bits() & mask(length));
        if masked != address {
            return Err(AddressError::HostBits {
                address,
                length,
                masked,
            });
        }
        Ok(Self { address, length })
    }

    /// The first address.
    pub fn address(self) -> Ipv4Addr {
        self.address
    }

    /// How many bits the addresses share, 0 to 32.
    pub fn length(self) -> u8 {
        self.length
    }

    /// Whether every address of `other` is in this network.
    pub fn covers(self, other: Self) -> bool {
        self.length <= other.length
            && other.address.to_bits() & mask(self.length) == self.address.to_bits()
    }
}

impl From<Ipv4Addr> for Ipv4Prefix {
    fn from(address: Ipv4Addr) -> Self {
        Self {
            address,
            length: 32,
        }
    }
}

impl fmt::Display for Ipv4Prefix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Ipv4Prefix {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || AddressError::Prefix(text.to_owned());
        let (address, length) = text.split_once('/').unwrap_or((text, "32"));
        let address = address.parse().map_err(|_| error())?;
        let length = length.parse().map_err(|_| error())?;
        match Self::new(address, length) {
            Err(AddressError::Prefix(_)) => Err(error()),
            result => result,
        }
    }
}

fn mask(length: u8) -> u32 {
    u32::MAX
        .checked_shl(32 - u32::from(length))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_read_and_written() {
        let mac: MacAddress = "52:54:00:AB:cd:0f".parse().expect("valid");
        assert_eq!(mac, MacAddress([0x52, 0x54, 0, 0xab, 0xcd, 0x0f]));
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:01",
            "52:54:00:ab:cd:+f",
            "525400abcd0f",
        ] {
            assert_eq!(
                bad.parse::<MacAddress>(),
                Err(AddressError::Mac(bad.into()))
            );
        }
    }

    #[test]
    fn prefixes_are_read_and_written() {
        for (text, canonical) in [
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.2.3", "10.1.2.3/32"),
        ] {
            let prefix: Ipv4Prefix = text.parse().expect("valid");
            assert_eq!(prefix.to_string(), canonical);
        }
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0/8",
            "10.0.0.0/",
            "::/0",
            "10.0.0.0/-1",
        ] {
            assert_eq!(
                bad.parse::<Ipv4Prefix>(),
                Err(AddressError::Prefix(bad.into()))
            );
        }
        let error = "10.0.0.1/8".parse::<Ipv4Prefix>().expect_err("host bits");
        assert_eq!(
            error.to_string(),
            "10.0.0.1/8 has bits set behind the prefix; did you mean 10.0.0.0/8?"
        );
    }

    #[test]
    fn a_network_covers_its_parts() {
        let parse = |text: &str| text.parse::<Ipv4Prefix>().expect("valid");
        assert!(Ipv4Prefix::ANY.covers(parse("192.0.2.1")));
        assert!(parse("10.0.0.0/8").covers(parse("10.255.0.0/16")));
        assert!(parse("10.0.0.0/8").covers(parse("10.0.0.0/8")));
        assert!(!parse("10.0.0.0/16").covers(parse("10.0.0.0/8")));
        assert!(!parse("10.0.0.0/8").covers(parse("11.0.0.0/8")));
    }
}
