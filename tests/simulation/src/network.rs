//! Messages between members, and the streams of snapshots beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use keelson_member::disk::Disk;
use keelson_member::keyspace::SnapshotWriter;
use keelson_member::replica::Input;
use keelson_member::{MemberError, PeerMessage, is_proposal, is_snapshot};

use crate::random::Random;
use crate::settings::{MILLISECOND, SECOND};
use crate::world::{Arriving, Happening, World};

/// Who reaches whom.
pub(crate) struct Network {
    pub(crate) random: Random,
    /// Directions that are cut, by the number of the fault that cut them.
    cuts: BTreeMap<u64, BTreeSet<(usize, usize)>>,
    next_cut: u64,
    next_snapshot: u64,
}

/// The next piece of a snapshot arrives.
#[derive(Debug)]
pub(crate) struct Piece {
    number: u64,
    from: (usize, u64),
    to: (usize, u64),
    offer: PeerMessage,
    writer: Option<SnapshotWriter>,
    /// The rest, last piece first.
    chunks: Vec<Vec<u8>>,
}

impl Network {
    pub(crate) fn new(random: Random) -> Self {
        Self {
            random,
            cuts: BTreeMap::new(),
            next_cut: 0,
            next_snapshot: 0,
        }
    }

    /// Whether what `from` sends reaches `to`.
    pub(crate) fn reaches(&self, from: usize, to: usize) -> bool {
        !self.cuts.values().any(|cut| cut.contains(&(from, to)))
    }

    /// Cuts directions; the number ends it.
    pub(crate) fn cut(&mut self, directions: BTreeSet<(usize, usize)>) -> u64 {
        self.next_cut += 1;
        self.cuts.insert(self.next_cut, directions);
        self.next_cut
    }

    pub(crate) fn end_cut(&mut self, number: u64) {
        self.cuts.remove(&number);
    }

    pub(crate) fn heal(&mut self) {
        self.cuts.clear();
    }

    /// Microseconds that a message takes.
    pub(crate) fn latency(&mut self) -> u64 {
        self.random.between(100, 2000)
    }
}

impl World {
    /// Where a member is, as this one knows it.
    pub(crate) fn machine_of(&self, number: usize, member: u64) -> Option<usize> {
        let process = self.machines[number].process.as_ref()?;
        let members = process.replica.keyspace().metadata().members;
        let Some(known) = members.iter().find(|known| known.id == member) else {
            return process.heard.get(&member).copied();
        };
        let url = known.peer_urls.first()?;
        self.machines.iter().position(|machine| machine.url == *url)
    }

    /// Sends a message that a member emitted, after an offset.
    pub(crate) fn send(&mut self, from: usize, offset: u64, message: PeerMessage) {
        let boot = self.machines[from].boot;
        let to = self.machine_of(from, message.to);
        if is_snapshot(&message) {
            self.send_snapshot(from, to, offset, message);
            return;
        }
        let Some(to) = to else {
            self.input(from, boot, Input::Unreachable(message.to));
            return;
        };
        let calm = self.healed;
        let settings = &self.settings;
        let (lost, repeated, delayed) = (settings.lost, settings.repeated, settings.delayed);
        // A connection is a stream: what is proposed over it never comes twice. Everything else may,
        // for consensus repeats itself.
        let repeated = if is_proposal(&message) { 0 } else { repeated };
        let random = &mut self.network.random;
        let mut copies = 1;
        if !calm && random.percent(lost) {
            copies = 0;
        } else if !calm && random.percent(repeated) {
            copies = 2;
        }
        for _ in 0..copies {
            let random = &mut self.network.random;
            let mut delay = offset + random.between(100, 2000);
            if !calm && random.percent(delayed) {
                delay += random.between(1, 300) * MILLISECOND;
            }
            let arriving = Arriving {
                from,
                from_member: self.machines[from].member,
                message: message.clone(),
            };
            self.plan(delay, Happening::Message(to, Box::new(arriving)));
        }
    }

    pub(crate) fn arrive(&mut self, to: usize, arriving: Arriving) {
        let Arriving {
            from,
            from_member,
            message,
        } = arriving;
        let (from_boot, boot) = (self.machines[from].boot, self.machines[to].boot);
        if !self.network.reaches(from, to) || self.machines[to].process.is_none() {
            self.input(from, from_boot, Input::Unreachable(message.to));
            return;
        }
        self.note(format_args!(
            "m{from} → m{to} {:?} term {} index {} log term {} commit {} entries {} reject {}",
            message.msg_type(),
            message.term,
            message.index,
            message.log_term,
            message.commit,
            message.entries.len(),
            message.reject,
        ));
        let Some(process) = self.process(to, boot) else {
            return;
        };
        let removed = process.replica.keyspace().metadata().removed_members;
        if removed.contains(&from_member) {
            if self.machines[from].member == from_member {
                let failed = Input::Failed(MemberError::Removed);
                self.input(from, from_boot, failed);
            }
            return;
        }
        process.heard.insert(from_member, from);
        self.input(to, boot, Input::Message(message));
    }

