//! A driver for virtio network devices (Virtio 1.3, 5.1): one queue pair or several, no offloads.

use super::FEATURE_EVENT_INDEX;
use super::device::{Device, wait_for};
use super::queue::{Descriptor, Queue, Used};
use crate::clock::Deadline;
use crate::error::Error;
use crate::memory::Buffer;

/// The virtio device type.
pub const KIND: u16 = 1;
/// The longest frame sent or taken, without its checksum.
pub const FRAME_LIMIT: usize = 1514;

/// The most queue pairs that this driver uses.
pub const PAIR_LIMIT: usize = 8;

const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_CONTROL: u64 = 1 << 17;
const FEATURE_PAIRS: u64 = 1 << 22;
/// Where `max_virtqueue_pairs` is in the device's configuration.
const PAIRS: u64 = 8;
const QUEUE_SIZE_LIMIT: u16 = 64;
const CONTROL_SIZE_LIMIT: u16 = 8;
/// `VIRTIO_NET_CTRL_MQ`, `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET` (5.1.6.5.6).
const SET_PAIRS: [u8; 2] = [4, 0];
const ACKNOWLEDGED: u8 = 0;
const UNANSWERED: u8 = 0xee;
/// `struct virtio_net_hdr` with `num_buffers`, which is always there without the legacy interface.
const HEADER_SIZE: usize = 12;
const BUFFER_SIZE: usize = 2048;
const SEND_MILLISECONDS: u64 = 2000;

/// A network device.
pub struct Network {
    pairs: [Option<Pair>; PAIR_LIMIT],
    control: Option<Control>,
    /// The pair that sends.
    sends: usize,
    /// The pair that the last frame came on.
    came: usize,
    mac: [u8; 6],
    /// Resets the device when this is dropped.
    _device: Device,
}

struct Pair {
    receive: Queue,
    transmit: Queue,
    /// One buffer for each descriptor of the receive queue.
    received: Buffer,
    sending: Buffer,
}

struct Control {
    queue: Queue,
    command: Buffer,
}

impl Network {
    /// Sets the device up with one queue pair, and gives it all receive buffers.
    pub fn open(device: Device) -> Result<Self, Error> {
        Self::negotiate(device, FEATURE_MAC | FEATURE_EVENT_INDEX)
    }

    /// As [`Self::open`] with all the pairs there are; the first of them is in use.
    pub fn open_pairs(device: Device) -> Result<Self, Error> {
        let several = FEATURE_CONTROL | FEATURE_PAIRS;
        Self::negotiate(device, FEATURE_MAC | FEATURE_EVENT_INDEX | several)
    }

    fn negotiate(mut device: Device, features: u64) -> Result<Self, Error> {
        device.negotiate(features)?;
        let mut mac = [0; 6];
        for (offset, byte) in (0..).zip(&mut mac) {
            *byte = device.specific().read8(offset)?;
        }
        let several = device.features() & FEATURE_PAIRS != 0;
        let count = if several {
            device.specific().read16(PAIRS)?
        } else {
            1
        };
        if !(1..=PAIR_LIMIT).contains(&usize::from(count)) {
            return Err(Error::Unexpected {
                what: "number of queue pairs",
                value: count.into(),
            });
        }
        let mut pairs = [const { None }; PAIR_LIMIT];
        for (index, pair) in (0..count).zip(&mut pairs) {
            *pair = Some(Pair::open(&device, index)?);
        }
        let control = several
            .then(|| {
                Ok(Control {
                    queue: device.queue(2 * count, CONTROL_SIZE_LIMIT)?,
                    command: Buffer::allocate(8, 8)?,
                })
            })
            .transpose()?;
        device.start()?;
        for pair in pairs.iter_mut().flatten() {
            pair.receive.notify_always()?;
        }
        Ok(Self {
            pairs,
            control,
            sends: 0,
            came: 0,
            mac,
            _device: device,
        })
    }

    /// How many queue pairs there are.
    pub fn pairs(&self) -> usize {
        self.pairs.iter().flatten().count()
    }

