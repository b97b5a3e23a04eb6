//! All connections: which packet belongs to which, and whose turn it is to send one.
//!
//! It has no thread and no queues: [`super::worker`] gives it the guest's packets and the events of
//! its sockets, and asks it for packets for the guest. Everything in it is bounded.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::Connection;
use super::host::Host;
use super::packet::{HOST_CID, Header, Operation, STREAM};

/// Connections at once, with those that the host is just asking for and those that only have data
/// left for the host. A further one is refused.
pub const MAX_CONNECTIONS: usize = 512;
/// Resets that wait for the guest's buffers; with more, no more of its packets are taken.
const MAX_RESETS: usize = 256;
/// The longest line with which the host asks for a connection: `CONNECT 4294967295\r\n`.
const MAX_LINE: usize = 20;
/// How long the host may take to write it, and to read what an ended connection has left for it.
const HOST_LIMIT: Duration = Duration::from_mins(1);
/// When connections are accepted again, where that failed or there were too many.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(100);
/// The ports of the host's side of connections that the host asks for begin here.
const FIRST_PORT: u32 = 1 << 30;

/// The token of the listener's events. Those above are the peers'.
pub const LISTENER: u64 = 1 << 32;

/// A connection's two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

/// A stream of the host.
enum Peer {
    /// It is to say which port it wants.
    New {
        stream: UnixStream,
        line: Vec<u8>,
        deadline: Instant,
    },
    Connected {
        ports: Ports,
        connection: Connection,
        queued: bool,
    },
    /// Its connection is over, but it has not read all.
    Rest {
        stream: UnixStream,
        data: VecDeque<u8>,
        deadline: Instant,
    },
}

/// All connections of a guest.
pub struct Muxer {
    cid: u64,
    host: Box<dyn Host>,
    epoll: Epoll,
    peers: BTreeMap<u64, Peer>,
    connected: HashMap<Ports, u64>,
    /// Connections that may have a packet to send, each once.
    turns: VecDeque<u64>,
    /// Answers to packets of no connection.
    resets: VecDeque<Header>,
    next_token: u64,
    next_port: u32,
    accept_again: Option<Instant>,
}

impl Muxer {
    /// No connections yet; the guest's context identifier is `cid`.
    pub fn new(cid: u64, host: Box<dyn Host>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        // Told once: a connection that can't be accepted for want of descriptors is tried again later.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        watch(&epoll, host.descriptor(), edge, LISTENER)?;
        Ok(Self {
            cid,
            host,
            epoll,
            peers: BTreeMap::new(),
            connected: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: LISTENER + 1,
            next_port: FIRST_PORT,
            accept_again: None,
        })
    }

    /// Where the events of its sockets come from, with tokens from [`LISTENER`] on.
    pub const fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Streams of the host at the moment.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn peers(&self) -> usize {
        self.peers.len()
    }

