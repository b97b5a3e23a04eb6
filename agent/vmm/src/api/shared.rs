//! What the API thread shows of the guest, and what it asks of it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use vmm_sys_util::eventfd::EventFd;

use super::{
    Connection, ErrorBody, Event, ExitStatus, GuestState, RemovalRequest, SnapshotRequest, Status,
};
use crate::config::{DiskConfig, InterfaceConfig};
use crate::migration::{MigrationLimits, ProgressCell};
use crate::virtio::console::ConsoleSize;

/// Events that wait for the API thread; the oldest go first if it is that far behind.
const MAX_EVENTS: usize = 1024;

/// A request that the thread which owns the guest must do.
#[derive(Debug)]
pub(crate) enum Control {
    /// Press the power button.
    PowerButton,
    /// Reset the guest.
    Reset,
    /// End the guest.
    Kill,
    /// Pause it.
    Pause(Reply),
    /// Let it go on.
    Resume(Reply),
    /// Take a snapshot.
    Snapshot(SnapshotRequest, Reply),
    /// What is known of the balloon.
    Balloon(Reply),
    /// Change what the balloon is to have, in MiB.
    ResizeBalloon(u64, Reply),
    /// The console's terminal has another size.
    ResizeConsole(ConsoleSize, Reply),
    /// Send the guest to another process.
    Migrate(MigrationLimits, Connection),
    /// Take a guest from another process.
    Receive(Connection),
    /// Don't let a guest go on that the other side has.
    ReleaseMigration(Reply),
    /// Keep it.
    CancelMigration(Reply),
    /// Something about disks and interfaces that come and go.
    Hotplug(Hotplug),
}

impl Control {
    /// Answers one that waits for an answer.
    pub(crate) fn refuse(self, kind: &str, message: &str) {
        match self {
            Self::PowerButton | Self::Reset | Self::Kill => {}
            Self::Pause(reply)
            | Self::Resume(reply)
            | Self::Snapshot(_, reply)
            | Self::Balloon(reply)
            | Self::ResizeBalloon(_, reply)
            | Self::ResizeConsole(_, reply)
            | Self::ReleaseMigration(reply)
            | Self::CancelMigration(reply) => reply.refuse(kind, message),
            Self::Hotplug(request) => request.refuse(kind, message),
            Self::Migrate(_, connection) | Self::Receive(connection) => {
                connection.refuse(kind, message);
            }
        }
    }
}

/// A request about disks and interfaces.
#[derive(Debug)]
pub(crate) enum Hotplug {
    /// Add a disk.
    AddDisk(Box<DiskConfig>, Reply),
    /// Add an interface, on the TAP that came with the request.
    AddInterface(Box<InterfaceConfig>, Option<OwnedFd>, Reply),
    /// Remove one.
    Remove(RemovalRequest, Reply),
    /// Which there are.
    Devices(Reply),
}

impl Hotplug {
    /// Whether it is to change anything.
    pub(crate) const fn changes(&self) -> bool {
        !matches!(self, Self::Devices(_))
    }

    /// Answers it.
    pub(crate) fn refuse(self, kind: &str, message: &str) {
        match self {
            Self::AddDisk(_, reply)
            | Self::AddInterface(_, _, reply)
            | Self::Remove(_, reply)
            | Self::Devices(reply) => reply.refuse(kind, message),
        }
    }
}

/// Where the answer of a request goes that takes a while. Dropped, it says that the guest has ended.
pub(crate) struct Reply(Option<Box<dyn FnOnce(Answer) + Send>>);

/// What a request is answered with.
pub(crate) type Answer = Result<serde_json::Value, ErrorBody>;

impl Reply {
    pub(crate) fn new(send: impl FnOnce(Answer) + Send + 'static) -> Self {
        Self(Some(Box::new(send)))
    }

    pub(crate) fn send(mut self, answer: Answer) {
        if let Some(send) = self.0.take() {
            send(answer);
        }
    }

    pub(crate) fn refuse(self, kind: &str, message: impl Into<String>) {
        self.send(Err(ErrorBody {
            kind: kind.to_owned(),
            message: message.into(),
        }));
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(send) = self.0.take() {
            send(Err(ErrorBody {
                kind: "not_running".to_owned(),
                message: "the guest has ended".to_owned(),
            }));
        }
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reply")
    }
}

/// Where requests go; returns whether they were taken.
pub(crate) type ControlSender = Box<dyn Fn(Control) -> bool + Send>;

/// The guest's state as the API shows it.
#[derive(Debug)]
pub(crate) struct SharedState {
    inner: Mutex<Inner>,
    progress: Arc<ProgressCell>,
    wake: EventFd,
}

#[derive(Debug)]
struct Inner {
    status: Status,
    events: Vec<Event>,
}

impl SharedState {
    /// A guest that is starting. `wake` is written when there are events to take.
    pub(crate) fn new(name: String, vcpus: u8, memory_mib: u64, wake: EventFd) -> Self {
        let status = Status {
            name,
            state: GuestState::Starting,
            process_id: std::process::id(),
            vcpus,
            memory_mib,
            boots: 0,
            started_at_unix_ms: unix_ms(),
            exit: None,
        };
        Self {
            inner: Mutex::new(Inner {
                status,
                events: Vec::new(),
            }),
            progress: Arc::default(),
            wake,
        }
    }

    pub(crate) fn status(&self) -> Status {
        self.lock().status.clone()
    }

    /// The latest migration's progress.
    pub(crate) const fn progress(&self) -> &Arc<ProgressCell> {
        &self.progress
    }

    /// The guest goes on; one that came from elsewhere counts as booted.
    pub(crate) fn resumed(&self) {
        let mut inner = self.lock();
        inner.status.boots = inner.status.boots.max(1);
        drop(inner);
        self.set_state(GuestState::Running);
    }

    /// Counts a boot.
    pub(crate) fn booted(&self) {
        self.lock().status.boots += 1;
        self.set_state(GuestState::Running);
    }

    pub(crate) fn set_state(&self, state: GuestState) {
        let mut inner = self.lock();
        if inner.status.state == state {
            return;
        }
        inner.status.state = state;
        drop(inner);
        self.emit(Event::State {
            state,
            unix_ms: unix_ms(),
        });
    }

    /// The guest ended.
    pub(crate) fn finish(&self, state: GuestState, exit: ExitStatus) {
        let event = Event::Exit {
            reason: exit.reason,
            message: exit.message.clone(),
        };
        self.lock().status.exit = Some(exit);
        self.set_state(state);
        self.emit(event);
    }

    pub(crate) fn emit(&self, event: Event) {
        let mut inner = self.lock();
        if inner.events.len() >= MAX_EVENTS {
            inner.events.remove(0);
        }
        inner.events.push(event);
        drop(inner);
        let _ = self.wake.write(1);
    }

    /// The event that says that there are events to take.
    pub(crate) const fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    pub(crate) fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.lock().events)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
