//! The thread that owns the guest: waits for what happens to it or is asked of it, and boots it again.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use super::hotplug::Removal;
use super::migration::Run;
use super::{Launch, Restore};
use crate::api::{
    ApiThread, Control, ControlSender, Event, ExitReason, ExitStatus, GuestState, SharedState,
};
use crate::config::{EndAction, GuestConfig, OnReboot};
use crate::devices::panic::GuestPanic;
use crate::error::VmmError;
use crate::machine::{Distress, HostResources, Machine, Placement, Reporters};
use crate::migration::{Arrived, MigrationError, Step};
use crate::snapshot::Snapshot;
use crate::vcpu::VcpuEnd;
use crate::virtio::block::DiskEvent;

/// What the thread that owns the guest waits for.
pub(super) enum Message {
    Control(Control),
    Vcpu(VcpuEnd),
    Distress(Distress),
    /// The guest has let go of what was in a slot.
    Ejected(u8),
    /// Of the departure with this number.
    Departure(u64, Step),
    Arrived(Result<Box<Arrived>, MigrationError>),
}

/// What a boot of the guest ended with.
pub(super) enum BootEnd {
    /// Boot again.
    Again,
    /// The guest's end.
    Final(ExitStatus),
}

/// The guest, as its thread has it.
pub(super) struct Guest<'a> {
    pub(super) host: HostResources,
    pub(super) launch: &'a Launch,
    pub(super) config: GuestConfig,
    pub(super) shared: &'a SharedState,
    pub(super) reporters: Reporters,
    pub(super) inbox: Receiver<Message>,
    pub(super) messages: Sender<Message>,
    pub(super) api: &'a ApiThread,
    /// The removals of devices that somebody waits for.
    pub(super) removals: Vec<Removal>,
}

