//! A packet's header (`struct virtio_vsock_hdr`; virtio 1.2, 5.10.6).
//!
//! The crate virtio-vsock takes packets of one or two descriptors only; a device must not assume how
//! a driver divides them (2.7.4.1), and Linux' zero-copy sends have more.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The host's context identifier (5.10.4).
pub const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const STREAM: u16 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender takes no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender sends no more data.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for (5.10.6, `VIRTIO_VSOCK_OP_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Asks for a connection.
    Request = 1,
    /// Accepts it.
    Response = 2,
    /// Refuses or ends it at once.
    Reset = 3,
    /// One or both directions are over.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// Tells how much data may come.
    CreditUpdate = 6,
    /// Asks to be told.
    CreditRequest = 7,
}

impl Operation {
    /// The operation with a number of the specification, if there is one.
    pub const fn of(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet's header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's context identifier.
    pub source_cid: u64,
    /// The receiver's.
    pub destination_cid: u64,
    /// The sender's port.
    pub source_port: u32,
    /// The receiver's.
    pub destination_port: u32,
    /// Bytes of data behind the header.
    pub length: u32,
    /// The socket's type; only [`STREAM`] is known here.
    pub kind: u16,
    /// An [`Operation`], or a number that is none.
    pub operation: u16,
    /// What belongs to the operation.
    pub flags: u32,
    /// Bytes that the sender has room for in all (`buf_alloc`).
    pub buffer: u32,
    /// Bytes that the sender has passed on so far, modulo 2^32 (`fwd_cnt`).
    pub forwarded: u32,
}

impl Header {
    /// The header in these bytes.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let long = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |b| u64::from_le_bytes(*b))
        };
        let word = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |b| u32::from_le_bytes(*b))
        };
        let half = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |b| u16::from_le_bytes(*b))
        };
        Self {
            source_cid: long(0),
            destination_cid: long(8),
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            kind: half(28),
            operation: half(30),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.source_cid.to_le_bytes());
        put(8, &self.destination_cid.to_le_bytes());
        put(16, &self.source_port.to_le_bytes());
        put(20, &self.destination_port.to_le_bytes());
        put(24, &self.length.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.operation.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buffer.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }

    /// The answer to a packet that belongs to nothing: the connection is no more.
    pub const fn reset_of(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            length: 0,
            kind: self.kind,
            operation: Operation::Reset as u16,
            flags: 0,
            buffer: 0,
            forwarded: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_is_its_bytes(bytes in prop::array::uniform32(any::<u8>()), rest in prop::array::uniform12(any::<u8>())) {
            let mut whole = [0; HEADER_BYTES];
            whole[..32].copy_from_slice(&bytes);
            whole[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::decode(&whole).encode(), whole);
        }
    }
}
