//! A guest's snapshots on this host, and what is to become of them.
//!
//! ```text
//! NAME/taken/SNAPSHOT   the snapshots; the folder is the guest's user's
//! NAME/restore          the name of the snapshot that the guest starts from next
//! NAME/disks            the name of the snapshot that its disks are as of
//! ```
//!
//! A snapshot has the guest's memory, with what its kernel knows of its disks. So of a guest that writes
//! to disks a snapshot is good only while nothing has written to them since: it is shut off with the
//! snapshot, and any start makes an end of that.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use keelson_vmm::snapshot::Snapshot;

use super::jail::JailUser;
use crate::config::Config;
use crate::{AgentError, error::Result};

/// A guest's snapshots on this host.
#[derive(Clone, Debug)]
pub struct GuestSnapshots {
    folder: PathBuf,
    owner: Option<JailUser>,
}

/// What is known of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Its name.
    pub name: String,
    /// When it was taken, in milliseconds since the Unix epoch.
    pub taken_at_unix_ms: i64,
    /// The name of the snapshot that it is a difference to.
    pub base: Option<String>,
    /// Bytes that it takes on the disk.
    pub disk_bytes: u64,
    /// Why it can't be used.
    pub problem: Option<String>,
}

impl GuestSnapshots {
    /// The snapshots of the guest `name`.
    pub fn new(config: &Config, name: &str) -> Self {
        Self {
            folder: config.snapshot_directory.join(name),
            owner: config.jail.then(|| JailUser::of(name)),
        }
    }

    /// Makes the folder that they are taken to; returns it.
    pub fn create(&self) -> Result<PathBuf> {
        let taken = self.taken();
        let what = || format!("create {}", taken.display());
        fs::create_dir_all(&taken).map_err(AgentError::io(what()))?;
        fs::set_permissions(&taken, fs::Permissions::from_mode(0o700))
            .map_err(AgentError::io(what()))?;
        if let Some(owner) = self.owner {
            owner.own(&taken)?;
        }
        // The jail is told of a path without symbolic links.
        taken.canonicalize().map_err(AgentError::io(what()))
    }

    /// Where a snapshot is, or would be.
    pub fn directory(&self, snapshot: &str) -> PathBuf {
        self.taken().join(snapshot)
    }

    /// All snapshots, by name.
    pub fn list(&self) -> Result<Vec<SnapshotEntry>> {
        let what = || format!("list {}", self.taken().display());
        let entries = match fs::read_dir(self.taken()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(AgentError::io(what()))?,
        };
        let mut list = Vec::new();
        for entry in entries {
            let entry = entry.map_err(AgentError::io(what()))?;
            if let Ok(name) = entry.file_name().into_string() {
                list.push(describe(name, &entry.path()));
            }
        }
        list.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(list)
    }

    /// Removes one.
    ///
    /// # Errors
    /// [`AgentError::Precondition`] where there is none of that name, or another is a difference to it.
    pub fn remove(&self, snapshot: &str) -> Result<()> {
        let directory = self.directory(snapshot);
        if !directory.is_dir() {
            return Err(missing(snapshot));
        }
        let list = self.list()?;
        let behind = list
            .iter()
            .find(|entry| entry.base.as_deref() == Some(snapshot));
        if let Some(entry) = behind {
            let message = format!(
                "snapshot {:?} is a difference to {snapshot:?}; delete it first",
                entry.name
            );
            return Err(AgentError::Precondition(vec![message]));
        }
        remove_folder(&directory)?;
        if self.disks_as_of().as_deref() == Some(snapshot) {
            self.forget_disks()?;
        }
        Ok(())
    }

    /// Removes all, with their guest.
    pub fn remove_all(&self) -> Result<()> {
        remove_folder(&self.folder)
    }

    /// The snapshot that the guest's disks are as of, if nothing has written to them since.
    pub fn disks_as_of(&self) -> Option<String> {
        read_name(&self.folder.join("disks"))
    }

    /// The guest stands still after this snapshot, and is to be shut off without another step.
    pub fn keep_disks(&self, snapshot: &str) -> Result<()> {
        self.write_name("disks", snapshot)
    }

    /// The guest runs, or is about to.
    pub fn forget_disks(&self) -> Result<()> {
        remove_file(&self.folder.join("disks"))
    }

    /// The snapshot that the guest starts from next, instead of its kernel.
    pub fn to_restore(&self) -> Option<String> {
        read_name(&self.folder.join("restore"))
    }

    /// Lets the guest start from a snapshot next.
    ///
    /// # Errors
    /// [`AgentError::Precondition`] where there is no such snapshot, or it is none.
    pub fn restore_next(&self, snapshot: &str) -> Result<()> {
        let directory = self.directory(snapshot);
        if !directory.is_dir() {
            return Err(missing(snapshot));
        }
        if let Err(error) = open(&directory) {
            return Err(AgentError::Precondition(vec![error]));
        }
        self.write_name("restore", snapshot)
    }

    /// The guest starts from its kernel next.
    pub fn forget_restore(&self) -> Result<()> {
        remove_file(&self.folder.join("restore"))
    }

    fn taken(&self) -> PathBuf {
        self.folder.join("taken")
    }

    fn write_name(&self, file: &str, snapshot: &str) -> Result<()> {
        let path = self.folder.join(file);
        let what = || format!("write {}", path.display());
        fs::create_dir_all(&self.folder).map_err(AgentError::io(what()))?;
        crate::host::write_atomically(&path, &snapshot)
    }
}

fn missing(snapshot: &str) -> AgentError {
    AgentError::Precondition(vec![format!(
        "there is no snapshot {snapshot:?}; `keelson snapshot list` shows what there is"
    )])
}

/// Opens a snapshot in a folder that the guest's process writes: nothing but regular files.
fn open(directory: &Path) -> std::result::Result<Snapshot, String> {
    for file in ["state", "memory"] {
        let path = directory.join(file);
        if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(format!("{} is no regular file", path.display()));
        }
    }
    Snapshot::open(directory).map_err(|error| error.to_string())
}

fn describe(name: String, directory: &Path) -> SnapshotEntry {
    let opened =
        open(directory).and_then(|snapshot| snapshot.summary().map_err(|error| error.to_string()));
    let (summary, problem) = match opened {
        Ok(summary) => (Some(summary), None),
        Err(error) => (None, Some(error)),
    };
    let base = summary.as_ref().and_then(|summary| summary.base.as_ref());
    SnapshotEntry {
        name,
        taken_at_unix_ms: summary.as_ref().map_or(0, |summary| {
            i64::try_from(summary.taken_at_unix_ms).unwrap_or(i64::MAX)
        }),
        base: base
            .and_then(|base| Path::new(base).file_name())
            .map(|base| base.to_string_lossy().into_owned()),
        disk_bytes: disk_bytes(directory),
        problem,
    }
}

/// What the files of a folder take of the disk: the memory is sparse.
fn disk_bytes(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let bytes = entries.filter_map(|entry| Some(entry.metadata().ok()?.blocks() * 512));
    bytes.sum()
}

fn read_name(path: &Path) -> Option<String> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(AgentError::io(format!("remove {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(AgentError::io(format!("remove {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}
