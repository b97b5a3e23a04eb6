//! The rings of each in-process device: descriptors, indices and buffers of any content.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::input::Input;
use super::rings::{self, activation, event, fill_buffers, fill_queue, layout};
use crate::config::BalloonConfig;
use crate::console::{ConsoleInput, ConsoleOutput};
use crate::memory::GuestMemory;
use crate::virtio::balloon::{Balloon, BalloonControl};
use crate::virtio::console::{Console, ConsolePort, ConsoleSize};
use crate::virtio::net::{ControlQueue, PacketQueue as NetQueue, Receiver, TapQueue, Transmitter};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Host, LISTENER, Muxer, PacketQueue, Service};
use crate::virtio::{FEATURE_EVENT_IDX, VirtioDevice};

/// The entropy device.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn rng(input: &[u8]) {
    device(&mut Rng::default(), 1, input);
}

/// The balloon.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn balloon(input: &[u8]) {
    let control = Arc::new(BalloonControl::new(2));
    let mut balloon = Balloon::new(&BalloonConfig::default(), Arc::clone(&control));
    device(&mut balloon, 5, input);
    let _ = control.status();
}

/// The console, with input that waits.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn console(input: &[u8]) {
    const TYPED: [u8; 40] = *b"this is what somebody types at a console";
    let output = Arc::new(ConsoleOutput::new().expect("an eventfd"));
    let port = Arc::new(ConsolePort::new(Arc::clone(&output)));
    let mut console = Console::new(Arc::clone(&port));
    let typing = Arc::clone(&port);
    device_with(&mut console, 2, input, move || {
        assert!(typing.send(&TYPED) <= TYPED.len());
        typing.resize(ConsoleSize {
            columns: 1,
            rows: 1,
        });
    });
    // Without a driver there is nobody to type to.
    assert_eq!(port.send(&TYPED), 0);
}

fn device(device: &mut dyn VirtioDevice, queues: u16, input: &[u8]) {
    device_with(device, queues, input, || {});
}

/// `host` is what the host does while the device serves its driver.
fn device_with(device: &mut dyn VirtioDevice, queues: u16, input: &[u8], host: impl Fn()) {
    let mut input = Input(input);
    let memory = rings::memory();
    let features = device.features() & !(u64::from(input.byte() & 0x3f) | event_idx(&mut input));
    for queue in 0..queues {
        fill_queue(&memory, queue, &mut input);
    }
    fill_buffers(&memory, &mut input);
    if device
        .activate(activation(&memory, queues, features, false))
        .is_err()
    {
        return;
    }
    for queue in 0..=queues {
        device.notify(queue);
    }
    device.ask_for_statistics();
    host();
    let _ = device.pause();
    let state = device.save();
    assert_eq!(device.restore(&state), Ok(()));
    let _ = device.activate(activation(&memory, queues, features, true));
    host();
    device.reset();
}

fn event_idx(input: &mut Input<'_>) -> u64 {
    if input.byte() & 1 == 0 {
        0
    } else {
        FEATURE_EVENT_IDX
    }
}

/// An interface's two directions, with a socket of packets in the TAP's place, and its control queue.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn net(input: &[u8]) {
    let mut input = Input(input);
    let memory = rings::memory();
    let features = u64::from(input.word());
    let event_idx = input.byte() & 1 != 0;
    let mtu = input.half();
    fill_queue(&memory, 0, &mut input);
    fill_queue(&memory, 1, &mut input);
    fill_queue(&memory, 2, &mut input);
    fill_buffers(&memory, &mut input);
    let (ours, theirs) = UnixDatagram::pair().expect("a pair of sockets");
    for socket in [&ours, &theirs] {
        socket.set_nonblocking(true).expect("a flag");
    }
    let tap = TapQueue::of(File::from(OwnedFd::from(ours)));
    let open = |index| {
        let queue = layout(index)
            .open(index, &memory, event_idx)
            .expect("rings in memory");
        NetQueue::new(queue, Arc::clone(&memory))
    };
    let mut receiver = Receiver::new(open(0), features, mtu);
    let mut transmitter = Transmitter::new(open(1));
    let packet = [0x5a; 1600];
    for length in [60, 1514, 12, 1, 0] {
        let _ = theirs.send(&packet[..length]);
    }
    for _ in 0..3 {
        let _ = receiver.run(&tap);
        let _ = transmitter.run(&tap);
    }
    let queue = layout(2)
        .open(2, &memory, event_idx)
        .expect("rings in memory");
    let mut control = ControlQueue::new(queue, Arc::clone(&memory), event());
    let mut commands = 0;
    let _ = control.serve(|count| {
        commands += 1;
        count % 2 == 1
    });
    assert!(commands <= layout(2).size);
}

/// A host whose every port is a socket pair.
struct Echo {
    /// Nobody writes it: connections come from the list.
    listener: EventFd,
    ends: Arc<Mutex<Vec<UnixStream>>>,
    waiting: Mutex<Vec<UnixStream>>,
}

