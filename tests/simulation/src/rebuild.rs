//! A damaged member is rebuilt from the others: what `keelson-state` does in `open` and
//! `peers/rebuild`, with the network between.

use std::sync::Arc;

use keelson_member::command::Rebuild;
use keelson_member::disk::Disk;
use keelson_member::keyspace::SnapshotWriter;
use keelson_member::replica::Input;
use keelson_member::{Identity, MemberError, RequestError, rebuild};

use crate::disk::{Loss, SimulatedDisk};
use crate::server::{Arrival, Call, Reply};
use crate::settings::{MILLISECOND, SECOND};
use crate::world::{CLUSTER, Caller, Happening, World};

/// How long it waits before it asks the next one.
const RETRY: u64 = 500 * MILLISECOND;
/// How long it waits for an answer, and for each piece.
const PATIENCE: u64 = 10 * SECOND;

/// A machine whose member is being rebuilt.
pub(crate) struct Rebuilding {
    identity: Identity,
    /// The attempt.
    number: u64,
    /// Whom it asked.
    from: usize,
    writer: Option<SnapshotWriter>,
}

/// What is on its way to a member that is rebuilt.
#[derive(Debug)]
pub(crate) struct RebuildPiece {
    /// Machine and boot.
    from: (usize, u64),
    to: (usize, u64),
    /// The attempt.
    number: u64,
    /// The rest, last piece first.
    chunks: Vec<Vec<u8>>,
}

impl World {
    /// Bits of one member's files are flipped, if the others can make up for it: of the one that is
    /// damaged already, if one is.
    pub(crate) fn flip_bits(&mut self, number: usize) {
        let mut machines = 0..self.machines.len();
        let damaged = machines.find(|number| self.is_damaged(*number));
        let number = damaged.unwrap_or(number);
        if !self.can_lose(number) {
            return;
        }
        let kind = self.random.below(10);
        let wanted = |name: &str| match kind {
            0..4 => name.starts_with("log-"),
            4..7 => name.starts_with("keyspace"),
            7 => name == "vote",
            8 => name.starts_with("identity"),
            _ => true,
        };
        let recent = self.random.percent(60);
        for _ in 0..self.random.between(1, 3) {
            if let Some((name, at)) = self.machines[number].disk.flip_bit(&wanted, recent) {
                self.counts.flips += 1;
                self.note(format_args!("m{number}: a bit of {name} flips, at {at}"));
            }
        }
        // Most are only found by the next start, and many come with a power failure.
        match self.random.below(10) {
            0..3 if self.machines[number].is_up() => self.crash(number, Loss::Nothing),
            3..7 => self.blackout(),
            _ => {}
        }
    }

    /// Whether enough whole copies are left if this machine's is damaged: no other is, and the other
    /// voters are a quorum, also if one more leaves them meanwhile.
    fn can_lose(&self, number: usize) -> bool {
        let Some(members) = self.newest_members() else {
            return false;
        };
        let voters = members.iter().filter(|member| !member.is_learner).count();
        let enough = if self.settings.changes_members { 4 } else { 3 };
        let is_listed = members
            .iter()
            .any(|member| member.id == self.machines[number].member);
        let others = (0..self.machines.len()).filter(|other| *other != number);
        is_listed && voters >= enough && others.into_iter().all(|other| !self.is_damaged(other))
    }

    /// Whether something of what a machine stores is not as it was written, or lost.
    pub(crate) fn is_damaged(&self, number: usize) -> bool {
        let machine = &self.machines[number];
        machine.member != 0
            && (machine.disk.has_flipped_bits() || machine.rebuilding.is_some() || machine.damaged)
    }

