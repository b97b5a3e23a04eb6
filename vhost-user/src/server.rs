//! One disk on one socket: serving frontends, one after the other.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::Error;
use crate::backend::BlockBackend;
use crate::device::VirtioBlock;
use crate::disk::Disk;
use crate::isolation::{self, Role};
use crate::latency::Latencies;
use crate::listener::listen_at;
use crate::metrics::{OPERATIONS, QueueCounters, QueueMetrics};
use crate::protocol_extension::{self, NoticeChannel, Outcome};
use crate::worker::WorkerPool;

/// Bytes of the stack of a thread that only handles messages.
const STACK_BYTES: usize = 256 << 10;

/// How long requests in flight may take to finish before a pause is given up.
const PAUSE_PATIENCE: Duration = Duration::from_mins(1);

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

/// A disk that is being served, by a thread for its messages and the pool's workers for its
/// requests. Any number of them live in one process. Dropping it stops it.
#[derive(Debug)]
pub struct DiskServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

/// Somebody who wants no request in flight for a while.
#[derive(Debug)]
struct Pause {
    paused: mpsc::Sender<()>,
    /// Ends when the queues may go on.
    over: mpsc::Receiver<()>,
}

impl Pause {
    fn hold(self) {
        // Fails if whoever asked has given up.
        if self.paused.send(()).is_ok() {
            let _ = self.over.recv();
        }
    }
}

#[derive(Debug)]
struct Shared {
    options: ServerOptions,
    disk: Arc<Disk>,
    workers: Arc<WorkerPool>,
    metrics: Vec<Arc<QueueMetrics>>,
    event: OwnedFd,
    stopping: AtomicBool,
    resized: AtomicBool,
    pause: Mutex<Option<Pause>>,
    connection: Mutex<Option<UnixStream>>,
}

impl DiskServer {
    /// Binds the socket and starts to serve. `ended` is called when serving has come to an end,
    /// by [`stop`](Self::stop) or by a failure.
    pub fn start(
        options: ServerOptions,
        disk: Arc<Disk>,
        workers: Arc<WorkerPool>,
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<Self, Error> {
        let listener = listen_at(&options.socket)?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("can't create an eventfd", error))?;
        let shared = Arc::new(Shared {
            metrics: (0..options.queues).map(|_| Arc::default()).collect(),
            options,
            disk,
            workers,
            event,
            stopping: AtomicBool::new(false),
            resized: AtomicBool::new(false),
            pause: Mutex::new(None),
            connection: Mutex::new(None),
        });
        let of_thread = Arc::clone(&shared);
        let serve = move || {
            let entered = isolation::enter(Role::Disk)
                .map_err(|error| Error::io("can't isolate a disk's thread", error));
            let outcome = entered.and_then(|_| of_thread.run(&listener));
            drop(listener);
            ended();
            outcome
        };
        let thread = isolation::spawn("disk", STACK_BYTES, serve)
            .map_err(|error| Error::io("can't start a disk's thread", error))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.shared.options.socket
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.shared.disk
    }

    /// The counters of each queue, since the start.
    pub fn metrics(&self) -> Vec<QueueCounters> {
        self.shared.counters()
    }

    /// How long the requests of all queues took, in the order of
    /// [`OPERATIONS`](crate::metrics::OPERATIONS).
    pub fn latencies(&self) -> [Latencies; OPERATIONS.len()] {
        let queues = self.shared.metrics.iter();
        let queues: Vec<_> = queues.map(|queue| queue.latencies()).collect();
        std::array::from_fn(|operation| {
            let of_queues = queues.iter().filter_map(|queue| queue.get(operation));
            of_queues.copied().sum()
        })
    }

    /// Measures the disk again and tells the guest if its size has changed. Returns whether it
    /// has.
    pub fn resize(&self) -> Result<bool, Error> {
        let changed = self.shared.disk.remeasure();
        let changed = changed.map_err(|error| Error::io("can't measure the disk", error))?;
        if changed {
            self.shared.resized.store(true, Ordering::Release);
            self.shared.wake();
        }
        Ok(changed)
    }

    /// Does something while no request of the disk is in flight: its queues finish what they have,
    /// and take up new requests afterwards.
    pub fn while_paused<T>(&self, act: impl FnOnce() -> T) -> Result<T, Error> {
        let (sender, paused) = mpsc::channel();
        // The queues go on when it is dropped.
        let (_hold, over) = mpsc::channel();
        *lock(&self.shared.pause) = Some(Pause {
            paused: sender,
            over,
        });
        self.shared.wake();
        let late = |_| {
            Error::io(
                "can't pause the disk",
                io::Error::other("it doesn't answer"),
            )
        };
        paused.recv_timeout(PAUSE_PATIENCE).map_err(late)?;
        Ok(act())
    }

    /// Begins to stop: finishes what is in flight, disconnects, makes everything durable.
    pub fn begin_stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.wake();
        // Wakes the thread out of a message that the frontend never finishes.
        if let Some(connection) = self.shared.connection().as_ref() {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Stops, and returns how serving has ended.
    pub fn stop(mut self) -> Result<(), Error> {
        self.begin_stop();
        self.join()
    }

    fn join(&mut self) -> Result<(), Error> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let outcome = thread.join().unwrap_or_else(|_| {
            let panicked = io::Error::other("it panicked");
            Err(Error::io("a disk's thread failed", panicked))
        });
        // Not by the thread, which may touch no files.
        let _ = fs::remove_file(self.socket());
        outcome
    }
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.begin_stop();
            if let Err(error) = self.join() {
                tracing::error!(%error, "a disk has ended with an error");
            }
        }
    }
}

