//! Whether a rule table allows a peer and port (maps `PEER_CLASSES`, `ALLOWED_PORTS`).

use aya_ebpf::maps::lpm_trie::Key;
use keelson_ebpf_common::{ALLOW_ALL, Address, PeerKey, PortKey, UNCOUNTED};

use crate::maps::{ALLOWED_PORTS, PEER_CLASSES};

/// Two lookups, whatever the number of rules: the peer's class, then whether the class may use the
/// port. Everything that the second map holds is allowed, and counted by the value there.
#[inline(always)]
pub fn allow(table: u32, peer: Address, protocol: u8, port: u16) -> Option<u64> {
    if table == ALLOW_ALL {
        return Some(UNCOUNTED);
    }
    let peer_key = PeerKey {
        table,
        address: peer,
    };
    let &class = PEER_CLASSES.get(Key::new(PeerKey::BITS, peer_key))?;
    let port_key = PortKey {
        class,
        protocol,
        port: port.to_be_bytes(),
        reserved: 0,
    };
    ALLOWED_PORTS
        .get(Key::new(PortKey::BITS, port_key))
        .copied()
}
