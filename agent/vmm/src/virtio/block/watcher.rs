//! The thread that notices when a disk's backend goes away, and finds the next one.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::link::{DiskLink, Resumed};
use crate::isolation::seccomp::{self, Mode, Thread};

const STACK_BYTES: usize = 128 << 10;
/// How often a lost backend is looked for, in milliseconds.
const RESUME_INTERVAL_MS: i32 = 20;
/// How often a call is checked for taking too long, in milliseconds.
const LIMIT_INTERVAL_MS: i32 = 1000;

/// What happened to a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskEvent {
    /// Its backend went away.
    Disconnected(String),
    /// Another backend took over, with all requests that were under way.
    Reconnected(String),
}

/// A running thread. Dropping stops and joins it.
pub struct DiskWatcher {
    commands: Sender<Command>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is told.
enum Command {
    Watch(Arc<DiskLink>),
    /// The disk with this id is removed.
    Forget(String),
    Stop,
}

struct Watched {
    link: Arc<DiskLink>,
    resuming: bool,
}

impl Watched {
    const fn new(link: Arc<DiskLink>) -> Self {
        Self {
            link,
            resuming: false,
        }
    }
}

impl DiskWatcher {
    /// Watches `links` and tells `report`.
    pub fn start(
        links: Vec<Arc<DiskLink>>,
        report: impl Fn(DiskEvent) + Send + 'static,
        seccomp: Mode,
    ) -> io::Result<Self> {
        let (commands, orders) = channel();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        for link in &links {
            link.set_watcher(wake.try_clone()?);
        }
        let woken = wake.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("disks".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Err(e) = seccomp::apply(Thread::Disks, seccomp) {
                    tracing::error!("{e}");
                    return;
                }
                let mut disks: Vec<Watched> = links.into_iter().map(Watched::new).collect();
                while obey(&orders, &mut disks) {
                    if let Err(e) = turn(&mut disks, &woken, &report) {
                        tracing::error!("the disks can't be watched: {e}");
                        return;
                    }
                }
            })?;
        Ok(Self {
            commands,
            wake,
            thread: Some(thread),
        })
    }

    /// Watches a further disk.
    pub fn watch(&self, link: Arc<DiskLink>) -> io::Result<()> {
        link.set_watcher(self.wake.try_clone()?);
        self.tell(Command::Watch(link));
        Ok(())
    }

    /// Watches the disk with this id no more, whose backend may go away now.
    pub fn forget(&self, id: &str) {
        self.tell(Command::Forget(id.to_owned()));
    }

    fn tell(&self, command: Command) {
        // Fails only when the thread has ended, and said why.
        let _ = self.commands.send(command);
        // Fails only with the event's counter at its maximum, when the thread is awake anyway.
        let _ = self.wake.write(1);
    }
}

impl Drop for DiskWatcher {
    fn drop(&mut self) {
        self.tell(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches the disks panicked");
        }
    }
}

/// Takes the commands that are there; returns whether to go on.
fn obey(commands: &Receiver<Command>, disks: &mut Vec<Watched>) -> bool {
    loop {
        match commands.try_recv() {
            Ok(Command::Watch(link)) => disks.push(Watched::new(link)),
            Ok(Command::Forget(id)) => disks.retain(|disk| disk.link.id() != id),
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
            Err(TryRecvError::Empty) => return true,
        }
    }
}

/// Waits for something to happen, and does what it asks for.
fn turn(disks: &mut [Watched], wake: &EventFd, report: &dyn Fn(DiskEvent)) -> io::Result<()> {
    for disk in &mut *disks {
        disk.resuming |= disk.link.take_awaited();
    }
    let mut timeout = -1;
    if disks.iter().any(|disk| disk.link.enforce_limit()) {
        timeout = LIMIT_INTERVAL_MS;
    }
    if disks.iter().any(|disk| disk.resuming) {
        timeout = RESUME_INTERVAL_MS;
    }
    // Held while their descriptors are polled, so that no other file gets their numbers. A negative
    // descriptor is one that poll ignores. On the socket of the messages a backend has nothing to
    // say unasked, so only its end is of interest; notices have a socket of their own.
    let connections: Vec<_> = disks.iter().map(|disk| disk.link.connection()).collect();
    let mut fds = vec![libc::pollfd {
        fd: wake.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }];
    for connection in &connections {
        let connection = connection.as_deref();
        let notices = connection.and_then(|connection| connection.notices.as_ref());
        fds.push(libc::pollfd {
            fd: connection.map_or(-1, |connection| connection.socket.as_raw_fd()),
            events: libc::POLLRDHUP,
            revents: 0,
        });
        fds.push(libc::pollfd {
            fd: notices.map_or(-1, AsRawFd::as_raw_fd),
            events: libc::POLLIN,
            revents: 0,
        });
    }
    // SAFETY: the pointer and length are those of `fds`.
    if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) } < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted {
            Ok(())
        } else {
            Err(error)
        };
    }
    // Says EAGAIN if it was not this one.
    let _ = wake.read();
    let (pairs, _) = fds[1..].as_chunks::<2>();
    for ((disk, connection), [socket, notices]) in disks.iter_mut().zip(&connections).zip(pairs) {
        let id = || disk.link.id().to_owned();
        if let Some(connection) = connection {
            if notices.revents & libc::POLLIN != 0 && disk.link.take_notices(connection) {
                tracing::info!(disk = disk.link.id(), "the disk has another size");
            }
            let ended = libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR;
            if socket.revents & ended != 0
                && let Some(resuming) = disk.link.lost(connection)
            {
                tracing::warn!(disk = disk.link.id(), "the disk's backend went away");
                report(DiskEvent::Disconnected(id()));
                disk.resuming = resuming;
            }
        }
        if disk.resuming {
            let resumed = disk.link.resume();
            disk.resuming = resumed == Resumed::NotYet;
            if resumed == Resumed::Yes {
                tracing::info!(disk = disk.link.id(), "the disk has a backend again");
                report(DiskEvent::Reconnected(id()));
            }
        }
    }
    Ok(())
}
