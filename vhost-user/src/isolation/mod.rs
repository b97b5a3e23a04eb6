//! What keeps a guest that has taken over a worker from the rest of the host: each thread has a list
//! of the system calls that it needs ([`system_calls`]), and files by Landlock ([`files`]).
//!
//! Whoever serves guests ([`Role::Worker`], [`Role::Layer`], [`Role::Disk`]) opens no file at all, and
//! works on descriptors that others have opened. What opens files later on, for the control socket,
//! reaches what was named when the process started.
//!
//! A thread inherits the restrictions of the one that starts it. So all threads are started by one
//! thread of their own, and a worker need not be able to start any.

mod files;
mod system_calls;

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};

use keelson_isolation::RestrictError;
pub use keelson_isolation::{AllowedPaths, Mode};

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Serves virtqueues, on a ring that it has already.
    Worker,
    /// Does for a layer of a disk what the ring can't, on open files.
    Layer,
    /// Talks to a disk's frontend.
    Disk,
    /// Gets parts of images from servers.
    Fetch,
    /// Opens disks, and serves the control socket.
    Control,
    /// Waits for signals.
    Signals,
    /// Starts all others.
    Starter,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Layer => "layer",
            Self::Disk => "disk",
            Self::Fetch => "fetch",
            Self::Control => "control",
            Self::Signals => "signals",
            Self::Starter => "starter",
        }
    }

    const fn opens_files(self) -> bool {
        matches!(self, Self::Fetch | Self::Control | Self::Starter)
    }
}

/// Why a thread can't be restricted.
#[derive(Debug, thiserror::Error)]
#[error("the thread {thread}: {source}; see --sandbox")]
pub struct IsolationError {
    /// What the thread is for.
    thread: &'static str,
    /// What is wrong.
    source: RestrictError,
}

impl From<IsolationError> for io::Error {
    fn from(error: IsolationError) -> Self {
        Self::other(error)
    }
}

type Start = Box<dyn FnOnce() + Send>;

// The whole process's, as the restrictions are.
#[derive(Debug)]
struct Process {
    mode: Mode,
    paths: AllowedPaths,
    starter: Mutex<Sender<Start>>,
}

static PROCESS: OnceLock<Process> = OnceLock::new();

/// Isolates the process: from now on threads get their restrictions when they [`enter`] their role.
/// Called once, by a program; without it nothing is restricted.
///
/// # Errors
/// If the kernel has no seccomp, or no thread can be started.
pub fn start(mode: Mode, paths: AllowedPaths) -> io::Result<()> {
    if mode == Mode::Off {
        return Ok(());
    }
    let (sender, orders) = channel::<Start>();
    let process = Process {
        mode,
        paths,
        starter: Mutex::new(sender),
    };
    if PROCESS.set(process).is_err() {
        return Err(io::Error::other("the process is isolated already"));
    }
    let (ready, started) = channel();
    Builder::new()
        .name("starter".into())
        .stack_size(128 << 10)
        .spawn(move || {
            let entered = enter(Role::Starter);
            let failed = entered.is_err();
            let _ = ready.send(entered);
            if !failed {
                for start in orders {
                    start();
                }
            }
        })?;
    let entered = started.recv().map_err(io::Error::other)?;
    if mode == Mode::Enforce && !entered? {
        tracing::warn!(
            "the kernel has no Landlock, or it is not enabled (lsm=): a guest that took over a worker is kept \
             from files by its list of system calls alone"
        );
    }
    Ok(())
}

/// Restricts the calling thread for good to what its role needs. True if that includes its files.
///
/// # Errors
/// The thread must not go on then.
pub fn enter(role: Role) -> Result<bool, IsolationError> {
    let Some(process) = PROCESS.get() else {
        return Ok(false);
    };
    let failed = |source| IsolationError {
        thread: role.name(),
        source,
    };
    let files = match process.mode {
        Mode::Enforce => files::restrict(role, &process.paths).map_err(failed)?,
        Mode::Log | Mode::Off => false,
    };
    system_calls::restrict(role, process.mode).map_err(failed)?;
    Ok(files)
}

/// The same for a thread that others wait for, so that the process ends if it fails: the next one
/// may have more luck.
pub fn enter_or_end(role: Role) {
    if let Err(error) = enter(role) {
        tracing::error!(%error, "ending the process");
        std::process::exit(1);
    }
}

/// Whether what opens files for the control socket is kept from most of them.
pub fn restricts_files() -> bool {
    let mode = PROCESS.get().map(|process| process.mode);
    mode == Some(Mode::Enforce)
}

/// Starts a thread, which has to [`enter`] its role when it has what the role can't get.
///
/// # Errors
/// If no thread can be started.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    stack_bytes: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = Builder::new().name(name.into()).stack_size(stack_bytes);
    let Some(process) = PROCESS.get() else {
        return builder.spawn(body);
    };
    let (reply, outcome) = channel();
    let start: Start = Box::new(move || {
        // Whoever asked waits for it.
        let _ = reply.send(builder.spawn(body));
    });
    let starter = process.starter.lock();
    let starter = starter.unwrap_or_else(PoisonError::into_inner);
    let ended = || io::Error::other("the thread that starts all others has ended");
    starter.send(start).map_err(|_| ended())?;
    drop(starter);
    outcome.recv().unwrap_or_else(|_| Err(ended()))
}
