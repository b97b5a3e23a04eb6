//! Disaster recovery: a new cluster of one member from the folder of any member of the old one.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use keelson_member::disk::{Disk, Folder};
use keelson_member::{Identity, Limits, MemberError, MemberOptions, Start, rebuild, recover};

use crate::options::{Founders, MemberFlags};

/// Copies the folder `from` and makes the copy the data of the first member of a new cluster.
pub fn run(from: &Path, flags: &MemberFlags, bump_revision: i64) -> anyhow::Result<()> {
    let founders = flags.founders()?;
    anyhow::ensure!(
        founders.members.len() == 1,
        "a recovered cluster begins with one member: leave --initial-cluster out, and add the others \
         when it serves"
    );
    let folder = flags.folder();
    ensure_empty(&folder)?;
    copy(from, &folder)?;
    let disk: Arc<dyn Disk> = Arc::new(
        Folder::open(&folder).with_context(|| format!("cannot open {}", folder.display()))?,
    );
    let old = Identity::load(&*disk)?
        .with_context(|| format!("{} is not the folder of a member", from.display()))?;
    if let Some(reason) = rebuild::reason(&*disk)? {
        anyhow::bail!(
            "{} is damaged, and was not rebuilt yet ({reason}): recover from another member's folder, or \
             restore a backup (keelson-state snapshot restore)",
            from.display()
        );
    }
    anyhow::ensure!(
        old.cluster_id != founders.cluster_id,
        "the new cluster would have the id of the old one: give another --initial-cluster-token"
    );
    let metadata = recover(&disk, &old, &first_member(&founders), |metadata| {
        begin_anew(metadata, &founders, bump_revision, true)
            .map_err(|error| MemberError::DamagedSnapshot(error.to_string()))
    })?;
    println!(
        "recovered revision {} into {}: start it as member {:?} of a new cluster, and never start the \
         old cluster again",
        metadata.revision,
        folder.display(),
        flags.name
    );
    Ok(())
}

/// Makes metadata that of a new cluster.
pub fn begin_anew(
    metadata: &mut keelson_member::keyspace::Metadata,
    founders: &Founders,
    bump_revision: i64,
    mark_compacted: bool,
) -> anyhow::Result<()> {
    metadata.cluster_id = founders.cluster_id;
    metadata.members.clone_from(&founders.members);
    metadata.removed_members.clear();
    metadata.alarms.clear();
    metadata.revision = metadata
        .revision
        .checked_add(bump_revision)
        .context("--bump-revision is too large")?;
    if mark_compacted {
        metadata.compact_revision = metadata.revision;
    }
    metadata.found();
    Ok(())
}

/// How the member opens that begins a new cluster.
pub fn first_member(founders: &Founders) -> MemberOptions {
    MemberOptions {
        cluster_id: founders.cluster_id,
        id: founders.member_id,
        start: Start::New(founders.members.clone()),
        election_ticks: 10,
        seed: 1,
        cache_bytes: 1 << 20,
        limits: Limits::default(),
    }
}

/// Refuses a folder with something in it.
pub fn ensure_empty(folder: &Path) -> anyhow::Result<()> {
    if let Ok(mut entries) = std::fs::read_dir(folder) {
        anyhow::ensure!(
            entries.next().is_none(),
            "{} is not empty: use a new folder",
            folder.display()
        );
    }
    Ok(())
}

/// Whether a file is what something that was broken off has left, or is prepared for later.
fn is_left_over(name: &std::ffi::OsStr) -> bool {
    let left = ["next-", "spare-", "incoming-", "damaged-"];
    let name = name.to_string_lossy();
    left.iter().any(|prefix| name.starts_with(prefix))
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    // Locked, so that no member writes to it meanwhile.
    let lock = Folder::open(from);
    let _lock = lock.with_context(|| format!("{}: is its member running?", from.display()))?;
    std::fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for entry in std::fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        if !entry.file_type()?.is_file() || name == "lock" || is_left_over(&name) {
            continue;
        }
        std::fs::copy(entry.path(), to.join(&name))
            .with_context(|| format!("copy {}", entry.path().display()))?;
    }
    Ok(())
}
