//! The thread that serves the API socket and the console socket.

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Serialize;

use super::{
    Acknowledged, Answer, Connection, Control, ControlSender, ErrorBody, GuestState, Hotplug,
    MAX_LINE, Reply, Request, Response, SharedState,
};
use crate::console::{ConsoleInput, ConsoleServer};
use crate::isolation::seccomp::{self, Mode, Thread};
use crate::virtio::console::ConsoleSize;

/// Clients at once; a further one gets an error line.
const MAX_CLIENTS: usize = 32;
/// What a client may have unread before it is disconnected.
const MAX_BACKLOG: usize = 256 << 10;
/// What a request may have with it, and more than any needs.
const MAX_DESCRIPTORS: usize = 4;
/// Output is moved at most this often, so that a guest which prints byte by byte costs little. What comes
/// after a longer silence is moved at once.
const COALESCE: Duration = Duration::from_millis(1);

/// The server's state: see [`ApiServer::spawn`].
pub(crate) struct ApiServer {
    listener: UnixListener,
    shared: Arc<SharedState>,
    console: ConsoleServer,
    control: ControlSender,
    commands: Receiver<Command>,
    answers: Sender<Command>,
    clients: Vec<Client>,
    next_client: u64,
}

/// What the thread is told by the one that owns the guest.
enum Command {
    Attach(Box<dyn ConsoleInput>),
    /// The answer for the client with this number.
    Answer(u64, Answer),
    Finish,
}

/// The running thread.
pub(crate) struct ApiThread {
    commands: Sender<Command>,
    shared: Arc<SharedState>,
    thread: JoinHandle<()>,
}

impl ApiThread {
    /// What is typed goes to this device from now on.
    pub(crate) fn attach(&self, device: Box<dyn ConsoleInput>) {
        self.send(Command::Attach(device));
    }

    /// Delivers what is left to log and clients, and ends.
    pub(crate) fn finish(self) {
        self.send(Command::Finish);
        if self.thread.join().is_err() {
            tracing::error!("the API thread panicked");
        }
    }

    fn send(&self, command: Command) {
        // The thread ends only by Finish.
        let _ = self.commands.send(command);
        let _ = self.shared.wake_event().write(1);
    }
}

impl ApiServer {
    /// Serves `listener` (non-blocking) and `console` in a new thread; requests that change the
    /// guest go to `control`.
    pub(crate) fn spawn(
        listener: UnixListener,
        shared: Arc<SharedState>,
        console: ConsoleServer,
        control: ControlSender,
        seccomp: Mode,
    ) -> io::Result<ApiThread> {
        let (sender, commands) = channel();
        let server = Self {
            listener,
            shared: Arc::clone(&shared),
            console,
            control,
            commands,
            answers: sender.clone(),
            clients: Vec::new(),
            next_client: 0,
        };
        let thread = std::thread::Builder::new()
            .name("api".into())
            .spawn(move || match seccomp::apply(Thread::Api, seccomp) {
                Ok(()) => server.serve(),
                Err(e) => tracing::error!("{e}"),
            })?;
        Ok(ApiThread {
            commands: sender,
            shared,
            thread,
        })
    }

    fn serve(mut self) {
        let mut set = Vec::new();
        let mut earlier: Option<Instant> = None;
        loop {
            set.clear();
            self.poll_set(&mut set);
            if let Err(e) = poll(&set) {
                tracing::error!("poll failed: {e}");
                return;
            }
            let rest = earlier.and_then(|earlier| COALESCE.checked_sub(earlier.elapsed()));
            if let Some(rest) = rest {
                std::thread::sleep(rest);
            }
            earlier = Some(Instant::now());
            let _ = self.shared.wake_event().read();
            let finish = self.run_commands();
            self.console.run();
            self.accept();
            let guest = GuestAccess {
                shared: &self.shared,
                control: &self.control,
                answers: &self.answers,
            };
            for client in &mut self.clients {
                client.read(&guest);
            }
            for event in self.shared.take_events() {
                for client in self.clients.iter_mut().filter(|client| client.subscribed) {
                    client.send(&event);
                }
            }
            self.clients.retain_mut(Client::flush);
            if finish {
                return;
            }
        }
    }

