//! The console socket's clients, the log, and the guest's input.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use super::replay::Replay;
use super::{ConsoleInput, ConsoleLog, ConsoleOutput};

/// What a client that connects gets of the output before.
const REPLAY_BYTES: usize = 64 << 10;
/// What a client may have unread here, beyond its socket's buffer, before it is disconnected.
const MAX_BACKLOG: usize = 256 << 10;
/// Clients at once; a further one is disconnected.
const MAX_CLIENTS: usize = 16;
/// Input that waits for the guest; then clients are not read.
const MAX_INPUT: usize = 4096;

/// The console's host side, driven by the API thread.
pub struct ConsoleServer {
    output: Arc<ConsoleOutput>,
    listener: UnixListener,
    log: ConsoleLog,
    replay: Replay,
    clients: Vec<Client>,
    input: Vec<u8>,
    device: Option<Box<dyn ConsoleInput>>,
    buffer: Vec<u8>,
}

struct Client {
    stream: UnixStream,
    backlog: Vec<u8>,
    gone: bool,
}

impl ConsoleServer {
    /// Serves `listener`, which is non-blocking.
    pub fn new(output: Arc<ConsoleOutput>, listener: UnixListener, log: ConsoleLog) -> Self {
        Self {
            output,
            listener,
            log,
            replay: Replay::new(REPLAY_BYTES),
            clients: Vec::new(),
            input: Vec::new(),
            device: None,
            buffer: Vec::new(),
        }
    }

    /// Takes the device of a new boot as the one that gets the input.
    pub fn attach(&mut self, device: Box<dyn ConsoleInput>) {
        self.device = Some(device);
        self.feed_guest();
    }

    /// What to poll, with the events to wait for.
    pub fn poll_set(&self, into: &mut Vec<(RawFd, i16)>) {
        into.push((self.output.wake_event().as_raw_fd(), libc::POLLIN));
        into.push((self.listener.as_raw_fd(), libc::POLLIN));
        for client in &self.clients {
            let read = if self.input.len() < MAX_INPUT {
                libc::POLLIN
            } else {
                0
            };
            let write = if client.backlog.is_empty() {
                0
            } else {
                libc::POLLOUT
            };
            into.push((client.stream.as_raw_fd(), read | write));
        }
    }

    /// Does all that can be done without blocking.
    pub fn run(&mut self) {
        // Reading an eventfd that isn't ready says EAGAIN, which is fine.
        let _ = self.output.wake_event().read();
        self.move_output();
        self.accept();
        self.read_clients();
        self.feed_guest();
        self.write_clients();
        self.clients.retain(|client| !client.gone);
    }

    fn move_output(&mut self) {
        let mut bytes = std::mem::take(&mut self.buffer);
        let dropped = self.output.take(&mut bytes);
        if !bytes.is_empty() {
            self.deliver(&bytes);
        }
        if dropped > 0 {
            self.deliver(format!("\r\n[{dropped} bytes of output dropped]\r\n").as_bytes());
        }
        self.buffer = bytes;
    }

    fn deliver(&mut self, bytes: &[u8]) {
        self.log.write(bytes);
        self.replay.push(bytes);
        for client in &mut self.clients {
            client.backlog.extend_from_slice(bytes);
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            self.clients.push(Client {
                stream,
                backlog: self.replay.to_vec(),
                gone: false,
            });
        }
    }

    fn read_clients(&mut self) {
        let mut chunk = [0; 1024];
        for client in &mut self.clients {
            while self.input.len() < MAX_INPUT && !client.gone {
                match client.stream.read(&mut chunk) {
                    Ok(0) => client.gone = true,
                    Ok(length) => self.input.extend_from_slice(&chunk[..length]),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => client.gone = true,
                }
            }
        }
    }

    fn feed_guest(&mut self) {
        if let Some(device) = &self.device {
            let taken = device.send(&self.input);
            self.input.drain(..taken);
        }
    }

    fn write_clients(&mut self) {
        for client in &mut self.clients {
            while !client.backlog.is_empty() && !client.gone {
                match client.stream.write(&client.backlog) {
                    Ok(length) => drop(client.backlog.drain(..length)),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => client.gone = true,
                }
            }
            client.gone |= client.backlog.len() > MAX_BACKLOG;
        }
    }
}
