//! MAC addresses and IP prefixes as people write them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use keelson_ebpf_common::{Address, IPV4_PREFIX_BITS, from_ipv4};

/// A MAC address; written `52:54:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether one station can have it: not a group address, not all zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// The link-local IPv6 address that is made of it (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&[0xfe, 0x80]);
        bytes[8..11].copy_from_slice(&self.0[..3]);
        bytes[8] ^= 2;
        bytes[11..13].copy_from_slice(&[0xff, 0xfe]);
        bytes[13..].copy_from_slice(&self.0[3..]);
        Ipv6Addr::from(bytes)
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
    /// Not an address, or not a length that its family has.
    #[error("{0:?} is not a network such as 10.0.0.0/8 or fd00::/8 or an address such as 10.0.0.1")]
    Prefix(String),
    /// Bits are set behind the prefix.
    #[error("{address}/{length} has bits set behind the prefix; did you mean {masked}/{length}?")]
    HostBits {
        /// The address as given.
        address: IpAddr,
        /// The prefix length.
        length: u8,
        /// The address without those bits.
        masked: IpAddr,
    },
    /// An IPv6 address that only stands for an IPv4 address.
    #[error("{0} stands for an IPv4 address; write that one")]
    Mapped(Ipv6Addr),
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

/// An IPv4 or IPv6 network: an address with no bits set behind the first `length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpPrefix {
    address: IpAddr,
    length: u8,
}

impl IpPrefix {
    /// `0.0.0.0/0`, every IPv4 address.
    pub const ANY_IPV4: Self = Self {
        address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        length: 0,
    };
    /// `::/0`, every IPv6 address.
    pub const ANY_IPV6: Self = Self {
        address: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        length: 0,
    };

    /// The network of `address`, which must have no bits set behind the first `length` (0 to 32, or
    /// to 128).
    pub fn new(address: IpAddr, length: u8) -> Result<Self, AddressError> {
        let masked = match address {
            IpAddr::V4(ipv4) if length <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(ipv4.to_bits() & mask))
            }
            IpAddr::V6(ipv6) if ipv6.to_ipv4_mapped().is_some() => {
                return Err(AddressError::Mapped(ipv6));
            }
            IpAddr::V6(ipv6) if length <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(ipv6.to_bits() & mask))
            }
            _ => return Err(AddressError::Prefix(format!("{address}/{length}"))),
        };
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
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// How many bits the addresses share.
    pub fn length(self) -> u8 {
        self.length
    }

    /// Whether `address` is in this network.
    pub fn contains(self, address: IpAddr) -> bool {
        self.covers(Self::from(address))
    }

    /// Whether every address of `other` is in this network; never of another family.
    pub fn covers(self, other: Self) -> bool {
        if self.address.is_ipv4() != other.address.is_ipv4() || self.length > other.length {
            return false;
        }
        let differing = self.bits() ^ other.bits();
        differing
            .checked_shr(128 - self.mapped_length())
            .unwrap_or(0)
            == 0
    }

    /// Bits that the addresses share in the form that maps hold, where IPv4 is mapped into IPv6.
    pub(crate) fn mapped_length(self) -> u32 {
        match self.address {
            IpAddr::V4(_) => u32::from(self.length) + IPV4_PREFIX_BITS,
            IpAddr::V6(_) => u32::from(self.length),
        }
    }

    /// The first address as a number, in the same form.
    pub(crate) fn bits(self) -> u128 {
        match self.address {
            IpAddr::V4(ipv4) => ipv4.to_ipv6_mapped().to_bits(),
            IpAddr::V6(ipv6) => ipv6.to_bits(),
        }
    }
}

impl From<IpAddr> for IpPrefix {
    fn from(address: IpAddr) -> Self {
        Self {
            address,
            length: if address.is_ipv4() { 32 } else { 128 },
        }
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.address, self.length)
    }
}

impl FromStr for IpPrefix {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || AddressError::Prefix(text.to_owned());
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| error())?;
        let length = match length {
            Some(length) => length.parse().map_err(|_| error())?,
            None => Self::from(address).length,
        };
        match Self::new(address, length) {
            Err(AddressError::Prefix(_)) => Err(error()),
            result => result,
        }
    }
}

/// An address as maps hold it.
pub fn to_map(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(ipv4) => from_ipv4(u32::from_ne_bytes(ipv4.octets())),
        IpAddr::V6(ipv6) => {
            let bytes = ipv6.octets();
            let word = |at: usize| {
                u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            };
            [word(0), word(4), word(8), word(12)]
        }
    }
}

/// The address that a map holds.
pub fn from_map(address: Address) -> IpAddr {
    let mut bytes = [0; 16];
    for (to, word) in bytes.chunks_exact_mut(4).zip(address) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    let ipv6 = Ipv6Addr::from(bytes);
    match ipv6.to_ipv4_mapped() {
        Some(ipv4) => IpAddr::V4(ipv4),
        None => IpAddr::V6(ipv6),
    }
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
            ("::/0", "::/0"),
            ("fd00:1::/32", "fd00:1::/32"),
            ("fd00::1", "fd00::1/128"),
        ] {
            let prefix: IpPrefix = text.parse().expect("valid");
            assert_eq!(prefix.to_string(), canonical);
        }
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0/8",
            "10.0.0.0/",
            "::/129",
            "10.0.0.0/-1",
        ] {
            assert_eq!(
                bad.parse::<IpPrefix>(),
                Err(AddressError::Prefix(bad.into()))
            );
        }
        let error = "10.0.0.1/8".parse::<IpPrefix>().expect_err("host bits");
        assert_eq!(
            error.to_string(),
            "10.0.0.1/8 has bits set behind the prefix; did you mean 10.0.0.0/8?"
        );
        "::ffff:10.0.0.1".parse::<IpPrefix>().expect_err("mapped");
    }

    #[test]
    fn a_network_covers_its_parts() {
        let parse = |text: &str| text.parse::<IpPrefix>().expect("valid");
        assert!(IpPrefix::ANY_IPV4.covers(parse("192.0.2.1")));
        assert!(parse("10.0.0.0/8").covers(parse("10.255.0.0/16")));
        assert!(parse("10.0.0.0/8").covers(parse("10.0.0.0/8")));
        assert!(!parse("10.0.0.0/16").covers(parse("10.0.0.0/8")));
        assert!(!parse("10.0.0.0/8").covers(parse("11.0.0.0/8")));
        assert!(IpPrefix::ANY_IPV6.covers(parse("fd00::/8")));
        assert!(!IpPrefix::ANY_IPV6.covers(IpPrefix::ANY_IPV4));
        assert!(!IpPrefix::ANY_IPV4.covers(parse("::1")));
    }

    #[test]
    fn addresses_survive_the_way_through_a_map() {
        for text in ["10.1.2.3", "fd00::1:2", "0.0.0.0"] {
            let address: IpAddr = text.parse().expect("valid");
            assert_eq!(from_map(to_map(address)), address);
        }
    }
}