    fn poll_set(&self, set: &mut Vec<(RawFd, i16)>) {
        set.push((self.shared.wake_event().as_raw_fd(), libc::POLLIN));
        set.push((self.listener.as_raw_fd(), libc::POLLIN));
        for client in &self.clients {
            let write = if client.output.is_empty() {
                0
            } else {
                libc::POLLOUT
            };
            set.push((client.stream.as_raw_fd(), libc::POLLIN | write));
        }
        self.console.poll_set(set);
    }

    /// Returns whether to finish.
    fn run_commands(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Attach(device) => self.console.attach(device),
                Command::Answer(number, answer) => self.deliver(number, answer),
                Command::Finish => return true,
            }
        }
        false
    }

    /// Gives a client the answer that it waits for, and takes its next requests.
    fn deliver(&mut self, number: u64, answer: Answer) {
        let Some(client) = self.clients.iter_mut().find(|c| c.number == number) else {
            return;
        };
        client.waits = false;
        match answer {
            Ok(value) => client.send(&Response::Ok(value)),
            Err(body) => client.send(&Response::<Acknowledged>::Error(body)),
        }
        client.answer_lines(&GuestAccess {
            shared: &self.shared,
            control: &self.control,
            answers: &self.answers,
        });
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            self.next_client += 1;
            let mut client = Client::new(stream, self.next_client);
            if self.clients.len() >= MAX_CLIENTS {
                client.refuse(
                    "too_many_clients",
                    format!("{MAX_CLIENTS} clients are connected"),
                );
                client.flush();
            } else {
                self.clients.push(client);
            }
        }
    }
}

/// What a request can be about.
struct GuestAccess<'a> {
    shared: &'a Arc<SharedState>,
    control: &'a ControlSender,
    answers: &'a Sender<Command>,
}

struct Client {
    stream: UnixStream,
    number: u64,
    /// For the answer of a request that takes a while.
    waits: bool,
    input: Vec<u8>,
    /// What came with the input, for the next request.
    descriptors: Vec<OwnedFd>,
    output: Vec<u8>,
    subscribed: bool,
    gone: bool,
}

impl Client {
    const fn new(stream: UnixStream, number: u64) -> Self {
        Self {
            stream,
            number,
            waits: false,
            input: Vec::new(),
            descriptors: Vec::new(),
            output: Vec::new(),
            subscribed: false,
            gone: false,
        }
    }

    fn read(&mut self, guest: &GuestAccess<'_>) {
        let mut chunk = [0; 4096];
        loop {
            match receive(&self.stream, &mut chunk, &mut self.descriptors) {
                Ok(0) => self.gone = true,
                Ok(length) => {
                    self.input.extend_from_slice(&chunk[..length]);
                    self.answer_lines(guest);
                }
                Err(Errno::INTR) => continue,
                Err(Errno::WOULDBLOCK) => return,
                Err(_) => self.gone = true,
            }
            if self.descriptors.len() > MAX_DESCRIPTORS {
                self.gone = true;
            }
            if self.gone {
                return;
            }
        }
    }