    /// Why what a machine stores is of no use is noted: it has to be rebuilt.
    pub(crate) fn begin_rebuild(&mut self, number: usize, identity: Identity, reason: &str) {
        self.note(format_args!(
            "m{number} is rebuilt from the others: {reason}"
        ));
        let machine = &mut self.machines[number];
        machine.damaged = true;
        if let Err(error) = rebuild::prepare(&machine.disk) {
            self.process_failed(number, &error);
            return;
        }
        machine.rebuilding = Some(Rebuilding {
            identity,
            number: 0,
            from: number,
            writer: None,
        });
        let boot = machine.boot;
        let elapsed = machine.disk.take_elapsed();
        self.plan(elapsed, Happening::AskToRebuild(number, boot, 0));
    }

    /// Asks one of the others, unless an attempt has come to something since.
    pub(crate) fn ask_to_rebuild(&mut self, number: usize, boot: u64, attempt: u64) {
        let others: Vec<usize> = (0..self.machines.len())
            .filter(|other| *other != number && self.machines[*other].member != 0)
            .collect();
        let machine = &mut self.machines[number];
        let Some(rebuilding) = machine.rebuilding.as_mut().filter(|_| machine.boot == boot) else {
            return;
        };
        if rebuilding.number != attempt {
            return;
        }
        rebuilding.number = self.random.number();
        let attempt = rebuilding.number;
        let abandoned = rebuilding.writer.take().map(SnapshotWriter::discard);
        if let Some(Err(error)) = abandoned {
            self.process_failed(number, &error);
            return;
        }
        let Some(rebuilding) = &mut self.machines[number].rebuilding else {
            return;
        };
        if others.is_empty() {
            self.plan(RETRY, Happening::AskToRebuild(number, boot, attempt));
            return;
        }
        let from = *self.random.pick(&others);
        rebuilding.from = from;
        let request = Rebuild {
            member_id: self.machines[number].member,
            number: attempt,
        };
        let caller = Caller::Rebuilt(number, boot, attempt);
        let arrival = Arrival {
            call: Call::Rebuild(request),
            from: Some(number),
        };
        let delay = self.network.latency();
        self.plan(delay, Happening::Request(from, caller, Box::new(arrival)));
        self.plan(PATIENCE, Happening::AskToRebuild(number, boot, attempt));
    }

    /// The one that was asked can't help, or says that the member was removed.
    pub(crate) fn rebuild_heard(&mut self, number: usize, boot: u64, attempt: u64, reply: &Reply) {
        let machine = &self.machines[number];
        let rebuilding = machine.rebuilding.as_ref().filter(|_| machine.boot == boot);
        if rebuilding.is_none_or(|rebuilding| rebuilding.number != attempt) {
            return;
        }
        if matches!(reply, Reply::Rebuild(Err(RequestError::MemberNotFound))) {
            self.process_failed(number, &MemberError::Removed);
            return;
        }
        self.plan(RETRY, Happening::AskToRebuild(number, boot, attempt));
    }

    /// The entry is committed: everything is flushed, and sent.
    pub(crate) fn send_rebuild(&mut self, from: (usize, u64), to: (usize, u64), attempt: u64) {
        let disk = self.machines[from.0].disk.clone();
        let Some(process) = self.process(from.0, from.1) else {
            return;
        };
        let keyspace = Arc::clone(process.replica.keyspace());
        let Some(flush) = keyspace.begin_flush() else {
            // The flush that is under way began before what is wanted.
            let again = Happening::SendRebuild(from, to, attempt);
            self.plan(5 * MILLISECOND, again);
            return;
        };
        disk.take_elapsed();
        let flushed = keyspace.flush(flush);
        let elapsed = disk.take_elapsed();
        match flushed {
            Ok(Some(metadata)) => {
                let flushed = Input::Flushed(Box::new(metadata));
                let told = Happening::Input(from.0, from.1, Box::new(flushed));
                self.plan(elapsed, told);
            }
            Ok(None) => {
                self.plan(MILLISECOND, Happening::SendRebuild(from, to, attempt));
                return;
            }
            Err(error) => {
                self.process_failed(from.0, &error);
                return;
            }
        }
        let Some(mut chunks) = self.read_snapshot(from.0) else {
            return;
        };
        chunks.reverse();
        let piece = RebuildPiece {
            from,
            to,
            number: attempt,
            chunks,
        };
        let delay = elapsed + self.network.latency();
        self.plan(delay, Happening::RebuildPiece(Box::new(piece)));
    }