    fn send_snapshot(&mut self, from: usize, to: Option<usize>, offset: u64, offer: PeerMessage) {
        let member = offer.to;
        let boot = self.machines[from].boot;
        let chunks = self.read_snapshot(from);
        let (Some(to), Some(mut chunks)) = (to, chunks) else {
            self.input(from, boot, Input::SnapshotSent(member, false));
            return;
        };
        self.note(format_args!("m{from} sends a snapshot to m{to}"));
        chunks.reverse();
        self.network.next_snapshot += 1;
        let piece = Piece {
            number: self.network.next_snapshot,
            from: (from, boot),
            to: (to, self.machines[to].boot),
            offer,
            writer: None,
            chunks,
        };
        let delay = offset + self.network.latency();
        self.plan(delay, Happening::Piece(Box::new(piece)));
    }

    pub(crate) fn read_snapshot(&mut self, from: usize) -> Option<Vec<Vec<u8>>> {
        let process = self.machines[from].process.as_ref()?;
        let mut reader = process.replica.keyspace().snapshot().ok()?;
        let mut chunks = Vec::new();
        while let Some(chunk) = reader.next_chunk().ok()? {
            chunks.push(chunk);
        }
        Some(chunks)
    }

    /// The next piece of a snapshot arrives, or the stream ends.
    pub(crate) fn piece(&mut self, mut piece: Piece) {
        let ((from, from_boot), (to, to_boot)) = (piece.from, piece.to);
        let number = piece.number;
        let member = piece.offer.to;
        let connected = self.network.reaches(from, to)
            && self.network.reaches(to, from)
            && self.process(from, from_boot).is_some();
        let disk: Arc<dyn Disk> = Arc::new(self.machines[to].disk.clone());
        let Some(process) = self.process(to, to_boot) else {
            self.input(from, from_boot, Input::SnapshotSent(member, false));
            return;
        };
        if piece.writer.is_none() {
            if process.receiving.is_some() {
                self.input(from, from_boot, Input::SnapshotSent(member, false));
                return;
            }
            process.receiving = Some(number);
            match SnapshotWriter::new(disk, number) {
                Ok(writer) => piece.writer = Some(writer),
                Err(error) => return self.receiving_failed(&piece, &error),
            }
        }
        if !connected {
            process.receiving = None;
            if let Some(Err(error)) = piece.writer.take().map(SnapshotWriter::discard) {
                return self.receiving_failed(&piece, &error);
            }
            self.input(from, from_boot, Input::SnapshotSent(member, false));
            return;
        }
        let Some(writer) = &mut piece.writer else {
            return;
        };
        if let Some(chunk) = piece.chunks.pop() {
            if let Err(error) = writer.push(&chunk) {
                return self.receiving_failed(&piece, &error);
            }
            let mut delay = self.network.latency();
            if !self.healed && self.network.random.percent(5) {
                delay += self.network.random.below(SECOND);
            }
            self.plan(delay, Happening::Piece(Box::new(piece)));
            return;
        }
        let finished = piece.writer.take().map(SnapshotWriter::finish);
        if let Some(process) = self.process(to, to_boot) {
            process.receiving = None;
        }
        match finished {
            Some(Ok(staged)) => {
                self.counts.snapshots += 1;
                self.note(format_args!("m{to} has a whole snapshot of m{from}"));
                let snapshot = Box::new((piece.offer, staged));
                self.input(to, to_boot, Input::Snapshot(snapshot));
                self.input(from, from_boot, Input::SnapshotSent(member, true));
            }
            Some(Err(error)) => self.receiving_failed(&piece, &error),
            None => {}
        }
    }

    /// The receiver can't take a snapshot: its disk failed.
    fn receiving_failed(&mut self, piece: &Piece, error: &MemberError) {
        let ((from, from_boot), (to, to_boot)) = (piece.from, piece.to);
        self.note(format_args!("m{to} cannot take a snapshot: {error}"));
        if let Some(process) = self.process(to, to_boot) {
            process.receiving = None;
        }
        if self.machines[to].disk.is_stopped() {
            self.process_failed(to, error);
        }
        self.input(from, from_boot, Input::SnapshotSent(piece.offer.to, false));
    }
}
