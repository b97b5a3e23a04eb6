//! Everything there is, and what happens next.

use std::collections::BTreeMap;
use std::fmt;

use keelson_checker::History;
use keelson_member::PeerMessage;
use keelson_member::replica::{Answer, Input, RequestId};

use crate::admin::Admin;
use crate::client::Client;
use crate::holder::Holder;
use crate::machine::Machine;
use crate::network::{Network, Piece};
use crate::random::Random;
use crate::rebuild::RebuildPiece;
use crate::server::{Arrival, Reply};
use crate::settings::Settings;
use crate::trace::Trace;
use crate::watcher::Watcher;

/// The cluster's id.
pub const CLUSTER: u64 = 0xc1;

/// Machines, clients, the network between them, and time.
pub struct World {
    /// Microseconds since the run began.
    pub(crate) now: u64,
    /// By time, then by order of planning.
    events: BTreeMap<(u64, u64), Happening>,
    planned: u64,
    pub(crate) random: Random,
    pub(crate) settings: Settings,
    pub(crate) trace: Trace,
    pub(crate) machines: Vec<Machine>,
    pub(crate) network: Network,
    pub(crate) clients: Vec<Client>,
    pub(crate) holders: Vec<Holder>,
    pub(crate) watchers: Vec<Watcher>,
    pub(crate) admin: Admin,
    pub(crate) history: History,
    pub(crate) next_client: u64,
    /// How far clocks have jumped ahead, in microseconds, all together.
    pub(crate) jumped: u64,
    /// Faults are over.
    pub(crate) healed: bool,
    pub(crate) healed_at: u64,
    /// After that, a put has succeeded.
    pub(crate) probed: bool,
    /// The checker's limits did not suffice.
    pub(crate) undecided: bool,
    /// What is not as it must be.
    pub(crate) failure: Option<String>,
    pub(crate) counts: Counts,
}

/// What a run went through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Processes that were killed or lost power.
    pub crashes: u64,
    /// Snapshots that were taken over.
    pub snapshots: u64,
    /// Changes of membership that were made.
    pub changes: u64,
    /// Other faults.
    pub faults: u64,
    /// Bits that were flipped.
    pub flips: u64,
    /// Members that were damaged, and rebuilt from the others.
    pub rebuilds: u64,
}

/// Who waits for a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// A client, with its request's number.
    Client(usize, u64),
    /// A holder of leases, with its request's number.
    Holder(usize, u64),
    /// Who changes the membership.
    Admin(u64),
    /// A member that asks on for its client: machine, boot and request there.
    Member(usize, u64, RequestId),
    /// A member that is rebuilt: machine, boot and attempt.
    Rebuilt(usize, u64, u64),
    /// Nobody.
    Nobody,
}

/// What happens at a time.
#[derive(Debug)]
pub(crate) enum Happening {
    /// A process handles what waits. Machine, boot.
    Run(usize, u64),
    Tick(usize, u64),
    /// A process says who it is.
    Introduce(usize, u64),
    Input(usize, u64, Box<Input>),
    Answer(usize, u64, RequestId, Box<Answer>),
    Job(usize, u64),
    Start(usize),
    Message(usize, Box<Arriving>),
    Piece(Box<Piece>),
    /// A damaged member asks one of the others. Machine, boot, and the attempt that failed.
    AskToRebuild(usize, u64, u64),
    /// One that was asked sends everything: machine and boot, to machine and boot, for an attempt.
    SendRebuild((usize, u64), (usize, u64), u64),
    RebuildPiece(Box<RebuildPiece>),
    Request(usize, Caller, Box<Arrival>),
    Reply(Caller, Box<Reply>),
    /// A client has waited long enough for this request.
    GiveUp(Caller),
    Client(usize),
    Holder(usize),
    Watcher(usize),
    /// A watcher's stream, by its number, is read.
    Read(usize, u64),
    Admin,
    Fault,
    Heal,
    EndOf(Passing),
}

/// A message on its way, with where it came from.
#[derive(Debug)]
pub(crate) struct Arriving {
    pub(crate) from: usize,
    pub(crate) from_member: u64,
    pub(crate) message: PeerMessage,
}

/// What ends by itself.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Passing {
    Cut(u64),
    FullDisk(usize),
}

