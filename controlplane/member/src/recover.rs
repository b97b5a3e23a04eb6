//! What is left of a cluster that has lost its quorum for good: one member's data becomes the
//! beginning of a new cluster.

use std::sync::Arc;

use prost::Message as _;
use raft::eraftpb::{ConfState, EntryType};
use raft::{GetEntriesContext, Storage as _};

use crate::command::Command;
use crate::disk::Disk;
use crate::keyspace::{Keyspace, Metadata};
use crate::log::{Log, Owner, Position, VOTE_FILE};
use crate::{Identity, Limits, Member, MemberError, MemberOptions, Start};

const CACHE_BYTES: usize = 16 * 1024 * 1024;
/// Bytes of entries that are read at once.
const ENTRIES_BYTES: u64 = 4 * 1024 * 1024;

/// Applies every entry of the log in `disk`, also those of which nobody knows any more whether they
/// were committed: what was acknowledged is among them, if this member had it. Then `begin` makes the
/// metadata that of a new cluster, whose member `options` describe. Returns the metadata.
///
/// `disk` is to be a copy: the old cluster must not go on with it.
pub fn recover(
    disk: &Arc<dyn Disk>,
    old: &Identity,
    options: &MemberOptions,
    begin: impl FnOnce(&mut Metadata) -> Result<(), MemberError>,
) -> Result<Metadata, MemberError> {
    let keyspace = Keyspace::open(&**disk, CACHE_BYTES, None, options.limits)?;
    apply_log(disk, old, &keyspace, options.limits)?;
    let mut metadata = keyspace.metadata();
    begin(&mut metadata)?;
    metadata.found();
    keyspace.begin_anew(&metadata)?;
    drop(keyspace);
    for name in disk
        .list()
        .map_err(MemberError::disk("list the data folder"))?
    {
        if name.starts_with("log-") || name.starts_with("spare-") || name == VOTE_FILE {
            disk.remove(&name)
                .map_err(MemberError::disk(format!("remove {name}")))?;
        }
    }
    Identity::new(options.cluster_id, options.id).store(&**disk)?;
    debug_assert!(matches!(options.start, Start::New(_)));
    // Its log begins here.
    drop(Member::open(disk, options)?);
    Ok(metadata)
}

fn apply_log(
    disk: &Arc<dyn Disk>,
    old: &Identity,
    keyspace: &Keyspace,
    limits: Limits,
) -> Result<(), MemberError> {
    let owner = Owner {
        cluster_id: old.cluster_id,
        member_id: old.member_id,
    };
    let metadata = keyspace.metadata();
    let applied = Position {
        index: metadata.applied_index,
        term: metadata.applied_term,
    };
    let configuration: ConfState = metadata.consensus.unwrap_or_default().into();
    let log = Log::open(
        Arc::clone(disk),
        owner,
        applied,
        configuration,
        false,
        limits,
    )?;
    let (mut next, last) = (applied.index + 1, log.last().index);
    while next <= last {
        let context = GetEntriesContext::empty(false);
        let entries = log.entries(next, last + 1, ENTRIES_BYTES, context)?;
        let mut batch = keyspace.batch();
        for entry in entries {
            next = entry.index + 1;
            // Changes of membership are of no more use.
            if entry.entry_type() == EntryType::EntryNormal && !entry.data.is_empty() {
                let command = Command::decode(entry.data.as_ref()).map_err(|error| {
                    MemberError::Corrupt(format!("entry {} is not a command: {error}", entry.index))
                })?;
                // A refusal is an outcome as well.
                let _ = batch.apply(command)?;
            }
            batch.applied(entry.index, entry.term);
        }
        batch.finish();
    }
    Ok(())
}
