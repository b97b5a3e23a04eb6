/// An IPv4 or IPv6 address as it lies in memory in network byte order, in words for quick
/// comparison; IPv4 as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
pub type Address = [u32; 4];

/// No address.
pub const NO_ADDRESS: Address = [0; 4];

/// Bits in front of the IPv4 address in an [`Address`].
pub const IPV4_PREFIX_BITS: u32 = 96;

/// An IPv4 address, a word in network byte order, as an [`Address`].
#[inline]
pub const fn from_ipv4(address: u32) -> Address {
    [0, 0, 0xffff_u32.to_be(), address]
}