    /// The next piece arrives. If none does, the next one is asked some time.
    pub(crate) fn rebuild_piece(&mut self, mut piece: RebuildPiece) {
        let ((from, from_boot), (to, boot)) = (piece.from, piece.to);
        let connected = self.network.reaches(from, to) && self.process(from, from_boot).is_some();
        let machine = &mut self.machines[to];
        let disk: Arc<dyn Disk> = Arc::new(machine.disk.clone());
        let Some(rebuilding) = machine.rebuilding.as_mut().filter(|_| machine.boot == boot) else {
            return;
        };
        if rebuilding.number != piece.number {
            return;
        }
        if !connected {
            self.plan(RETRY, Happening::AskToRebuild(to, boot, piece.number));
            return;
        }
        if let Err(error) = take_piece(rebuilding, &disk, &mut piece) {
            self.rebuild_failed(to, piece.number, &error);
            return;
        }
        if !piece.chunks.is_empty() {
            let delay = self.network.latency();
            self.plan(delay, Happening::RebuildPiece(Box::new(piece)));
            return;
        }
        if let Err(error) = finish(rebuilding, &disk, self.settings.limits) {
            self.rebuild_failed(to, piece.number, &error);
            return;
        }
        self.note(format_args!("m{to} is whole again"));
        self.counts.rebuilds += 1;
        let machine = &mut self.machines[to];
        machine.rebuilding = None;
        machine.damaged = false;
        let elapsed = machine.disk.take_elapsed();
        self.plan(elapsed, Happening::Start(to));
    }

    /// An attempt came to nothing. The next one follows, unless the power was lost.
    fn rebuild_failed(&mut self, number: usize, attempt: u64, error: &MemberError) {
        self.note(format_args!("m{number} is not rebuilt: {error}"));
        let stopped = self.machines[number].disk.is_stopped();
        if stopped || matches!(error, MemberError::Removed) {
            self.process_failed(number, error);
            return;
        }
        let boot = self.machines[number].boot;
        self.plan(RETRY, Happening::AskToRebuild(number, boot, attempt));
    }

    /// Nothing says any more which member a folder holds: an operator empties it, and the member is
    /// found out by its URL.
    pub(crate) fn empty_folder(&mut self, number: usize) -> Result<Identity, MemberError> {
        self.note(format_args!("the folder of m{number} is emptied"));
        let disk = SimulatedDisk::new(self.random.fork());
        disk.set_lie(self.settings.lie());
        let identity = Identity::new(CLUSTER, self.machines[number].member);
        self.machines[number].disk = disk.clone();
        // The marker first: without it, the identity is that of a member with data.
        rebuild::begin(&disk, "its data is lost")?;
        identity.store(&disk)?;
        Ok(identity)
    }
}

fn take_piece(
    rebuilding: &mut Rebuilding,
    disk: &Arc<dyn Disk>,
    piece: &mut RebuildPiece,
) -> Result<(), MemberError> {
    if rebuilding.writer.is_none() {
        rebuilding.writer = Some(SnapshotWriter::new(Arc::clone(disk), piece.number)?);
    }
    match (&mut rebuilding.writer, piece.chunks.pop()) {
        (Some(writer), Some(chunk)) => writer.push(&chunk),
        _ => Ok(()),
    }
}

fn finish(
    rebuilding: &mut Rebuilding,
    disk: &Arc<dyn Disk>,
    limits: keelson_member::Limits,
) -> Result<(), MemberError> {
    let Some(writer) = rebuilding.writer.take() else {
        return Ok(());
    };
    let staged = writer.finish()?;
    rebuild::finish(
        disk,
        &rebuilding.identity,
        staged,
        rebuilding.number,
        limits,
    )
}
