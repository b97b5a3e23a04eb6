//! How a member that is damaged, or that has lost its data, is rebuilt from the others.
//!
//! What it forgot may have been a vote, or an entry that it had acknowledged. So it takes no part in
//! consensus until that can do no harm any more:
//!
//! 1. Another member proposes [`Operation::Rebuild`](crate::command::Operation::Rebuild) for it, with a
//!    number that was never used. The others commit that entry without it, for it acknowledges nothing.
//! 2. It takes the keyspace of a member that has applied the entry, begins an empty log behind it, and
//!    is a member again.
//!
//! Whatever it had acknowledged before lies before that entry in the log of the leader that committed
//! it, for that leader had a quorum without it at that time, which shares a member with each quorum of
//! an earlier leader, and with each quorum of a later one that it may have helped to elect. A candidate
//! that still counts on its forgotten vote lacks the entry, and so gets no vote of that quorum.
//!
//! A cluster of which too few others are left for a quorum can't do that: it needs an operator.

use std::sync::Arc;

use crate::disk::Disk;
use crate::keyspace::{ENGINE_FILE, Keyspace, Metadata, StagedSnapshot, remove_incoming};
use crate::log::{Log, Owner, Position, VOTE_FILE};
use crate::{Identity, Limits, Member, MemberError, MemberOptions};

/// While it is there, the folder's data is not to be used: it says why.
const MARKER: &str = "damaged";
/// What is not to be used, but is kept until something else is there, has names that begin with this.
const ASIDE: &str = "damaged-";
const MAX_REASON: usize = 4096;

/// What a folder holds.
pub enum Opening {
    /// A member that can go on.
    Whole(Box<Member>),
    /// One that has to be rebuilt first, and why. It can be opened after [`prepare`] and [`finish`].
    Damaged(String),
}

/// Opens the member that a folder holds, unless it is damaged, or was found to be before. `others`
/// says whether it can be rebuilt from other members: without them, damage is an error.
pub fn open(
    disk: &Arc<dyn Disk>,
    options: &MemberOptions,
    others: bool,
) -> Result<Opening, MemberError> {
    if let Some(reason) = reason(&**disk)? {
        return Ok(Opening::Damaged(reason));
    }
    match Member::open(disk, options) {
        Ok(member) => Ok(Opening::Whole(Box::new(member))),
        Err(error) if error.is_damage() => {
            note(&**disk, &error, others)?;
            Ok(Opening::Damaged(error.to_string()))
        }
        Err(error) => Err(error),
    }
}

/// Notes damage that was found, as [`begin`] does, unless there are no others to rebuild the member
/// from.
pub fn note(disk: &dyn Disk, error: &MemberError, others: bool) -> Result<(), MemberError> {
    if !others {
        return Err(MemberError::Alone(error.to_string()));
    }
    begin(disk, &error.to_string())
}

/// Notes that what the folder holds is damaged or lost, durably: from now on, the member can only be
/// rebuilt.
pub fn begin(disk: &dyn Disk, reason: &str) -> Result<(), MemberError> {
    let what = || MemberError::disk(format!("write {MARKER}"));
    let file = disk.open(MARKER, true).map_err(what())?;
    let reason = &reason.as_bytes()[..reason.len().min(MAX_REASON)];
    file.set_length(0).map_err(what())?;
    file.write_at(reason, 0).map_err(what())?;
    file.sync_data().map_err(what())?;
    disk.sync().map_err(what())
}

/// Why the member has to be rebuilt, if it has to.
pub fn reason(disk: &dyn Disk) -> Result<Option<String>, MemberError> {
    let what = || MemberError::disk(format!("read {MARKER}"));
    let file = match disk.open(MARKER, false) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(what()(error)),
    };
    let length = usize::try_from(file.length().map_err(what())?).unwrap_or(usize::MAX);
    let mut bytes = vec![0; length.min(MAX_REASON)];
    file.read_at(&mut bytes, 0).map_err(what())?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Makes room for what will be received: what is damaged goes aside, what an earlier attempt left goes.
