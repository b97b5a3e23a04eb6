//! The file beside the log: what a member voted, and how far its log certainly reached.
//!
//! The vote is synced before it is told, and does not depend on the log's end. It is kept twice, and
//! written into the slots that were not written the last time: a write that is torn harms nothing
//! that was synced before, and one flipped bit does not bring back the vote of before. Each frame of
//! the log names the vote's generation, and so tells an older vote from the last one.
//!
//! The mark says which frame was synced last. It is written after the sync, and not synced itself:
//! if it is there, a log that ends before it is damaged and not torn.

use std::io;
use std::sync::Arc;

use super::{Owner, Position};
use crate::MemberError;
use crate::disk::{BLOCK, Disk, DiskFile};

/// Name of the file.
pub(crate) const FILE: &str = "vote";
const FORMAT: u64 = 2;
const MAGIC: &[u8; 8] = b"KEELVOTE";
const FIELDS: usize = 5;
/// magic; format, kind, cluster, member, generation, fields; checksum. Within one sector.
const RECORD: usize = 8 + (5 + FIELDS) * 8 + 4;
const KIND_VOTE: u64 = 1;
const KIND_MARK: u64 = 2;
/// Two slots for votes and one for marks, and all of it again.
const SLOTS: u64 = 6;

/// The open file.
#[derive(Debug)]
pub(super) struct VoteFile {
    file: Arc<dyn DiskFile>,
    owner: Owner,
    /// Generation of the newest vote.
    pub(super) generation: u64,
    pub(super) vote: Vote,
    marks: u64,
    /// As it was found when the file was opened; what was marked since is not needed.
    pub(super) mark: Mark,
}

/// What must not be forgotten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Vote {
    /// The term.
    pub(super) term: u64,
    /// Who has this member's vote in it; 0 for nobody.
    pub(super) candidate: u64,
    /// The snapshot that is being installed: the keyspace may have it, and the log not know of it.
    pub(super) installing: Position,
}

/// How far the log was synced at least.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Mark {
    /// Number of a frame.
    pub(super) frame: u64,
    /// Index of an entry that was committed.
    pub(super) commit: u64,
}

impl VoteFile {
    /// Makes the file, durably.
    pub(super) fn create(disk: &dyn Disk, owner: Owner, vote: Vote) -> Result<Self, MemberError> {
        let what = || MemberError::disk(format!("create {FILE}"));
        let file = disk.open(FILE, true).map_err(what())?;
        file.set_length(0).map_err(what())?;
        let mut created = Self {
            file,
            owner,
            generation: 0,
            vote,
            marks: 0,
            mark: Mark::default(),
        };
        // A full disk must not keep it from being written later.
        let zeros = vec![0; BLOCK];
        for slot in 0..SLOTS {
            created
                .file
                .write_at(&zeros, slot * BLOCK as u64)
                .map_err(what())?;
        }
        created.write(vote)?;
        disk.sync()
            .map_err(MemberError::disk("sync the data folder"))?;
        Ok(created)
    }