impl World {
    pub(crate) fn new(seed: u64, settings: Settings, mut random: Random, print: bool) -> Self {
        let mut world = Self {
            now: 0,
            events: BTreeMap::new(),
            planned: 0,
            network: Network::new(random.fork()),
            random,
            trace: Trace::new(print),
            machines: Vec::new(),
            clients: Vec::new(),
            holders: Vec::new(),
            watchers: Vec::new(),
            admin: Admin::default(),
            history: History::default(),
            next_client: 0,
            jumped: 0,
            healed: false,
            healed_at: 0,
            probed: false,
            undecided: false,
            failure: None,
            counts: Counts::default(),
            settings,
        };
        let settings = world.settings.clone();
        world.note(format_args!("seed {seed}: {settings:?}"));
        world.found(settings.members);
        for _ in 0..settings.clients {
            world.add_client();
        }
        for _ in 0..settings.lease_holders {
            world.add_holder();
        }
        for number in 0..settings.watchers {
            world.add_watcher(number);
        }
        if settings.changes_members {
            world.plan(2_000_000, Happening::Admin);
        }
        if !settings.faults.is_empty() {
            world.plan(1_500_000, Happening::Fault);
        }
        world.plan(settings.duration, Happening::Heal);
        world
    }

    /// Something is to happen after some microseconds.
    pub(crate) fn plan(&mut self, delay: u64, happening: Happening) {
        self.planned += 1;
        self.events
            .insert((self.now + delay, self.planned), happening);
    }

    /// Notes what happens.
    pub(crate) fn note(&mut self, event: fmt::Arguments<'_>) {
        self.trace.note(self.now, event);
    }

    /// Something is not as it must be: the run ends.
    pub(crate) fn fail(&mut self, what: String) {
        self.note(format_args!("FAILED: {what}"));
        self.failure.get_or_insert(what);
    }

    /// Lets time go on until everything is healed and quiet, or something is wrong.
    pub(crate) fn run(&mut self) {
        while self.failure.is_none() {
            let Some(((at, _), happening)) = self.events.pop_first() else {
                return;
            };
            self.now = at;
            self.happen(happening);
            if self.healed && self.is_over() {
                return;
            }
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Run(machine, boot) => self.run_process(machine, boot),
            Happening::Tick(machine, boot) => self.tick(machine, boot),
            Happening::Introduce(machine, boot) => self.introduce(machine, boot),
            Happening::Input(machine, boot, input) => self.input(machine, boot, *input),
            Happening::Answer(machine, boot, request, answer) => {
                self.answered(machine, boot, request, *answer);
            }
            Happening::Job(machine, boot) => self.run_job(machine, boot),
            Happening::Start(machine) => self.start(machine),
            Happening::Message(machine, arriving) => self.arrive(machine, *arriving),
            Happening::Piece(piece) => self.piece(*piece),
            Happening::AskToRebuild(machine, boot, attempt) => {
                self.ask_to_rebuild(machine, boot, attempt);
            }
            Happening::SendRebuild(from, to, attempt) => self.send_rebuild(from, to, attempt),
            Happening::RebuildPiece(piece) => self.rebuild_piece(*piece),
            Happening::Request(machine, caller, arrival) => self.serve(machine, caller, *arrival),
            Happening::Reply(caller, reply) => self.reply(caller, *reply),
            Happening::GiveUp(caller) => self.reply(caller, Reply::GaveUp),
            Happening::Client(client) => self.step_client(client),
            Happening::Holder(holder) => self.step_holder(holder),
            Happening::Watcher(watcher) => self.step_watcher(watcher),
            Happening::Read(watcher, stream) => self.read_stream(watcher, stream),
            Happening::Admin => self.step_admin(),
            Happening::Fault => self.cause_fault(),
            Happening::Heal => self.heal(),
            Happening::EndOf(passing) => self.end(passing),
        }
    }

    fn reply(&mut self, caller: Caller, reply: Reply) {
        match caller {
            Caller::Client(client, number) => self.client_heard(client, number, reply),
            Caller::Holder(holder, number) => self.holder_heard(holder, number, reply),
            Caller::Admin(number) => self.admin_heard(number, reply),
            Caller::Member(machine, boot, request) => {
                self.forwarded_heard(machine, boot, request, reply);
            }
            Caller::Rebuilt(machine, boot, attempt) => {
                self.rebuild_heard(machine, boot, attempt, &reply);
            }
            Caller::Nobody => {}
        }
    }
}
