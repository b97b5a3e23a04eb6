//! The guest leaves for another process, or comes from one.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use super::life::{BootEnd, Guest, Message, exit};
use super::requests::acknowledge;
use crate::api::{Connection, Control, ExitReason, ExitStatus, GuestState, Reply};
use crate::cpuid;
use crate::error::VmmError;
use crate::machine::Machine;
use crate::memory;
use crate::migration::{
    Answer, Arrival, Arrived, Departure, Hello, Load, MigrationError, MigrationLimits,
    MigrationPhase, Step,
};
use crate::vcpu::VcpuEnd;

/// How long a guest may be stopped before it goes on here, in seconds: what is wrong with the other side
/// or the way there isn't found out then.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// What a machine that runs is in the middle of.
#[derive(Default)]
pub(super) struct Run {
    /// Vcpus and devices stand still.
    pub(super) paused: bool,
    /// It is leaving.
    departure: Option<Ongoing>,
    /// It came from elsewhere, where somebody watches whether this process lives.
    answer: Option<Answer>,
    departures: u64,
}

struct Ongoing {
    number: u64,
    /// Canceled when it is dropped.
    _departure: Departure,
    /// When the guest goes on here, unless it has been released.
    deadline: Option<Instant>,
    phase: MigrationPhase,
}

impl Run {
    /// One that came from elsewhere, and waits to be told to go on.
    pub(super) fn arrived(answer: Answer) -> Self {
        Self {
            paused: true,
            answer: Some(answer),
            ..Self::default()
        }
    }

    /// It was told to go on: whoever watched from where it came has no more to see.
    pub(super) fn go_on(&mut self) {
        self.paused = false;
        self.answer = None;
    }

    /// When something has to happen.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.departure.as_ref().and_then(|ongoing| ongoing.deadline)
    }

    /// Why the guest can't be paused, resumed or saved now.
    pub(super) fn refusal(&self) -> Option<&'static str> {
        self.departure
            .as_ref()
            .map(|_| "the guest is being migrated")
    }

    fn phase(&self) -> MigrationPhase {
        self.departure
            .as_ref()
            .map_or(MigrationPhase::None, |ongoing| ongoing.phase)
    }
}

