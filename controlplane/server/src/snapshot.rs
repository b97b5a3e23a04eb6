//! Backups: what `etcdctl snapshot save` gets, and what is made from it.
//!
//! A backup is the stream that members send each other, padded with zeros to a multiple of 512
//! bytes, and its SHA-256: the form by which etcd's clients know that it is whole.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use keelson_member::disk::{Disk, Folder};
use keelson_member::keyspace::{SnapshotReader, SnapshotWriter, StagedSnapshot};
use keelson_member::{Identity, Member, MemberError};
use sha2::{Digest as _, Sha256};

use crate::options::{MemberFlags, Output, SnapshotCommand};
use crate::recover::{begin_anew, ensure_empty, first_member};

/// The stream is padded to a multiple of this.
const BLOCK: u64 = 512;
const CHECKSUM: usize = 32;
const READ_BYTES: usize = 1 << 20;

/// The parts of a backup, in order.
pub struct BackupReader {
    snapshot: SnapshotReader,
    hasher: Option<Sha256>,
    length: u64,
}

impl BackupReader {
    /// Begins with what a keyspace gives.
    pub fn new(snapshot: SnapshotReader) -> Self {
        Self {
            snapshot,
            hasher: Some(Sha256::new()),
            length: 0,
        }
    }

    /// The next part; `None` after the last.
    pub fn next_part(&mut self) -> Result<Option<Vec<u8>>, MemberError> {
        let Some(hasher) = &mut self.hasher else {
            return Ok(None);
        };
        if let Some(chunk) = self.snapshot.next_chunk()? {
            self.length += chunk.len() as u64;
            hasher.update(&chunk);
            return Ok(Some(chunk));
        }
        let padding = self.length.next_multiple_of(BLOCK) - self.length;
        let mut end = vec![0; usize::try_from(padding).unwrap_or(0)];
        hasher.update(&end);
        if let Some(hasher) = self.hasher.take() {
            end.extend_from_slice(&hasher.finalize());
        }
        Ok(Some(end))
    }
}

/// Runs a command on a backup.
pub fn run(command: &SnapshotCommand) -> anyhow::Result<()> {
    match command {
        SnapshotCommand::Status { file, output } => status(file, *output),
        SnapshotCommand::Restore {
            file,
            member,
            bump_revision,
            mark_compacted,
        } => restore(file, member, *bump_revision, *mark_compacted),
    }
}

fn status(file: &Path, output: Output) -> anyhow::Result<()> {
    // It is loaded to be checked, into a folder that is gone afterwards.
    let parent = file.parent().filter(|path| !path.as_os_str().is_empty());
    let folder = parent
        .unwrap_or(Path::new("."))
        .join(format!(".keelson-state-status-{}", std::process::id()));
    let outcome = load(file, &folder);
    let removed = std::fs::remove_dir_all(&folder);
    let (staged, _) = outcome?;
    removed.with_context(|| format!("cannot remove {}", folder.display()))?;
    let metadata = staged.metadata();
    let bytes = std::fs::metadata(file)?.len();
    match output {
        Output::Json => println!(
            "{}",
            serde_json::json!({
                "revision": metadata.revision,
                "compactRevision": metadata.compact_revision.max(0),
                "clusterId": format!("{:x}", metadata.cluster_id),
                "members": metadata.members.iter().map(|member| &member.name).collect::<Vec<_>>(),
                "bytes": bytes,
            })
        ),
        Output::Table => {
            let mut table = comfy_table::Table::new();
            table.load_style(comfy_table::presets::NOTHING);
            table.set_header(["REVISION", "COMPACTED", "CLUSTER", "MEMBERS", "BYTES"]);
            let names: Vec<_> = metadata
                .members
                .iter()
                .map(|member| &*member.name)
                .collect();
            table.add_row([
                metadata.revision.to_string(),
                metadata.compact_revision.max(0).to_string(),
                format!("{:x}", metadata.cluster_id),
                names.join(","),
                bytes.to_string(),
            ]);
            println!("{table}");
        }
    }
    Ok(())
}

fn restore(
    file: &Path,
    flags: &MemberFlags,
    bump_revision: i64,
    mark_compacted: bool,
) -> anyhow::Result<()> {
    let founders = flags.founders()?;
    let folder = flags.folder();
    ensure_empty(&folder)?;
    let (staged, disk) = load(file, &folder)?;
    let mut metadata = staged.metadata().clone();
    begin_anew(&mut metadata, &founders, bump_revision, mark_compacted)?;
    staged.restore(&*disk, &metadata)?;
    // Its log begins here.
    drop(Member::open(&disk, &first_member(&founders))?);
    Identity::new(founders.cluster_id, founders.member_id).store(&*disk)?;
    println!(
        "restored revision {} into {}: start it as member {:?} of the new cluster",
        metadata.revision,
        folder.display(),
        flags.name
    );
    Ok(())
}

/// Checks a backup and loads it into a folder.
fn load(path: &Path, folder: &Path) -> anyhow::Result<(StagedSnapshot, Arc<dyn Disk>)> {
    let what = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(what)?;
    let length = file.metadata().with_context(what)?.len();
    anyhow::ensure!(
        length % BLOCK == CHECKSUM as u64,
        "{} has no checksum at its end: it is not a whole backup",
        path.display()
    );
    let disk: Arc<dyn Disk> = Arc::new(
        Folder::open(folder).with_context(|| format!("cannot make {}", folder.display()))?,
    );
    let mut writer = SnapshotWriter::new(Arc::clone(&disk), 1)?;
    let mut hasher = Sha256::new();
    let mut left = length - CHECKSUM as u64;
    let mut buffer = vec![0; READ_BYTES];
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(READ_BYTES).min(READ_BYTES);
        file.read_exact(&mut buffer[..wanted]).with_context(what)?;
        hasher.update(&buffer[..wanted]);
        writer.push(&buffer[..wanted])?;
        left -= wanted as u64;
    }
    let mut sum = [0; CHECKSUM];
    file.read_exact(&mut sum).with_context(what)?;
    anyhow::ensure!(
        hasher.finalize()[..] == sum,
        "{} fails its checksum: take the backup again",
        path.display()
    );
    Ok((writer.finish()?, disk))
}