    /// Opens the file; `None` if it is missing.
    pub(super) fn open(disk: &dyn Disk, owner: Owner) -> Result<Option<Self>, MemberError> {
        let what = || MemberError::disk(format!("read {FILE}"));
        let file = match disk.open(FILE, false) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(what()(error)),
        };
        let (mut vote, mut mark) = (None, None);
        let mut is_worn = false;
        for slot in 0..SLOTS {
            let mut record = [0; RECORD];
            match file.read_at(&mut record, slot * BLOCK as u64) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                other => other.map_err(what())?,
            }
            let Some((kind, generation, fields)) = decode(&record, owner)? else {
                is_worn |= record.iter().any(|byte| *byte != 0);
                continue;
            };
            let newest = if kind == KIND_VOTE {
                &mut vote
            } else {
                &mut mark
            };
            if newest.is_none_or(|(newest, _)| newest < generation) {
                *newest = Some((generation, fields));
            }
        }
        let (generation, fields) = vote.ok_or_else(|| {
            MemberError::Corrupt(format!(
                "{FILE} is damaged: what this member voted is not known"
            ))
        })?;
        let (marks, marked) = mark.unwrap_or_default();
        let mut opened = Self {
            file,
            owner,
            generation,
            vote: Vote {
                term: fields[0],
                candidate: fields[1],
                installing: Position {
                    index: fields[2],
                    term: fields[3],
                },
            },
            marks,
            mark: Mark {
                frame: marked[0],
                commit: marked[1],
            },
        };
        if is_worn {
            tracing::warn!("{FILE} is damaged in one of its copies, and is written anew");
            opened.write(opened.vote)?;
            opened.write(opened.vote)?;
        }
        Ok(Some(opened))
    }

    /// Notes a vote, durably.
    pub(super) fn write(&mut self, vote: Vote) -> Result<(), MemberError> {
        let what = || MemberError::disk(format!("write {FILE}"));
        self.generation += 1;
        let fields = [
            vote.term,
            vote.candidate,
            vote.installing.index,
            vote.installing.term,
            0,
        ];
        let record = encode(self.owner, KIND_VOTE, self.generation, fields);
        for copy in 0..2 {
            let slot = self.generation % 2 + 3 * copy;
            self.file
                .write_at(&record, slot * BLOCK as u64)
                .map_err(what())?;
        }
        self.file.sync_data().map_err(what())?;
        self.vote = vote;
        Ok(())
    }

    /// Makes what was noted durable.
    pub(super) fn sync(&self) -> Result<(), MemberError> {
        self.file
            .sync_data()
            .map_err(MemberError::disk(format!("sync {FILE}")))
    }

    /// Notes what was synced; not durable by itself.
    pub(super) fn mark(&mut self, mark: Mark) -> Result<(), MemberError> {
        self.marks += 1;
        let fields = [mark.frame, mark.commit, 0, 0, 0];
        let record = encode(self.owner, KIND_MARK, self.marks, fields);
        let slot = 2 + 3 * (self.marks % 2);
        self.file
            .write_at(&record, slot * BLOCK as u64)
            .map_err(MemberError::disk(format!("write {FILE}")))
    }
}

fn encode(owner: Owner, kind: u64, generation: u64, fields: [u64; FIELDS]) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[..8].copy_from_slice(MAGIC);
    let head = [FORMAT, kind, owner.cluster_id, owner.member_id, generation];
    for (at, number) in head.into_iter().chain(fields).enumerate() {
        record[8 + at * 8..16 + at * 8].copy_from_slice(&number.to_le_bytes());
    }
    let sum = crc32fast::hash(&record[..RECORD - 4]);
    record[RECORD - 4..].copy_from_slice(&sum.to_le_bytes());
    record
}

/// Kind, generation and fields; `None` if it is not whole.
fn decode(
    record: &[u8; RECORD],
    owner: Owner,
) -> Result<Option<(u64, u64, [u64; FIELDS])>, MemberError> {
    let (body, sum) = record.split_at(RECORD - 4);
    if &body[..8] != MAGIC || crc32fast::hash(body).to_le_bytes() != *sum {
        return Ok(None);
    }
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&body[8 + at * 8..16 + at * 8]);
        u64::from_le_bytes(bytes)
    };
    if number(0) > FORMAT {
        return Err(MemberError::Newer {
            what: FILE.into(),
            found: number(0),
            known: FORMAT,
        });
    }
    let found = Owner {
        cluster_id: number(2),
        member_id: number(3),
    };
    if found != owner {
        return Err(owner.foreign(FILE, found));
    }
    let mut fields = [0; FIELDS];
    for (at, field) in fields.iter_mut().enumerate() {
        *field = number(5 + at);
    }
    Ok(Some((number(1), number(4), fields)))
}