impl Host for Echo {
    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        if port % 8 == 7 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = pair()?;
        self.ends
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(theirs);
        Ok(ours)
    }

    fn accept(&self) -> io::Result<UnixStream> {
        let next = self
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        next.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn descriptor(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}

/// The socket device: rings of any content, packets of the guest that make sense in part, and what
/// streams of the host do meanwhile.
///
/// # Panics
/// Where something doesn't hold that must: a defect, which the fuzzer reports.
pub fn vsock(input: &[u8]) {
    let mut input = Input(input);
    let memory = rings::memory();
    let ends = Arc::new(Mutex::new(Vec::new()));
    let (asking, asked) = pair().expect("a pair of sockets");
    let host = Echo {
        listener: event(),
        ends: Arc::clone(&ends),
        waiting: Mutex::new(vec![asked]),
    };
    let Ok(muxer) = Muxer::new(3, Box::new(host)) else {
        return;
    };
    let event_idx = input.byte() & 1 != 0;
    let raw = input.byte() % 8 == 0;
    let open = |index| {
        let queue = layout(index)
            .open(index, &memory, event_idx)
            .expect("rings in memory");
        PacketQueue::new(queue, Arc::clone(&memory), event())
    };
    let (receive, transmit) = (open(0), open(1));
    let mut service = Service::new(muxer, receive, transmit);
    let mut now = Instant::now();
    let _ = (&asking).write_all(b"CONNECT 52\n");
    service.muxer.wake(LISTENER, EventSet::IN, now);
    service.muxer.wake(LISTENER + 2, EventSet::IN, now);
    if raw {
        fill_queue(&memory, 0, &mut input);
        fill_queue(&memory, 1, &mut input);
        fill_buffers(&memory, &mut input);
        let _ = service.turn(now);
        return;
    }
    let mut available = [0u16; 2];
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        match input.byte() % 8 {
            0..=3 => give_packet(&memory, &mut available[1], &mut input),
            4 | 5 => give_buffer(&memory, &mut available[0], &mut input),
            6 => host_acts(&ends, &mut input),
            _ => now += Duration::from_secs(u64::from(input.byte())),
        }
        for token in LISTENER..LISTENER + 16 {
            let hung_up = input.0.first().is_some_and(|byte| byte & 64 != 0);
            let set = if hung_up {
                EventSet::HANG_UP
            } else {
                EventSet::IN
            };
            service.muxer.wake(token, set, now);
        }
        service.muxer.expire(now);
        if service.turn(now).is_err() {
            return;
        }
        assert!(service.muxer.peers() <= 80);
    }
    let mut events = open(2);
    let _ = Service::reset_transport(&mut events);
}

/// One packet of the guest in the transmit queue: header and data in one descriptor.
fn give_packet(memory: &GuestMemory, available: &mut u16, input: &mut Input<'_>) {
    const PLACE: u64 = 0x9000;
    let [operation, port, own, length, flags, credit, odd] = input.array();
    let length = u32::from(length) * 16;
    let mut packet = Vec::new();
    let guest: u64 = if odd == 1 { 9 } else { 3 };
    packet.extend_from_slice(&guest.to_le_bytes());
    packet.extend_from_slice(&2u64.to_le_bytes());
    // The host's connection to port 52 is from 2^30.
    let (from, to) = if port & 0x80 != 0 {
        (52, 1 << 30)
    } else {
        (u32::from(own % 4), u32::from(port % 16))
    };
    packet.extend_from_slice(&from.to_le_bytes());
    packet.extend_from_slice(&to.to_le_bytes());
    let said = if odd == 2 { u32::MAX } else { length };
    packet.extend_from_slice(&said.to_le_bytes());
    packet.extend_from_slice(&u16::from(odd != 3).to_le_bytes());
    packet.extend_from_slice(&u16::from(operation % 9).to_le_bytes());
    packet.extend_from_slice(&u32::from(flags).to_le_bytes());
    packet.extend_from_slice(&(u32::from(credit) * 64).to_le_bytes());
    packet.extend_from_slice(&input.word().to_le_bytes());
    packet.resize(44 + length as usize, 0x77);
    let _ = memory.write(&packet, GuestAddress(PLACE));
    let total = u32::try_from(packet.len()).unwrap_or(0);
    publish(memory, 1, available, PLACE, total, 0);
}

/// One buffer in the receive queue.
fn give_buffer(memory: &GuestMemory, available: &mut u16, input: &mut Input<'_>) {
    let length = u32::from(input.byte()) * 8 + 45;
    publish(
        memory,
        0,
        available,
        0x1_0000 + u64::from(*available % 8) * 0x1000,
        length,
        2,
    );
}

fn publish(
    memory: &GuestMemory,
    queue: u16,
    available: &mut u16,
    at: u64,
    length: u32,
    flags: u16,
) {
    let layout = layout(queue);
    let slot = u64::from(*available % layout.size);
    let mut descriptor = at.to_le_bytes().to_vec();
    descriptor.extend_from_slice(&length.to_le_bytes());
    descriptor.extend_from_slice(&u32::from(flags).to_le_bytes());
    let _ = memory.write(&descriptor, GuestAddress(layout.descriptors + slot * 16));
    let head = u16::try_from(slot).unwrap_or(0);
    let _ = memory.write_obj(head, GuestAddress(layout.available + 4 + slot * 2));
    *available = available.wrapping_add(1);
    let _ = memory.write_obj(*available, GuestAddress(layout.available + 2));
}

/// A stream of the host writes, reads, ends a direction, or is closed.
fn host_acts(ends: &Mutex<Vec<UnixStream>>, input: &mut Input<'_>) {
    let mut ends = ends.lock().unwrap_or_else(PoisonError::into_inner);
    if ends.is_empty() {
        return;
    }
    let at = usize::from(input.byte()) % ends.len();
    let act = input.byte();
    let stream = &mut ends[at];
    match act % 5 {
        0 => drop(stream.write(&vec![0x33; usize::from(act) * 64])),
        1 => drop(stream.read(&mut [0; 4096])),
        2 => drop(stream.shutdown(std::net::Shutdown::Write)),
        3 => drop(stream.shutdown(std::net::Shutdown::Read)),
        _ => drop(ends.swap_remove(at)),
    }
}