    /// Whether the guest's packets are taken: the answers to the last ones must go first.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Whether [`Self::next`] may have a packet.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// When [`Self::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let deadlines = self.peers.values().filter_map(|peer| match peer {
            Peer::New { deadline, .. } | Peer::Rest { deadline, .. } => Some(*deadline),
            Peer::Connected { connection, .. } => connection.deadline(),
        });
        deadlines.chain(self.accept_again).min()
    }

    /// A packet from the guest, with its data, of which there are as many bytes as it says.
    pub fn take(&mut self, header: &Header, data: &[u8]) {
        // Not from this guest or not to this host: nobody to answer (virtio 1.2, 5.10.6.4.1).
        if header.source_cid != self.cid || header.destination_cid != HOST_CID {
            return;
        }
        if header.kind != STREAM {
            return self.refuse(header);
        }
        let ports = Ports {
            host: header.destination_port,
            guest: header.source_port,
        };
        let token = self.connected.get(&ports).copied();
        if let Some(token) = token
            && let Some(Peer::Connected { connection, .. }) = self.peers.get_mut(&token)
        {
            connection.take(header, data, ports.host);
            return self.after_change(token);
        }
        match Operation::of(header.operation) {
            Some(Operation::Request) => self.connect(header, ports),
            Some(Operation::Reset) => {}
            _ => self.refuse(header),
        }
    }

    /// A socket of the host has something to say.
    pub fn wake(&mut self, token: u64, events: EventSet, now: Instant) {
        if token == LISTENER {
            return self.accept(now);
        }
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match self.peers.get_mut(&token) {
            Some(Peer::New { .. }) => self.read_line(token, now),
            Some(Peer::Connected { connection, .. }) => {
                connection.wake(hung_up);
                self.after_change(token);
            }
            Some(Peer::Rest { stream, data, .. }) => {
                let over = hung_up || !write_rest(stream, data);
                if over {
                    self.peers.remove(&token);
                }
            }
            None => {}
        }
    }

    /// Gives up what took too long.
    pub fn expire(&mut self, now: Instant) {
        if self.accept_again.is_some_and(|again| again <= now) {
            self.accept(now);
        }
        let tokens: Vec<u64> = self.peers.keys().copied().collect();
        for token in tokens {
            match self.peers.get_mut(&token) {
                Some(Peer::New { deadline, .. } | Peer::Rest { deadline, .. })
                    if *deadline <= now =>
                {
                    self.peers.remove(&token);
                }
                Some(Peer::Connected { connection, .. })
                    if connection.deadline().is_some_and(|at| at <= now) =>
                {
                    connection.expire(now);
                    self.after_change(token);
                }
                _ => {}
            }
        }
    }

    /// The next packet for the guest, whose data is put into `data`.
    pub fn next(&mut self, data: &mut [u8], now: Instant) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.turns.pop_front() {
            let Some(Peer::Connected {
                ports,
                connection,
                queued,
            }) = self.peers.get_mut(&token)
            else {
                continue;
            };
            *queued = false;
            let Some((operation, flags, length)) = connection.next(data, now) else {
                self.remove_if_over(token);
                continue;
            };
            let (buffer, forwarded) = connection.credit();
            let header = Header {
                source_cid: HOST_CID,
                destination_cid: self.cid,
                source_port: ports.host,
                destination_port: ports.guest,
                length: u32::try_from(length).unwrap_or(0),
                kind: STREAM,
                operation: operation as u16,
                flags,
                buffer,
                forwarded,
            };
            // It may have more: at the end of the line.
            self.after_change(token);
            return Some(header);
        }
        None
    }

    fn refuse(&mut self, header: &Header) {
        if Operation::of(header.operation) != Some(Operation::Reset) {
            self.resets.push_back(header.reset_of());
        }
    }

    /// The guest asks for a connection.
    fn connect(&mut self, request: &Header, ports: Ports) {
        if self.peers.len() >= MAX_CONNECTIONS {
            return self.refuse(request);
        }
        let stream = match self.host.connect(ports.host) {
            Ok(stream) => stream,
            Err(e) => {
                tracing::debug!(port = ports.host, "nobody at a port of the host: {e}");
                return self.refuse(request);
            }
        };
        let descriptor = stream.as_raw_fd();
        let connection = Connection::accepted(stream, request);
        if self.add(descriptor, ports, connection).is_none() {
            self.refuse(request);
        }
    }

    fn add(&mut self, descriptor: RawFd, ports: Ports, connection: Connection) -> Option<()> {
        let token = self.next_token();
        watch_stream(&self.epoll, descriptor, token).ok()?;
        self.insert(token, ports, connection);
        Some(())
    }

    fn insert(&mut self, token: u64, ports: Ports, connection: Connection) {
        let peer = Peer::Connected {
            ports,
            connection,
            queued: false,
        };
        self.peers.insert(token, peer);
        self.connected.insert(ports, token);
        self.queue(token);
    }

    /// The host asks for connections.
    fn accept(&mut self, now: Instant) {
        self.accept_again = None;
        // Not more than there may be at once: others have their turn in between.
        for _ in 0..MAX_CONNECTIONS {
            match self.host.accept() {
                // Closed: the host sees the end of the stream.
                Ok(_) if self.peers.len() >= MAX_CONNECTIONS => {}
                Ok(stream) => {
                    let token = self.next_token();
                    if watch_stream(&self.epoll, stream.as_raw_fd(), token).is_ok() {
                        let peer = Peer::New {
                            stream,
                            line: Vec::new(),
                            deadline: now + HOST_LIMIT,
                        };
                        self.peers.insert(token, peer);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    tracing::debug!("a vsock connection can't be accepted: {e}");
                    break;
                }
            }
        }
        self.accept_again = Some(now + ACCEPT_INTERVAL);
    }

    /// Reads on in the line of a stream that is to say which port it wants, and no byte more.
    fn read_line(&mut self, token: u64, now: Instant) {
        let Some(Peer::New { stream, line, .. }) = self.peers.get_mut(&token) else {
            return;
        };
        let mut byte = [0];
        loop {
            match stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if line.len() < MAX_LINE - 1 => line.push(byte[0]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // It has gone, or says something else.
                _ => return drop(self.peers.remove(&token)),
            }
        }
        let wanted = wanted_port(line);
        let Some(Peer::New { stream, .. }) = self.peers.remove(&token) else {
            return;
        };
        let free = wanted.and_then(|guest| self.free_ports(guest));
        if let Some(ports) = free {
            self.insert(token, ports, Connection::asked(stream, now));
        }
    }

    /// Ports for a connection to a port of the guest.
    fn free_ports(&mut self, guest: u32) -> Option<Ports> {
        // One of so many is free: there are not more connections.
        for _ in 0..=MAX_CONNECTIONS {
            let ports = Ports {
                host: self.next_port,
                guest,
            };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if self.next_port == u32::MAX {
                self.next_port = FIRST_PORT;
            }
            if !self.connected.contains_key(&ports) {
                return Some(ports);
            }
        }
        None
    }

    /// Removes a connection that is over, or lets it have a turn.
    fn after_change(&mut self, token: u64) {
        if !self.remove_if_over(token) {
            self.queue(token);
        }
    }

    fn remove_if_over(&mut self, token: u64) -> bool {
        match self.peers.get(&token) {
            Some(Peer::Connected { connection, .. }) if connection.is_over() => {}
            _ => return false,
        }
        let Some(Peer::Connected {
            ports, connection, ..
        }) = self.peers.remove(&token)
        else {
            return false;
        };
        self.connected.remove(&ports);
        if let Some((stream, data)) = connection.into_rest() {
            let deadline = Instant::now() + HOST_LIMIT;
            let rest = Peer::Rest {
                stream,
                data,
                deadline,
            };
            self.peers.insert(token, rest);
        }
        true
    }

    fn queue(&mut self, token: u64) {
        if let Some(Peer::Connected { queued, .. }) = self.peers.get_mut(&token)
            && !std::mem::replace(queued, true)
        {
            self.turns.push_back(token);
        }
    }

    const fn next_token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }
}

/// The port in `CONNECT PORT`.
fn wanted_port(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    let digits = digits.strip_suffix(b"\r").unwrap_or(digits);
    let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let text = plain.then(|| std::str::from_utf8(digits).ok()).flatten()?;
    text.parse().ok().filter(|port| *port != u32::MAX)
}

/// Writes on; whether there is still something left for somebody.
fn write_rest(stream: &mut UnixStream, data: &mut VecDeque<u8>) -> bool {
    while !data.is_empty() {
        match stream.write(data.as_slices().0) {
            Ok(length) => drop(data.drain(..length)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
        }
    }
    false
}

/// Told once of each change, in both directions.
fn watch_stream(epoll: &Epoll, descriptor: RawFd, token: u64) -> io::Result<()> {
    let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    watch(epoll, descriptor, set, token)
}

/// Adds a descriptor to what `epoll` watches.
pub fn watch(epoll: &Epoll, descriptor: RawFd, set: EventSet, token: u64) -> io::Result<()> {
    let event = EpollEvent::new(set, token);
    epoll.ctl(ControlOperation::Add, descriptor, event)
}