    /// Asks the device to use so many pairs; says whether it does.
    pub fn use_pairs(&mut self, count: u16) -> Result<bool, Error> {
        let control = self.control.as_mut().ok_or(Error::BadArgument)?;
        let command = &control.command;
        command.write(0, &SET_PAIRS);
        command.write(2, &count.to_le_bytes());
        command.write8(4, UNANSWERED);
        let place = command.address();
        control.queue.add(&[
            Descriptor::readable(place, 2),
            Descriptor::readable(place + 2, 2),
            Descriptor::writable(place + 4, 1),
        ])?;
        control.queue.notify()?;
        let queue = &mut control.queue;
        let deadline = Deadline::after_milliseconds(SEND_MILLISECONDS);
        wait_for(deadline, "answer on the control queue", || {
            queue.want_interrupt(true);
            queue.take_used()
        })?;
        match control.command.read8(4) {
            UNANSWERED => Err(Error::Unexpected {
                what: "answer on the control queue",
                value: UNANSWERED.into(),
            }),
            answer => Ok(answer == ACKNOWLEDGED),
        }
    }

    /// Sends on pair `index` from now on.
    pub fn send_on(&mut self, index: usize) {
        self.sends = index;
    }

    /// The pair that the last frame came on.
    pub fn came_on(&self) -> usize {
        self.came
    }

    /// The MAC address that the device gives.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Sends a frame and waits until the device has taken it.
    pub fn send(&mut self, frame: &[u8]) -> Result<(), Error> {
        if frame.len() > FRAME_LIMIT {
            return Err(Error::BadArgument);
        }
        let pair = self.pairs.get_mut(self.sends).and_then(Option::as_mut);
        pair.ok_or(Error::BadArgument)?.send(frame)
    }

    /// Copies the next frame out and gives its length; `None` when the deadline passes.
    pub fn receive(
        &mut self,
        frame: &mut [u8; FRAME_LIMIT],
        deadline: Deadline,
    ) -> Result<Option<usize>, Error> {
        let pairs = &mut self.pairs;
        let used = wait_for(deadline, "frame", || {
            for (index, pair) in pairs.iter_mut().enumerate() {
                let Some(pair) = pair else { break };
                pair.receive.want_interrupt(true);
                if let Some(used) = pair.receive.take_used()? {
                    return Ok(Some((index, used)));
                }
            }
            Ok(None)
        });
        let (index, used) = match used {
            Ok(used) => used,
            Err(Error::Timeout(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        self.came = index;
        let pair = self.pairs[index].as_mut().ok_or(Error::BadArgument)?;
        pair.take(used, frame).map(Some)
    }
}

impl Pair {
    fn open(device: &Device, index: u16) -> Result<Self, Error> {
        let mut receive = device.queue(2 * index, QUEUE_SIZE_LIMIT)?;
        let transmit = device.queue(2 * index + 1, QUEUE_SIZE_LIMIT)?;
        let received = Buffer::allocate(usize::from(receive.size()) * BUFFER_SIZE, 4096)?;
        let sending = Buffer::allocate(BUFFER_SIZE, 4096)?;
        for index in 0..receive.size() {
            let part = received.slice(usize::from(index) * BUFFER_SIZE, BUFFER_SIZE);
            receive.add(&[Descriptor::writable(part.address(), BUFFER_SIZE as u32)])?;
        }
        Ok(Self {
            receive,
            transmit,
            received,
            sending,
        })
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), Error> {
        self.sending.write(0, &[0; HEADER_SIZE]);
        self.sending.write(HEADER_SIZE, frame);
        let length = (HEADER_SIZE + frame.len()) as u32;
        self.transmit
            .add(&[Descriptor::readable(self.sending.address(), length)])?;
        self.transmit.notify()?;
        let transmit = &mut self.transmit;
        wait_for(
            Deadline::after_milliseconds(SEND_MILLISECONDS),
            "sent frame",
            || {
                transmit.want_interrupt(true);
                transmit.take_used()
            },
        )?;
        Ok(())
    }

    /// Copies a received frame out, and gives its buffer to the device again.
    fn take(&mut self, used: Used, frame: &mut [u8; FRAME_LIMIT]) -> Result<usize, Error> {
        let written = used.written as usize;
        if !(HEADER_SIZE..=BUFFER_SIZE).contains(&written) {
            return Err(Error::Unexpected {
                what: "received length",
                value: written as u64,
            });
        }
        // A chain of one descriptor got back is the next to be taken, so a head keeps its buffer.
        let part = self
            .received
            .slice(usize::from(used.head) * BUFFER_SIZE, BUFFER_SIZE);
        let length = (written - HEADER_SIZE).min(FRAME_LIMIT);
        part.read(HEADER_SIZE, &mut frame[..length]);
        self.receive
            .add(&[Descriptor::writable(part.address(), BUFFER_SIZE as u32)])?;
        self.receive.notify()?;
        Ok(length)
    }
}
