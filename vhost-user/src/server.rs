//! Listening for frontends and serving them, one after the other.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::Mode;
use rustix::process::umask;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::Error;
use crate::backend::BlockBackend;
use crate::device::BlockDevice;
use crate::disk::Disk;
use crate::metrics::{QueueCounters, QueueMetrics};

/// Ends a server from another thread.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<StopState>);

#[derive(Debug)]
struct StopState {
    event: OwnedFd,
    connection: Mutex<Option<UnixStream>>,
}

impl Stopper {
    /// A stopper that hasn't been used.
    pub fn new() -> Result<Self, Error> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("can't create an eventfd", error))?;
        Ok(Self(Arc::new(StopState {
            event,
            connection: Mutex::new(None),
        })))
    }

    /// Makes the server finish what is in flight and return. May be called again.
    pub fn stop(&self) {
        // The counter can't be full: nothing else writes to it.
        let _ = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes());
        // Wakes the server out of a message that the frontend never finishes.
        if let Some(connection) = self.connection().as_ref() {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }

    fn connection(&self) -> std::sync::MutexGuard<'_, Option<UnixStream>> {
        let lock = self.0.connection.lock();
        lock.unwrap_or_else(PoisonError::into_inner)
    }
}

/// How to serve a disk.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where to listen.
    pub socket: PathBuf,
    /// Virtqueues, 1 to 64.
    pub queues: u16,
    /// Most descriptors in a queue, a power of two.
    pub queue_size: u16,
}

/// A bound socket with a disk behind it.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    options: ServerOptions,
    disk: Arc<Disk>,
    metrics: Vec<Arc<QueueMetrics>>,
    stopper: Stopper,
}

impl Server {
    /// Binds the socket, readable and writable for this user only. A socket that was left
    /// behind is replaced, one that somebody listens on isn't.
    ///
    /// Changes the process's umask for the time of the call.
    pub fn bind(options: ServerOptions, disk: Arc<Disk>, stopper: Stopper) -> Result<Self, Error> {
        let listener = bind(&options.socket)?;
        let metrics = (0..options.queues).map(|_| Arc::default()).collect();
        Ok(Self {
            listener,
            options,
            disk,
            metrics,
            stopper,
        })
    }

    /// The counters of each queue, since the start.
    pub fn metrics(&self) -> Vec<QueueCounters> {
        self.metrics.iter().map(|queue| queue.counters()).collect()
    }

    /// Serves frontends until stopped, then makes everything durable.
    pub fn run(&self) -> Result<(), Error> {
        while wait_readable(&self.listener, &self.stopper)? {
            let accepted = self.listener.accept();
            let connection = match accepted {
                Ok((connection, _)) => connection,
                Err(error) if is_passing(&error) => continue,
                Err(error) => return Err(Error::io("can't accept a frontend", error)),
            };
            tracing::info!("a frontend connected");
            self.serve(connection)?;
            for (queue, counters) in self.metrics().iter().enumerate() {
                let counters = serde_json::to_string(counters).unwrap_or_default();
                tracing::info!(queue, %counters, "counters since the start");
            }
        }
        if self.disk.image.read_only() {
            return Ok(());
        }
        let synced = self.disk.image.sync();
        synced.map_err(|error| Error::io("can't make the image durable at the end", error))
    }

    // Ends with the frontend, however it ends; only the server's own failures are errors.
    fn serve(&self, connection: UnixStream) -> Result<(), Error> {
        let disk = Arc::clone(&self.disk);
        let device = BlockDevice::new(disk, self.options.queue_size, &self.metrics);
        let backend = BlockBackend::new(device);
        let backend = Arc::new(Mutex::new(backend));
        let clone = connection.try_clone();
        let clone = clone.map_err(|error| Error::io("can't duplicate a connection", error))?;
        *self.stopper.connection() = Some(clone);
        let mut handler = BackendReqHandler::from_stream(connection, Arc::clone(&backend));
        let outcome = loop {
            match wait_readable(&handler, &self.stopper) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
            match handler.handle_request() {
                Ok(()) => {}
                Err(VhostError::Disconnected) => {
                    tracing::info!("the frontend disconnected");
                    break Ok(());
                }
                Err(error) => {
                    tracing::error!(%error, "ending the connection with the frontend");
                    break Ok(());
                }
            }
        };
        *self.stopper.connection() = None;
        backend
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .stop();
        outcome
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.options.socket);
    }
}

// True when there is something to read, false when the server has to stop.
fn wait_readable(source: &impl AsReadable, stopper: &Stopper) -> Result<bool, Error> {
    loop {
        let mut sources = [
            PollFd::from_borrowed_fd(source.readable(), PollFlags::IN),
            PollFd::new(&stopper.0.event, PollFlags::IN),
        ];
        match poll(&mut sources, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(Error::io("can't wait for frontends", error)),
        }
        if !sources[1].revents().is_empty() {
            return Ok(false);
        }
        if !sources[0].revents().is_empty() {
            return Ok(true);
        }
    }
}

trait AsReadable {
    fn readable(&self) -> std::os::fd::BorrowedFd<'_>;
}

impl AsReadable for UnixListener {
    fn readable(&self) -> std::os::fd::BorrowedFd<'_> {
        self.as_fd()
    }
}

impl AsReadable for BackendReqHandler<Mutex<BlockBackend>> {
    fn readable(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the handler owns its socket and keeps it open while it is borrowed.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

// Errors of a connection that was gone before it was accepted, or of a moment's shortage.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNABORTED | libc::EINTR | libc::EAGAIN)
    )
}

fn bind(path: &Path) -> Result<UnixListener, Error> {
    let refuse = |reason: String| Error::BindSocket {
        path: path.into(),
        reason,
    };
    match bind_private(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket =
                fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
            if !is_socket {
                return Err(refuse("something that is no socket is in its place".into()));
            }
            match UnixStream::connect(path) {
                Ok(_) => Err(refuse(
                    "another process listens there; stop it first".into(),
                )),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(|error| {
                        refuse(format!("a stale socket can't be removed: {error}"))
                    })?;
                    bind_private(path).map_err(|error| refuse(error.to_string()))
                }
                Err(error) => Err(refuse(format!("it can't be examined: {error}"))),
            }
        }
        result => result.map_err(|error| refuse(error.to_string())),
    }
}

// The mode comes from the umask: a chmod afterwards would leave a moment for others.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let before = umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}