impl Guest<'_> {
    /// Begins to send the guest.
    pub(super) fn depart(
        &self,
        machine: &mut Machine,
        run: &mut Run,
        limits: MigrationLimits,
        connection: Connection,
    ) {
        if run.departure.is_some() {
            return connection.refuse("migrating", "the guest is being migrated already");
        }
        if run.paused {
            return connection.refuse("paused", "the guest is paused: let it go on first");
        }
        let prepared = self.hello().and_then(|hello| Ok((hello, machine.track()?)));
        let (hello, memory) = match prepared {
            Ok(prepared) => prepared,
            Err(e) => return connection.refuse("migration_failed", e.to_string()),
        };
        let progress = self.shared.progress();
        progress.begin(self.config.memory.size_mib << 20);
        run.departures += 1;
        let number = run.departures;
        let messages = self.messages.clone();
        let load = Load {
            hello,
            memory,
            limits,
            progress: Arc::clone(progress),
        };
        let report = move |step| {
            // Fails only while the process ends.
            let _ = messages.send(Message::Departure(number, step));
        };
        let started = connection
            .accept()
            .and_then(|stream| Departure::start(stream, load, report, self.launch.seccomp));
        match started {
            Ok(departure) => {
                tracing::info!("the guest is being migrated");
                run.departure = Some(Ongoing {
                    number,
                    _departure: departure,
                    deadline: None,
                    phase: MigrationPhase::Copying,
                });
            }
            Err(e) => {
                machine.untrack();
                progress.fail(e.to_string());
            }
        }
    }

    fn hello(&self) -> Result<Hello, MigrationError> {
        let cpuid = cpuid::template(&self.host.kvm, self.config.cpu.template)
            .map_err(|e| MigrationError::Build(e.to_string()))?;
        Ok(Hello {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            config: serde_json::to_string(&self.config)
                .map_err(|e| MigrationError::Build(e.to_string()))?,
            cpuid: cpuid.as_slice().to_vec(),
        })
    }

    /// What the thread that sends the guest wants.
    pub(super) fn departing(&self, machine: &Machine, run: &mut Run, number: u64, step: Step) {
        let Some(ongoing) = run.departure.as_mut().filter(|o| o.number == number) else {
            return;
        };
        match step {
            Step::Stop(answer) => self.stop(machine, run, &answer),
            Step::Loaded => {
                ongoing.phase = MigrationPhase::Loaded;
                self.shared.progress().enter(MigrationPhase::Loaded);
            }
            // Where the guest runs is not for this process to say any more.
            Step::Failed(_) if ongoing.phase == MigrationPhase::Released => {}
            Step::Failed(e) => self.stay(machine, run, &e),
        }
    }

    fn stop(
        &self,
        machine: &Machine,
        run: &mut Run,
        answer: &SyncSender<Result<Vec<u8>, MigrationError>>,
    ) {
        self.shared.progress().stop();
        let saved = machine
            .pause()
            .map_err(MigrationError::from)
            .and_then(|()| {
                run.paused = true;
                if self.has_ended() {
                    return Err(MigrationError::Guest(
                        "the guest has ended or was reset".into(),
                    ));
                }
                Ok(machine.image()?)
            });
        if let Some(ongoing) = &mut run.departure {
            ongoing.phase = MigrationPhase::Switching;
            ongoing.deadline = Some(Instant::now() + STOP_LIMIT);
        }
        if run.paused {
            self.shared.set_state(GuestState::Paused);
        }
        // If it is gone, its last word says so.
        let _ = answer.send(saved);
    }

    /// Whether a vCPU said its last word before the guest was stopped.
    fn has_ended(&self) -> bool {
        let waiting: Vec<Message> = self.inbox.try_iter().collect();
        let mut ended = false;
        for message in waiting {
            ended |= matches!(&message, Message::Vcpu(end) if *end != VcpuEnd::Stopped);
            // The receiver is this thread's own.
            let _ = self.messages.send(message);
        }
        ended
    }

    /// The migration failed: the guest goes on here.
    pub(super) fn stay(&self, machine: &Machine, run: &mut Run, reason: &MigrationError) {
        let Some(ongoing) = run.departure.take() else {
            return;
        };
        // Joins the thread, which still reads memory.
        drop(ongoing);
        tracing::warn!("the guest stays here: {reason}");
        machine.untrack();
        if run.paused {
            machine.resume();
            run.paused = false;
            self.shared.set_state(GuestState::Running);
        }
        self.shared.progress().fail(reason.to_string());
    }

    /// The guest was stopped for too long.
    pub(super) fn expire(&self, machine: &Machine, run: &mut Run) {
        self.stay(machine, run, &MigrationError::Stopped(STOP_LIMIT.as_secs()));
    }

    /// The guest is gone, and its migration with it.
    pub(super) fn abandon_departure(&self, run: &mut Run) {
        if run.departure.take().is_some() {
            let reason = MigrationError::Guest("the guest has ended or was reset".into());
            self.shared.progress().fail(reason.to_string());
        }
    }

    pub(super) fn cancel_departure(&self, machine: &Machine, run: &mut Run, reply: Reply) {
        match run.phase() {
            MigrationPhase::None | MigrationPhase::Failed => {
                reply.refuse("not_migrating", "the guest is not being migrated");
            }
            MigrationPhase::Released => {
                reply.refuse("released", "it is too late: the guest has been released");
            }
            MigrationPhase::Copying | MigrationPhase::Switching | MigrationPhase::Loaded => {
                self.stay(machine, run, &MigrationError::Canceled);
                acknowledge(reply);
            }
        }
    }

    pub(super) fn release(&self, run: &mut Run, reply: Reply) {
        match &mut run.departure {
            Some(ongoing) if ongoing.phase == MigrationPhase::Loaded => {
                ongoing.phase = MigrationPhase::Released;
                ongoing.deadline = None;
                self.shared.progress().enter(MigrationPhase::Released);
                acknowledge(reply);
            }
            _ => reply.refuse("not_loaded", "the other side doesn't have the guest"),
        }
    }

    /// Takes a released guest back; returns whether it was one.
    pub(super) fn take_back(&self, machine: &Machine, run: &mut Run) -> bool {
        if run.phase() != MigrationPhase::Released {
            return false;
        }
        self.stay(
            machine,
            run,
            &MigrationError::Guest("the guest was taken back".into()),
        );
        true
    }

    /// Waits for a guest of another process, and builds its machine. `Err` inside: the process is to end.
    pub(super) fn receive(&self) -> Result<Result<(Machine, Run), BootEnd>, VmmError> {
        self.shared.set_state(GuestState::Incoming);
        let mut arrival = None;
        loop {
            // The sender is this guest's own, so the channel is never closed.
            let Ok(message) = self.inbox.recv() else {
                return Ok(Err(exit(ExitReason::Error, "the control channel closed")));
            };
            match message {
                Message::Control(Control::Receive(connection)) if arrival.is_some() => {
                    connection.refuse("migrating", "a guest is coming already");
                }
                Message::Control(Control::Receive(connection)) => {
                    arrival = Some(self.begin_arrival(connection)?);
                }
                Message::Arrived(arrived) => {
                    if let Some(arrival) = arrival {
                        arrival.finish();
                    }
                    return self.settle(*arrived?).map(Ok);
                }
                Message::Control(Control::Kill) => {
                    return Ok(Err(BootEnd::Final(ExitStatus {
                        reason: ExitReason::Killed,
                        message: "the process was told to end before its guest had come".to_owned(),
                    })));
                }
                Message::Control(control) => {
                    control.refuse("incoming", "the guest hasn't come yet");
                }
                Message::Vcpu(_)
                | Message::Distress(_)
                | Message::Ejected(_)
                | Message::Departure(..) => {}
            }
        }
    }

    fn begin_arrival(&self, connection: Connection) -> Result<Arrival, VmmError> {
        // Before the answer: whoever asks hears of it if there is too little memory.
        let memory = match memory::allocate(&self.config.memory, self.config.shares_memory()) {
            Ok(memory) => memory,
            Err(e) => {
                connection.refuse("out_of_memory", e.to_string());
                return Err(e.into());
            }
        };
        let messages = self.messages.clone();
        let report = move |arrived: Result<Arrived, MigrationError>| {
            // Fails only while the process ends.
            let _ = messages.send(Message::Arrived(arrived.map(Box::new)));
        };
        let stream = connection
            .accept()
            .map_err(MigrationError::os("take the connection"))?;
        let (kvm, config) = (Arc::clone(&self.host.kvm), self.config.clone());
        Arrival::start(stream, kvm, config, memory, report, self.launch.seccomp)
            .map_err(|e| MigrationError::os("start a thread")(e).into())
    }

    fn settle(&self, arrived: Arrived) -> Result<(Machine, Run), VmmError> {
        let (memory, image, mut answer) = arrived.into_parts();
        let machine = Machine::arrive(&self.host, &self.config, memory, &image, &self.reporters);
        let machine = match machine {
            Ok(machine) => machine,
            Err(e) => {
                answer.failed(&e.to_string());
                return Err(e);
            }
        };
        self.attach_console(&machine);
        self.shared.set_state(GuestState::Arrived);
        answer.loaded()?;
        Ok((machine, Run::arrived(answer)))
    }
}
