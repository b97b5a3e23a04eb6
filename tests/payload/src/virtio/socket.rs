//! A driver for virtio socket devices (Virtio 1.3, 5.10): packets, and what of credit one connection
//! needs.

use super::FEATURE_EVENT_INDEX;
use super::device::{Device, wait_for};
use super::queue::{Descriptor, Queue};
use crate::clock::Deadline;
use crate::error::Error;
use crate::memory::Buffer;

/// The virtio device type.
pub const KIND: u16 = 19;
/// `VIRTIO_VSOCK_OP_…`
pub mod operation {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RESET: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const DATA: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Bytes that this side has room for: all of the data that comes in one go.
pub const ROOM: usize = 2048;
/// The host's context identifier.
pub const HOST: u64 = 2;

const HEADER_SIZE: usize = 44;
const BUFFER_SIZE: usize = 4096;
const QUEUE_SIZE_LIMIT: u16 = 16;
const SEND_MILLISECONDS: u64 = 10_000;

/// What a packet says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    pub length: u32,
    pub kind: u16,
    pub operation: u16,
    pub flags: u32,
    pub buffer: u32,
    pub forwarded: u32,
}

/// A socket device.
pub struct Socket {
    receive: Queue,
    transmit: Queue,
    events: Queue,
    received: Buffer,
    sending: Buffer,
    event: Buffer,
    cid: u64,
    /// Resets the device when this is dropped.
    _device: Device,
}

impl Socket {
    /// Sets the device up and gives it all receive buffers.
    pub fn open(mut device: Device) -> Result<Self, Error> {
        device.negotiate(FEATURE_EVENT_INDEX)?;
        let low = device.specific().read32(0)?;
        let high = device.specific().read32(4)?;
        let mut receive = device.queue(0, QUEUE_SIZE_LIMIT)?;
        let transmit = device.queue(1, QUEUE_SIZE_LIMIT)?;
        let mut events = device.queue(2, QUEUE_SIZE_LIMIT)?;
        let received = Buffer::allocate(usize::from(receive.size()) * BUFFER_SIZE, 4096)?;
        let sending = Buffer::allocate(BUFFER_SIZE, 4096)?;
        let event = Buffer::allocate(4, 4)?;
        for index in 0..receive.size() {
            let part = received.slice(usize::from(index) * BUFFER_SIZE, BUFFER_SIZE);
            receive.add(&[Descriptor::writable(part.address(), BUFFER_SIZE as u32)])?;
        }
        events.add(&[Descriptor::writable(event.address(), 4)])?;
        device.start()?;
        receive.notify_always()?;
        events.notify_always()?;
        Ok(Self {
            receive,
            transmit,
            events,
            received,
            sending,
            event,
            cid: u64::from(high) << 32 | u64::from(low),
            _device: device,
        })
    }

    /// This guest's context identifier.
    pub fn cid(&self) -> u64 {
        self.cid
    }

    /// Sends a packet as it is, with `data` behind it, and waits until the device has taken it.
    pub fn send(&mut self, packet: &Packet, data: &[u8]) -> Result<(), Error> {
        let put = &self.sending;
        put.write64(0, packet.source_cid);
        put.write64(8, packet.destination_cid);
        put.write32(16, packet.source_port);
        put.write32(20, packet.destination_port);
        put.write32(24, packet.length);
        put.write16(28, packet.kind);
        put.write16(30, packet.operation);
        put.write32(32, packet.flags);
        put.write32(36, packet.buffer);
        put.write32(40, packet.forwarded);
        put.write(HEADER_SIZE, data);
        // In three pieces: a device must not care.
        let at = put.address();
        let parts = [
            Descriptor::readable(at, 20),
            Descriptor::readable(at + 20, (HEADER_SIZE - 20) as u32),
            Descriptor::readable(at + HEADER_SIZE as u64, data.len() as u32),
        ];
        let used = if data.is_empty() { 2 } else { 3 };
        self.transmit.add(&parts[..used])?;
        self.transmit.notify()?;
        let transmit = &mut self.transmit;
        let deadline = Deadline::after_milliseconds(SEND_MILLISECONDS);
        wait_for(deadline, "sent packet", || {
            transmit.want_interrupt(true);
            transmit.take_used()
        })?;
        Ok(())
    }

    /// The next packet, and its data in `data`.
    pub fn receive(&mut self, data: &mut [u8; ROOM], deadline: Deadline) -> Result<Packet, Error> {
        let receive = &mut self.receive;
        let used = wait_for(deadline, "packet", || {
            receive.want_interrupt(true);
            receive.take_used()
        })?;
        // A chain of one descriptor got back is the next to be taken, so a head keeps its buffer.
        let part = self
            .received
            .slice(usize::from(used.head) * BUFFER_SIZE, BUFFER_SIZE);
        let packet = Packet {
            source_cid: part.read64(0),
            destination_cid: part.read64(8),
            source_port: part.read32(16),
            destination_port: part.read32(20),
            length: part.read32(24),
            kind: part.read16(28),
            operation: part.read16(30),
            flags: part.read32(32),
            buffer: part.read32(36),
            forwarded: part.read32(40),
        };
        let length = packet.length as usize;
        if used.written as usize != HEADER_SIZE + length || length > ROOM {
            return Err(Error::Unexpected {
                what: "packet's length",
                value: u64::from(used.written),
            });
        }
        part.read(HEADER_SIZE, &mut data[..length]);
        self.receive
            .add(&[Descriptor::writable(part.address(), BUFFER_SIZE as u32)])?;
        self.receive.notify()?;
        Ok(packet)
    }

    /// Waits for an event and gives its number.
    pub fn event(&mut self, deadline: Deadline) -> Result<u32, Error> {
        let events = &mut self.events;
        wait_for(deadline, "event", || {
            events.want_interrupt(true);
            events.take_used()
        })?;
        Ok(self.event.read32(0))
    }
}

/// One connection's ports and credit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Connection {
    pub own_port: u32,
    pub host_port: u32,
    sent: u32,
    forwarded: u32,
    host_room: u32,
    host_forwarded: u32,
}

impl Connection {
    /// A connection without credit so far.
    pub fn between(own_port: u32, host_port: u32) -> Self {
        Self {
            own_port,
            host_port,
            ..Self::default()
        }
    }

    /// A packet of this connection.
    pub fn packet(&self, cid: u64, operation: u16, length: usize) -> Packet {
        Packet {
            source_cid: cid,
            destination_cid: HOST,
            source_port: self.own_port,
            destination_port: self.host_port,
            length: length as u32,
            kind: 1,
            operation,
            flags: 0,
            buffer: ROOM as u32,
            forwarded: self.forwarded,
        }
    }

    /// Notes the host's credit, and that `length` bytes of it are done with.
    pub fn note(&mut self, packet: &Packet, done: usize) {
        self.host_room = packet.buffer;
        self.host_forwarded = packet.forwarded;
        self.forwarded = self.forwarded.wrapping_add(done as u32);
    }

    /// Bytes that may be sent now.
    pub fn credit(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.host_forwarded);
        self.host_room.saturating_sub(under_way) as usize
    }

    /// Notes that so many bytes were sent.
    pub fn count_sent(&mut self, length: usize) {
        self.sent = self.sent.wrapping_add(length as u32);
    }
}
