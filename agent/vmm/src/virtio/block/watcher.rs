//! The thread that notices when a disk's backend goes away, and finds the next one.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::link::DiskLink;
use crate::isolation::seccomp::{self, Mode, Thread};

const STACK_BYTES: usize = 128 << 10;
/// How often a lost backend is looked for, in milliseconds.
const RESUME_INTERVAL_MS: i32 = 100;
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
    stop: Arc<AtomicBool>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

struct Watched {
    link: Arc<DiskLink>,
    resuming: bool,
}

impl DiskWatcher {
    /// Watches `links` and tells `report`.
    pub fn start(
        links: Vec<Arc<DiskLink>>,
        report: impl Fn(DiskEvent) + Send + 'static,
        seccomp: Mode,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        for link in &links {
            link.set_watcher(wake.try_clone()?);
        }
        let (stopped, woken) = (Arc::clone(&stop), wake.try_clone()?);
        let thread = std::thread::Builder::new()
            .name("disks".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Err(e) = seccomp::apply(Thread::Disks, seccomp) {
                    tracing::error!("{e}");
                    return;
                }
                let mut disks: Vec<Watched> = links
                    .into_iter()
                    .map(|link| Watched {
                        link,
                        resuming: false,
                    })
                    .collect();
                while !stopped.load(Ordering::Acquire) {
                    if let Err(e) = turn(&mut disks, &woken, &report) {
                        tracing::error!("the disks can't be watched: {e}");
                        return;
                    }
                }
            })?;
        Ok(Self {
            stop,
            wake,
            thread: Some(thread),
        })
    }
}

impl Drop for DiskWatcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Fails only with the event's counter at its maximum, when the thread is awake anyway.
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches the disks panicked");
        }
    }
}

/// Waits for something to happen, and does what it asks for.
fn turn(disks: &mut [Watched], wake: &EventFd, report: &dyn Fn(DiskEvent)) -> io::Result<()> {
    let mut timeout = -1;
    if disks.iter().any(|disk| disk.link.enforce_limit()) {
        timeout = LIMIT_INTERVAL_MS;
    }
    if disks.iter().any(|disk| disk.resuming) {
        timeout = RESUME_INTERVAL_MS;
    }
    // A negative descriptor is one that poll ignores. A backend has nothing to say unasked, so
    // only the end of a connection is of interest, which needs no request.
    let mut fds = vec![libc::pollfd {
        fd: wake.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }];
    fds.extend(disks.iter().map(|disk| libc::pollfd {
        fd: disk.link.monitor().unwrap_or(-1),
        events: libc::POLLRDHUP,
        revents: 0,
    }));
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
    for (disk, fd) in disks.iter_mut().zip(&fds[1..]) {
        let id = || disk.link.id().to_owned();
        if fd.revents & (libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR) != 0 {
            tracing::warn!(disk = disk.link.id(), "the disk's backend went away");
            report(DiskEvent::Disconnected(id()));
            disk.resuming = disk.link.lost();
        }
        if disk.resuming && disk.link.resume() {
            disk.resuming = false;
            tracing::info!(disk = disk.link.id(), "the disk has a backend again");
            report(DiskEvent::Reconnected(id()));
        }
    }
    Ok(())
}