    fn answer_lines(&mut self, guest: &GuestAccess<'_>) {
        while !self.waits
            && let Some(end) = self.input.iter().position(|byte| *byte == b'\n')
        {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(request) => self.answer(request, guest),
                Err(e) => self.refuse("bad_request", format!("no request: {e}")),
            }
        }
        if self.input.len() > MAX_LINE {
            self.refuse(
                "bad_request",
                format!("a line has more than {MAX_LINE} bytes"),
            );
            self.flush();
            self.gone = true;
        }
    }

    fn answer(&mut self, request: Request, guest: &GuestAccess<'_>) {
        let GuestAccess {
            shared, control, ..
        } = guest;
        let descriptors = std::mem::take(&mut self.descriptors);
        let order = match request {
            Request::Status => return self.send(&Response::Ok(shared.status())),
            Request::Subscribe => {
                self.subscribed = true;
                return self.send(&Response::Ok(Acknowledged {}));
            }
            Request::PowerButton => Control::PowerButton,
            Request::Reset => Control::Reset,
            Request::Kill => Control::Kill,
            Request::Pause => Control::Pause(self.reply(guest)),
            Request::Resume => Control::Resume(self.reply(guest)),
            Request::Snapshot(request) => Control::Snapshot(request, self.reply(guest)),
            Request::Migration => {
                return self.send(&Response::Ok(shared.progress().status()));
            }
            Request::Migrate(limits) => {
                return self.hand_over(guest, |c| Control::Migrate(limits, c));
            }
            Request::Receive => return self.hand_over(guest, Control::Receive),
            Request::ReleaseMigration => Control::ReleaseMigration(self.reply(guest)),
            Request::CancelMigration => Control::CancelMigration(self.reply(guest)),
            Request::Balloon => Control::Balloon(self.reply(guest)),
            Request::ResizeBalloon { size_mib } => {
                Control::ResizeBalloon(size_mib, self.reply(guest))
            }
            Request::ResizeConsole { columns, rows } => {
                Control::ResizeConsole(ConsoleSize { columns, rows }, self.reply(guest))
            }
            Request::AddDisk(disk) => {
                Control::Hotplug(Hotplug::AddDisk(Box::new(disk), self.reply(guest)))
            }
            Request::AddInterface(interface) => {
                let (interface, tap) = (Box::new(interface), descriptors.into_iter().next());
                Control::Hotplug(Hotplug::AddInterface(interface, tap, self.reply(guest)))
            }
            Request::RemoveDevice(removal) => {
                Control::Hotplug(Hotplug::Remove(removal, self.reply(guest)))
            }
            Request::Devices => Control::Hotplug(Hotplug::Devices(self.reply(guest))),
        };
        let ended = matches!(
            shared.status().state,
            GuestState::Stopped | GuestState::Failed
        );
        let waits = self.waits;
        if ended || !control(order) {
            // The reply of a request that waits says so itself, when it is dropped.
            if !waits {
                self.refuse("not_running", "the guest has ended".to_owned());
            }
        } else if !waits {
            self.send(&Response::Ok(Acknowledged {}));
        }
    }

    /// Gives the connection away: it is no client's any more.
    fn hand_over(&mut self, guest: &GuestAccess<'_>, control: impl FnOnce(Connection) -> Control) {
        if !self.input.is_empty() || !self.output.is_empty() || self.subscribed {
            let message = "nothing else may be under way on this connection".to_owned();
            return self.refuse("bad_request", message);
        }
        match self.stream.try_clone() {
            Ok(stream) => {
                self.gone = true;
                // If the guest has ended, the client sees the end of the connection.
                let _ = (guest.control)(control(Connection::new(stream)));
            }
            Err(e) => self.refuse("bad_request", format!("the connection can't be taken: {e}")),
        }
    }

    /// Lets the answer of the request come later; until then no further one is looked at.
    fn reply(&mut self, guest: &GuestAccess<'_>) -> Reply {
        self.waits = true;
        let (answers, shared) = (guest.answers.clone(), Arc::clone(guest.shared));
        let number = self.number;
        Reply::new(move |answer| {
            // The thread may have ended, with all its clients.
            let _ = answers.send(Command::Answer(number, answer));
            let _ = shared.wake_event().write(1);
        })
    }

    fn refuse(&mut self, kind: &str, message: String) {
        self.send(&Response::<Acknowledged>::Error(ErrorBody {
            kind: kind.to_owned(),
            message,
        }));
    }

    fn send(&mut self, line: &impl Serialize) {
        // Serializing these types to memory can't fail.
        if serde_json::to_writer(&mut self.output, line).is_ok() {
            self.output.push(b'\n');
        }
    }

    /// Writes what the socket takes; returns whether the client is still there.
    fn flush(&mut self) -> bool {
        while !self.output.is_empty() && !self.gone {
            match self.stream.write(&self.output) {
                Ok(length) => drop(self.output.drain(..length)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.gone = true,
            }
        }
        !self.gone && self.output.len() <= MAX_BACKLOG
    }
}

/// Reads from a client, with the descriptors that it sends along.
fn receive(
    stream: &UnixStream,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream,
        &mut [io::IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok(received.bytes)
}

/// Waits for one of `set` to be ready.
fn poll(set: &[(RawFd, i16)]) -> io::Result<()> {
    let mut fds: Vec<libc::pollfd> = set
        .iter()
        .map(|&(fd, events)| libc::pollfd {
            fd,
            events,
            revents: 0,
        })
        .collect();
    loop {
        // SAFETY: the pointer and length are those of `fds`.
        if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
