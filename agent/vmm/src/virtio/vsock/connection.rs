//! One connection between a port of the guest and a Unix stream of the host.
//!
//! Neither side is ever waited for: what the guest sent and the stream doesn't take stays in a
//! buffer, whose size is the credit that the guest has (virtio 1.2, 5.10.6.3); what the host sent
//! stays in the stream until the guest has credit and buffers.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// What the guest may have sent that the stream has not taken yet, in bytes.
pub const BUFFER_BYTES: u32 = 64 << 10;
/// How long a guest may take to answer a request, and to end a connection whose stream is gone.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The guest was asked and has not answered.
    Asked,
    /// Data goes in both directions, as far as they aren't shut down.
    Open,
    /// Its last packet is a reset, which is to be sent.
    Failed,
    /// There is nothing more to do.
    Over,
}

/// What there is to be told to the guest.
#[derive(Debug, Default)]
struct Pending {
    /// The first packet: a request, or the response to one.
    first: Option<Operation>,
    credit_update: bool,
    credit_request: bool,
    /// Flags of a shutdown that it hasn't been told.
    shutdown: u32,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    state: State,
    pending: Pending,
    /// From the guest, for the stream.
    buffer: VecDeque<u8>,
    /// Bytes of the guest that the stream took.
    forwarded: Wrapping<u32>,
    /// What the guest was last told of that.
    told: Wrapping<u32>,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    /// What of the connection the guest has ended, and what the host (flags of a shutdown).
    guest_ended: u32,
    host_ended: u32,
    /// The stream may have something to read.
    readable: bool,
    credit_asked: bool,
    /// When it is given up.
    deadline: Option<Instant>,
}

impl Connection {
    /// One that the guest asked for and gets.
    pub fn accepted(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(stream, State::Open);
        connection.pending.first = Some(Operation::Response);
        connection.take_credit(request);
        connection
    }

    /// One that the host asks the guest for.
    pub fn asked(stream: UnixStream, now: Instant) -> Self {
        let mut connection = Self::new(stream, State::Asked);
        connection.pending.first = Some(Operation::Request);
        connection.deadline = Some(now + ANSWER_LIMIT);
        connection
    }

    fn new(stream: UnixStream, state: State) -> Self {
        Self {
            stream,
            state,
            pending: Pending::default(),
            buffer: VecDeque::new(),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            guest_ended: 0,
            host_ended: 0,
            readable: true,
            credit_asked: false,
            deadline: None,
        }
    }

    /// Whether there is nothing more to do.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// When [`Self::expire`] has something to do.
    pub const fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The stream with what is to be written to it, of a connection that is over.
    pub fn into_rest(self) -> Option<(UnixStream, VecDeque<u8>)> {
        (!self.buffer.is_empty()).then_some((self.stream, self.buffer))
    }

    /// A packet from the guest, with its data, of which there are as many bytes as it says.
    pub fn take(&mut self, header: &Header, data: &[u8], local_port: u32) {
        self.take_credit(header);
        match Operation::of(header.operation) {
            Some(Operation::Response) if self.state == State::Asked => self.open(local_port),
            Some(Operation::Data) if self.state == State::Open => self.take_data(data),
            Some(Operation::CreditRequest) => self.pending.credit_update = true,
            Some(Operation::CreditUpdate) => {}
            Some(Operation::Shutdown) if self.state == State::Open => self.shut_down(header.flags),
            Some(Operation::Reset) => {
                // What it sent before reaches the host.
                self.state = State::Over;
            }
            // A second request or response, data before the answer, or no operation at all.
            _ => self.fail(),
        }
    }

    /// The stream may be read or written again, or was closed by the host (`hung_up`).
    pub fn wake(&mut self, hung_up: bool) {
        self.readable = true;
        self.write_buffer();
        if hung_up && self.state == State::Asked {
            return self.fail();
        }
        if hung_up {
            self.end_host(SHUTDOWN_RECEIVE);
        }
    }