impl Guest<'_> {
    /// Boots until the guest ends.
    pub(super) fn live(&mut self) -> Result<ExitStatus, VmmError> {
        let mut run = Run::default();
        let mut machine = match &self.launch.restore {
            Some(restore) => self.restore(restore)?,
            None if self.launch.incoming => match self.receive()? {
                Ok((machine, arrived)) => {
                    run = arrived;
                    machine
                }
                Err(BootEnd::Final(exit)) => return Ok(exit),
                Err(BootEnd::Again) => self.boot(&Placement::new())?,
            },
            None => self.boot(&Placement::new())?,
        };
        loop {
            let end = self.wait(&mut machine, &mut run);
            self.abandon_departure(&mut run);
            run = Run::default();
            let (placement, leaving) = (machine.placement(), machine.leaving());
            drop(machine);
            self.discard_messages(&placement, leaving);
            match end {
                BootEnd::Final(exit) => return Ok(exit),
                BootEnd::Again => {
                    self.shared.emit(Event::Reboot);
                    self.shared.set_state(GuestState::Starting);
                    machine = self.boot(&placement)?;
                }
            }
        }
    }

    fn restore(&self, restore: &Restore) -> Result<Machine, VmmError> {
        let snapshot = Snapshot::open(&restore.directory)?;
        if restore.verify {
            snapshot.verify()?;
        }
        let track = restore.track_dirty_pages;
        let machine =
            Machine::restore(&self.host, &self.config, &snapshot, track, &self.reporters)?;
        self.attach_console(&machine);
        self.shared.booted();
        Ok(machine)
    }

    fn boot(&self, placement: &Placement) -> Result<Machine, VmmError> {
        let machine = Machine::start(&self.host, &self.config, placement, &self.reporters)?;
        self.attach_console(&machine);
        self.shared.booted();
        Ok(machine)
    }

    fn wait(&mut self, machine: &mut Machine, run: &mut Run) -> BootEnd {
        loop {
            let deadlines = [run.deadline(), self.next_deadline()];
            let message = match deadlines.into_iter().flatten().min() {
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    match self.inbox.recv_timeout(left) {
                        Err(RecvTimeoutError::Timeout) => {
                            if run.deadline().is_some_and(|at| at <= Instant::now()) {
                                self.expire(machine, run);
                            }
                            self.give_up_removals();
                            continue;
                        }
                        other => other.ok(),
                    }
                }
                None => self.inbox.recv().ok(),
            };
            // The sender is this guest's own, so the channel is never closed.
            let Some(message) = message else {
                return exit(ExitReason::Error, "the control channel closed");
            };
            let end = match message {
                Message::Control(control) => self.control(machine, run, control),
                Message::Distress(distress) => self.distressed(distress),
                Message::Vcpu(end) => self.vcpu_ended(end),
                Message::Departure(number, step) => {
                    self.departing(machine, run, number, step);
                    None
                }
                Message::Ejected(slot) => {
                    self.ejected(machine, slot);
                    None
                }
                // A guest that has come is here.
                Message::Arrived(_) => None,
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    fn control(
        &mut self,
        machine: &mut Machine,
        run: &mut Run,
        control: Control,
    ) -> Option<BootEnd> {
        match control {
            Control::PowerButton => self.press_power_button(machine),
            Control::Pause(reply) => self.pause(machine, run, reply),
            Control::Resume(reply) => self.resume(machine, run, reply),
            Control::Snapshot(request, reply) => self.snapshot(machine, run, &request, reply),
            Control::Balloon(reply) => self.balloon(machine, run.paused, reply),
            Control::ResizeBalloon(size_mib, reply) => self.resize_balloon(size_mib, reply),
            Control::ResizeConsole(size, reply) => self.resize_console(size, reply),
            Control::Migrate(limits, connection) => self.depart(machine, run, limits, connection),
            Control::ReleaseMigration(reply) => self.release(run, reply),
            Control::CancelMigration(reply) => self.cancel_departure(machine, run, reply),
            Control::Receive(connection) => {
                connection.refuse("not_incoming", "the guest is here already");
            }
            Control::Hotplug(request) => self.hotplug(machine, run, request),
            Control::Reset => return Some(BootEnd::Again),
            Control::Kill => {
                self.shared.set_state(GuestState::Stopping);
                return Some(exit(ExitReason::Killed, "the guest was killed by request"));
            }
        }
        None
    }

    fn vcpu_ended(&self, end: VcpuEnd) -> Option<BootEnd> {
        Some(match end {
            VcpuEnd::Shutdown => exit(ExitReason::Shutdown, "the guest shut down"),
            VcpuEnd::Reset => self.reset("the guest rebooted"),
            VcpuEnd::TripleFault(message) => exit(ExitReason::TripleFault, &message),
            VcpuEnd::Error(message) => exit(ExitReason::Error, &message),
            VcpuEnd::Stopped => return None,
        })
    }

    /// A reset that the guest asked for.
    fn reset(&self, message: &str) -> BootEnd {
        match self.config.on_reboot {
            OnReboot::Reboot => BootEnd::Again,
            OnReboot::Exit => exit(ExitReason::Reboot, message),
        }
    }

    /// The guest's kernel is in trouble: what the configuration says for that.
    fn distressed(&self, distress: Distress) -> Option<BootEnd> {
        let (event, action, reason, message) = match distress {
            Distress::Panic(panic) => (
                Event::GuestPanic {
                    crash_loaded: panic == GuestPanic::CrashLoaded,
                },
                self.config.panic.as_ref().map(|panic| panic.action),
                ExitReason::GuestPanic,
                "the guest's kernel panicked",
            ),
            Distress::Watchdog => (
                Event::Watchdog,
                self.config
                    .watchdog
                    .as_ref()
                    .map(|watchdog| watchdog.action),
                ExitReason::Watchdog,
                "the guest has not fed its watchdog in time",
            ),
        };
        tracing::warn!("{message}");
        self.shared.emit(event);
        // A crash kernel is at work; what it does is its own affair.
        if distress == Distress::Panic(GuestPanic::CrashLoaded) {
            return None;
        }
        match action.unwrap_or_default() {
            EndAction::None => None,
            EndAction::Reset => Some(self.reset(message)),
            EndAction::Exit => Some(exit(reason, message)),
        }
    }

    /// What the vCPUs of a machine that is gone still sent is of no interest, but for what they have let
    /// go of. With it they have let go of everything: what was asked of them is done.
    fn discard_messages(&mut self, placement: &Placement, leaving: Vec<u8>) {
        let mut gone = leaving;
        let mut kept = Vec::new();
        for message in self.inbox.try_iter() {
            match message {
                Message::Control(_) => kept.push(message),
                Message::Ejected(slot) => gone.push(slot),
                _ => {}
            }
        }
        for ((id, _), slot) in placement {
            if gone.contains(slot) {
                self.removed(*slot, id);
            }
        }
        for message in kept {
            let _ = self.messages.send(message);
        }
    }
}

pub(super) fn control_sender(messages: &Sender<Message>) -> ControlSender {
    let messages = messages.clone();
    Box::new(move |control| messages.send(Message::Control(control)).is_ok())
}

pub(super) fn reporters(messages: &Sender<Message>, shared: &Arc<SharedState>) -> Reporters {
    let (distressed, ejected, ended) = (messages.clone(), messages.clone(), messages.clone());
    let shared = Arc::clone(shared);
    // Sending fails only while the process ends.
    Reporters {
        distress: Arc::new(move |distress| {
            let _ = distressed.send(Message::Distress(distress));
        }),
        ejected: Arc::new(move |slot| {
            let _ = ejected.send(Message::Ejected(slot));
        }),
        end: Arc::new(move |end| {
            let _ = ended.send(Message::Vcpu(end));
        }),
        disk: Arc::new(move |event| {
            shared.emit(match event {
                DiskEvent::Disconnected(id) => Event::DiskDisconnected { id },
                DiskEvent::Reconnected(id) => Event::DiskReconnected { id },
            });
        }),
    }
}

pub(super) fn exit(reason: ExitReason, message: &str) -> BootEnd {
    BootEnd::Final(ExitStatus {
        reason,
        message: message.to_owned(),
    })
}