pub fn prepare(disk: &dyn Disk) -> Result<(), MemberError> {
    remove_incoming(disk)?;
    let names = disk
        .list()
        .map_err(MemberError::disk("list the data folder"))?;
    for name in names.iter().filter(|name| is_data(name)) {
        let aside = format!("{ASIDE}{name}");
        if name.starts_with("spare-") || names.contains(&aside) {
            remove(disk, name)?;
        } else {
            disk.rename(name, &aside)
                .map_err(MemberError::disk(format!("rename {name} to {aside}")))?;
        }
    }
    disk.sync()
        .map_err(MemberError::disk("sync the data folder"))
}

/// Begins with what another member sent after the entry with `number` was committed; the member can be
/// opened then. What was damaged is removed.
pub fn finish(
    disk: &Arc<dyn Disk>,
    identity: &Identity,
    staged: StagedSnapshot,
    number: u64,
    limits: Limits,
) -> Result<(), MemberError> {
    let refused = |how: &str| Err(MemberError::DamagedSnapshot(how.to_owned()));
    let metadata: Metadata = staged.metadata().clone();
    if metadata.cluster_id != identity.cluster_id {
        return refused("it is of another cluster");
    }
    let known = metadata
        .members
        .iter()
        .find(|member| member.id == identity.member_id);
    match known {
        Some(member) if member.rebuild == number => {}
        Some(_) => return refused("it is from before this member began to be rebuilt"),
        None => return Err(MemberError::Removed),
    }
    // What an earlier attempt left would be taken for this one's.
    clear(&**disk)?;
    staged.restore(&**disk, &metadata)?;
    let owner = Owner {
        cluster_id: identity.cluster_id,
        member_id: identity.member_id,
    };
    let applied = Position {
        index: metadata.applied_index,
        term: metadata.applied_term,
    };
    let conf_state = metadata.consensus.unwrap_or_default().into();
    drop(Log::open(
        Arc::clone(disk),
        owner,
        applied,
        conf_state,
        true,
        limits,
    )?);
    remove(&**disk, MARKER)?;
    disk.sync()
        .map_err(MemberError::disk("sync the data folder"))?;
    remove_aside(&**disk)
}

/// Removes what was kept aside by a rebuild that is done.
pub(crate) fn remove_aside(disk: &dyn Disk) -> Result<(), MemberError> {
    let names = disk
        .list()
        .map_err(MemberError::disk("list the data folder"))?;
    for name in names.iter().filter(|name| name.starts_with(ASIDE)) {
        remove(disk, name)?;
    }
    Ok(())
}

/// Removes all data: what was being made when a first start, or a rebuild, was broken off.
pub fn clear(disk: &dyn Disk) -> Result<(), MemberError> {
    let names = disk
        .list()
        .map_err(MemberError::disk("list the data folder"))?;
    for name in names.iter().filter(|name| is_data(name)) {
        remove(disk, name)?;
    }
    Ok(())
}

fn is_data(name: &str) -> bool {
    name == ENGINE_FILE
        || name == VOTE_FILE
        || name.starts_with("log-")
        || name.starts_with("spare-")
        || name.starts_with("next-")
}

fn remove(disk: &dyn Disk, name: &str) -> Result<(), MemberError> {
    disk.remove(name)
        .map_err(MemberError::disk(format!("remove {name}")))
}

/// Whether a folder holds data of a member, whoever that is.
pub fn has_data(disk: &dyn Disk) -> Result<bool, MemberError> {
    let names = disk
        .list()
        .map_err(MemberError::disk("list the data folder"))?;
    Ok(names.iter().any(|name| is_data(name)))
}

/// Whether a keyspace is that of a cluster in which nothing has happened yet.
pub fn is_pristine(keyspace: &Keyspace, term: u64) -> bool {
    keyspace.metadata().applied_index <= 1 && term <= 1
}