    /// Gives up what took too long.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.deadline = None;
            self.fail();
        }
    }

    /// The next packet for the guest: its operation, flags, and how many bytes of `data` are filled.
    /// `None` if there is nothing to say now.
    pub fn next(&mut self, data: &mut [u8], now: Instant) -> Option<(Operation, u32, usize)> {
        let plain = |operation| Some((operation, 0, 0));
        if self.state == State::Failed {
            self.state = State::Over;
            return plain(Operation::Reset);
        }
        if let Some(first) = self.pending.first.take() {
            return plain(first);
        }
        if let Some(length) = self.read(data) {
            return Some((Operation::Data, 0, length));
        }
        if self.state == State::Failed {
            self.state = State::Over;
            return plain(Operation::Reset);
        }
        let shutdown = std::mem::take(&mut self.pending.shutdown);
        if shutdown != 0 {
            if shutdown == SHUTDOWN_RECEIVE | SHUTDOWN_SEND {
                self.deadline = Some(now + ANSWER_LIMIT);
            }
            return Some((Operation::Shutdown, shutdown, 0));
        }
        if std::mem::take(&mut self.pending.credit_update) {
            return plain(Operation::CreditUpdate);
        }
        if std::mem::take(&mut self.pending.credit_request) {
            return plain(Operation::CreditRequest);
        }
        None
    }

    /// The credit that goes with every packet: room, and bytes passed on.
    pub fn credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.pending.credit_update = false;
        (BUFFER_BYTES, self.forwarded.0)
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer;
        self.guest_forwarded = Wrapping(header.forwarded);
        self.credit_asked = false;
    }

    fn open(&mut self, local_port: u32) {
        self.state = State::Open;
        self.deadline = None;
        // The first bytes of an empty stream: they fit, or the host has gone.
        let line = format!("OK {local_port}\n");
        if !matches!(self.stream.write(line.as_bytes()), Ok(length) if length == line.len()) {
            self.fail();
        }
    }

    fn take_data(&mut self, data: &[u8]) {
        let waiting = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
        let fits = u32::try_from(data.len())
            .ok()
            .and_then(|length| waiting.checked_add(length))
            .is_some_and(|length| length <= BUFFER_BYTES);
        // More than it has credit for, or after it said that no more comes.
        if !fits || self.guest_ended & SHUTDOWN_SEND != 0 {
            return self.fail();
        }
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            return self.count_forwarded(data.len());
        }
        self.buffer.extend(data);
        self.write_buffer();
    }

    /// Writes what the stream takes.
    fn write_buffer(&mut self) {
        while !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            match self.stream.write(front) {
                Ok(length) => {
                    self.buffer.drain(..length);
                    self.count_forwarded(length);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    // The host reads no more: what comes is taken and forgotten.
                    self.count_forwarded(self.buffer.len());
                    self.buffer.clear();
                    return self.end_host(SHUTDOWN_RECEIVE);
                }
            }
        }
        if self.guest_ended & SHUTDOWN_SEND != 0 {
            // Fails if the host has closed it already.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn count_forwarded(&mut self, length: usize) {
        // At most the buffer's size.
        self.forwarded += Wrapping(u32::try_from(length).unwrap_or(0));
        if (self.forwarded - self.told).0 >= BUFFER_BYTES / 2 {
            self.pending.credit_update = true;
        }
    }

    /// Reads what the guest has credit for.
    fn read(&mut self, data: &mut [u8]) -> Option<usize> {
        let over = self.host_ended & SHUTDOWN_SEND != 0 || self.guest_ended & SHUTDOWN_RECEIVE != 0;
        if self.state != State::Open || !self.readable || over {
            return None;
        }
        let under_way = (self.sent - self.guest_forwarded).0;
        let credit = self.guest_buffer.saturating_sub(under_way);
        if credit == 0 {
            // Asked once: an answer that changes nothing leaves the guest to speak.
            self.pending.credit_request |= !self.credit_asked;
            self.credit_asked = true;
            return None;
        }
        let most = data.len().min(credit as usize);
        loop {
            match self.stream.read(&mut data[..most]) {
                Ok(0) if most > 0 => {
                    self.readable = false;
                    self.end_host(SHUTDOWN_SEND);
                    return None;
                }
                Ok(length) => {
                    self.sent += Wrapping(u32::try_from(length).unwrap_or(0));
                    return (length > 0).then_some(length);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                Err(_) => {
                    self.fail();
                    return None;
                }
            }
        }
    }

    /// The host ended one direction or both.
    fn end_host(&mut self, flags: u32) {
        if self.state == State::Open && self.host_ended | flags != self.host_ended {
            self.host_ended |= flags;
            self.pending.shutdown = self.host_ended;
        }
    }

    /// The guest ended one direction or both.
    fn shut_down(&mut self, flags: u32) {
        self.guest_ended |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        if self.guest_ended == SHUTDOWN_RECEIVE | SHUTDOWN_SEND {
            // Answered by a reset (5.10.6.6); what it sent still reaches the host.
            return self.fail();
        }
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            // Fails if the host has closed it already.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.write_buffer();
    }

    fn fail(&mut self) {
        if self.state != State::Over {
            self.state = State::Failed;
        }
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