/// What the thread was woken by.
enum Event {
    Readable,
    Stop,
    Resized,
    Pause(Pause),
}

impl Shared {
    fn wake(&self) {
        // Fails only if the counter is full, and then the thread is being woken already.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    fn connection(&self) -> MutexGuard<'_, Option<UnixStream>> {
        let lock = self.connection.lock();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    fn counters(&self) -> Vec<QueueCounters> {
        self.metrics.iter().map(|queue| queue.counters()).collect()
    }

    // Serves frontends until stopped, then makes everything durable.
    fn run(&self, listener: &UnixListener) -> Result<(), Error> {
        loop {
            match self.wait(listener)? {
                Event::Stop => break,
                // The next frontend reads the size as it is.
                Event::Resized => continue,
                Event::Pause(pause) => {
                    pause.hold();
                    continue;
                }
                Event::Readable => {}
            }
            let connection = match listener.accept() {
                Ok((connection, _)) => connection,
                Err(error) if is_passing(&error) => continue,
                Err(error) => return Err(Error::io("can't accept a frontend", error)),
            };
            let socket = self.options.socket.display();
            tracing::info!(%socket, "a frontend connected");
            self.serve(&connection)?;
            for (queue, counters) in self.counters().iter().enumerate() {
                let counters = serde_json::to_string(counters).unwrap_or_default();
                tracing::info!(%socket, queue, %counters, "counters since the start");
            }
        }
        if self.disk.properties().read_only {
            return Ok(());
        }
        let synced = self.disk.device().sync();
        synced.map_err(|error| Error::io("can't make the image durable at the end", error))
    }

    // Ends with the frontend, however it ends; only the server's own failures are errors.
    fn serve(&self, connection: &UnixStream) -> Result<(), Error> {
        let (disk, workers) = (Arc::clone(&self.disk), Arc::clone(&self.workers));
        let device = VirtioBlock::new(disk, workers, self.options.queue_size, &self.metrics);
        let backend = Arc::new(Mutex::new(BlockBackend::new(device)));
        let clone = || {
            let clone = connection.try_clone();
            clone.map_err(|error| Error::io("can't duplicate a connection", error))
        };
        *self.connection() = Some(clone()?);
        let mut handler = BackendReqHandler::from_stream(clone()?, Arc::clone(&backend));
        let outcome = self.handle_messages(connection, &backend, &mut handler);
        *self.connection() = None;
        lock(&backend).stop();
        outcome
    }

    fn handle_messages(
        &self,
        connection: &UnixStream,
        backend: &Mutex<BlockBackend>,
        handler: &mut BackendReqHandler<Mutex<BlockBackend>>,
    ) -> Result<(), Error> {
        let mut notices: Option<NoticeChannel> = None;
        loop {
            match self.wait(connection)? {
                Event::Stop => return Ok(()),
                Event::Resized => {
                    let told = notices.as_ref().map(NoticeChannel::config_changed);
                    tracing::info!(?told, "the disk has another size");
                    continue;
                }
                Event::Pause(pause) => {
                    if let Err(error) = lock(backend).while_paused(|| pause.hold()) {
                        tracing::error!(%error, "the disk's queues can't go on");
                        return Ok(());
                    }
                    continue;
                }
                Event::Readable => {}
            }
            // Not in the match, which would hold the lock while the crate takes it.
            let extension = protocol_extension::handle(connection, &mut lock(backend));
            let result = match extension {
                Ok(Outcome::Notices(channel)) => {
                    notices = Some(channel);
                    Ok(())
                }
                Ok(Outcome::Answered) => Ok(()),
                Ok(Outcome::NotMine) => handler.handle_request(),
                Err(error) => Err(VhostError::SocketBroken(error)),
            };
            match result {
                Ok(()) => {}
                Err(VhostError::Disconnected) => {
                    tracing::info!("the frontend disconnected");
                    return Ok(());
                }
                Err(error) => {
                    tracing::error!(%error, "ending the connection with the frontend");
                    return Ok(());
                }
            }
        }
    }

    fn wait(&self, source: &impl AsFd) -> Result<Event, Error> {
        loop {
            let mut sources = [
                PollFd::new(source, PollFlags::IN),
                PollFd::new(&self.event, PollFlags::IN),
            ];
            match poll(&mut sources, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io("can't wait for frontends", error)),
            }
            if self.stopping.load(Ordering::Acquire) {
                return Ok(Event::Stop);
            }
            if !sources[1].revents().is_empty() {
                let _ = rustix::io::read(&self.event, &mut [0; 8]);
            }
            if let Some(pause) = lock(&self.pause).take() {
                return Ok(Event::Pause(pause));
            }
            if self.resized.swap(false, Ordering::AcqRel) {
                return Ok(Event::Resized);
            }
            if !sources[0].revents().is_empty() {
                return Ok(Event::Readable);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// Errors of a connection that was gone before it was accepted, or of a moment's shortage.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNABORTED | libc::EINTR | libc::EAGAIN)
    )
}
