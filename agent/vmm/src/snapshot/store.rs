//! Snapshots on the disk: opened, checked, merged and written.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::SnapshotError;
use super::format::{self, HEADER_BYTES, MAX_BODY_BYTES};
use super::memory_file;
use super::state::{MemoryState, SnapshotState};
use crate::api::SnapshotKind;
use crate::config::GuestConfig;
use crate::memory::{PAGE, Ram};

/// The most differences behind each other.
pub const MAX_CHAIN: usize = 64;

/// A snapshot with what it is a difference to, whose files are open.
pub struct Snapshot {
    directory: PathBuf,
    state: SnapshotState,
    /// From the full snapshot to this one's own memory.
    layers: Vec<Layer>,
}

/// What a snapshot holds.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// All of the memory, or the difference to `base`.
    pub kind: SnapshotKind,
    /// The version of the program that took it.
    pub program: String,
    /// When, in milliseconds since the Unix epoch.
    pub taken_at_unix_ms: u64,
    /// Bytes of the guest's memory.
    pub memory_bytes: u64,
    /// Bytes that a differential snapshot holds.
    pub changed_bytes: Option<u64>,
    /// The directory of the snapshot that it is the difference to.
    pub base: Option<String>,
    /// The guest's configuration.
    pub config: GuestConfig,
}

struct Layer {
    path: PathBuf,
    file: File,
    memory: MemoryState,
}

impl Snapshot {
    /// Opens the snapshot in `directory`: its state is checked, its memory by its size alone.
    ///
    /// # Errors
    /// [`SnapshotError`] says which file is not usable, and why.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let directory = fs::canonicalize(directory)
            .map_err(SnapshotError::io("find the snapshot", directory))?;
        let state = read_state(&directory)?;
        let mut layers = vec![Layer::open(&directory, &state.memory)?];
        let mut newest = (directory.clone(), state.memory.difference.clone());
        while let (directory, Some(difference)) = newest {
            if layers.len() > MAX_CHAIN {
                return Err(SnapshotError::Chain(directory));
            }
            let base = PathBuf::from(&difference.base_directory);
            let older = read_state(&base)?;
            if older.id != difference.base || older.memory.bytes != state.memory.bytes {
                return Err(SnapshotError::Base { directory, base });
            }
            layers.push(Layer::open(&base, &older.memory)?);
            newest = (base, older.memory.difference);
        }
        layers.reverse();
        Ok(Self {
            directory,
            state,
            layers,
        })
    }

    /// Its directory, an absolute path.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its directory and those of the snapshots that it is the difference to.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.layers.iter().filter_map(|layer| layer.path.parent())
    }

    /// Its state.
    pub const fn state(&self) -> &SnapshotState {
        &self.state
    }

    /// What it holds, for people and programs.
    ///
    /// # Errors
    /// If its configuration isn't valid.
    pub fn summary(&self) -> Result<Summary, SnapshotError> {
        let state = &self.state;
        let difference = state.memory.difference.as_ref();
        Ok(Summary {
            kind: if difference.is_some() {
                SnapshotKind::Differential
            } else {
                SnapshotKind::Full
            },
            program: state.program.clone(),
            taken_at_unix_ms: state.taken_at_unix_ms,
            memory_bytes: state.memory.bytes,
            changed_bytes: difference.map(|d| d.pages.iter().map(|r| r.count).sum::<u64>() * PAGE),
            base: difference.map(|difference| difference.base_directory.clone()),
            config: state.config()?,
        })
    }

    /// Reads all memory and compares it with its checksums.
    ///
    /// # Errors
    /// [`SnapshotError::Memory`] with the place of the first difference.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        for layer in &self.layers {
            let found = memory_file::checksums(&layer.file, layer.memory.bytes)
                .map_err(SnapshotError::io("read", &layer.path))?;
            let wrong = found
                .iter()
                .zip(&layer.memory.checksums)
                .position(|(found, wanted)| found != wanted);
            if let Some(chunk) = wrong {
                return Err(SnapshotError::Memory {
                    path: layer.path.clone(),
                    reason: format!(
                        "it is corrupt: the checksum of the 2 MiB at offset {:#x} is wrong",
                        chunk as u64 * super::CHUNK
                    ),
                });
            }
        }
        Ok(())
    }

    /// Gives the memory of the full snapshot as a file to be mapped, and reads what differs into
    /// the memory that `map` makes of it.
    pub(crate) fn map<M: AsRef<Ram>, E: From<SnapshotError>>(
        &self,
        map: impl FnOnce(File) -> Result<M, E>,
    ) -> Result<M, E> {
        let full = self.full()?;
        let file = full
            .file
            .try_clone()
            .map_err(SnapshotError::io("open", &full.path))?;
        let memory = map(file)?;
        self.read_differences(memory.as_ref())?;
        Ok(memory)
    }

    /// Reads the memory into `ram`, which is zero.
    pub(crate) fn read_into(&self, ram: &Ram) -> Result<(), SnapshotError> {
        let full = self.full()?;
        memory_file::read_all(ram, &full.file).map_err(SnapshotError::io("read", &full.path))?;
        self.read_differences(ram)
    }

    fn full(&self) -> Result<&Layer, SnapshotError> {
        // The chain ends with a full snapshot, or it could not have been opened.
        self.layers
            .first()
            .ok_or_else(|| SnapshotError::Missing(self.directory.clone()))
    }

    fn read_differences(&self, ram: &Ram) -> Result<(), SnapshotError> {
        for layer in &self.layers {
            if let Some(difference) = &layer.memory.difference {
                memory_file::read_pages(ram, &layer.file, &difference.pages)
                    .map_err(SnapshotError::io("read", &layer.path))?;
            }
        }
        Ok(())
    }

    /// The memory in one file, for comparisons.
    pub(crate) fn flat_memory(&self) -> Result<File, SnapshotError> {
        if let [only] = &self.layers[..] {
            return only
                .file
                .try_clone()
                .map_err(SnapshotError::io("open", &only.path));
        }
        let path = std::env::temp_dir();
        let flat = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC)
            .mode(0o600)
            .open(&path)
            .map_err(SnapshotError::io("make a file in", &path))?;
        self.copy_to(&flat, &path)?;
        Ok(flat)
    }

    fn copy_to(&self, target: &File, path: &Path) -> Result<(), SnapshotError> {
        let failed = |e| SnapshotError::io("write", path)(e);
        target.set_len(self.state.memory.bytes).map_err(failed)?;
        for layer in &self.layers {
            let ranges = match &layer.memory.difference {
                Some(difference) => difference
                    .pages
                    .iter()
                    .map(|range| (range.first * PAGE, range.count * PAGE))
                    .collect(),
                None => vec![(0, layer.memory.bytes)],
            };
            let is_full = layer.memory.difference.is_none();
            for (start, length) in ranges {
                copy_range(&layer.file, target, start, length, is_full).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// Copies a range in pieces; zeros are left out if `sparse`.
fn copy_range(
    from: &File,
    to: &File,
    start: u64,
    length: u64,
    sparse: bool,
) -> std::io::Result<()> {
    const PIECE: u64 = 64 << 10;
    let mut buffer = vec![0; 64 << 10];
    let end = start + length;
    for offset in (start..end).step_by(buffer.len()) {
        let length = usize::try_from(PIECE.min(end - offset)).unwrap_or(0);
        let piece = &mut buffer[..length];
        from.read_exact_at(piece, offset)?;
        if !sparse || piece.iter().any(|byte| *byte != 0) {
            to.write_all_at(piece, offset)?;
        }
    }
    Ok(())
}

impl Layer {
    fn open(directory: &Path, memory: &MemoryState) -> Result<Self, SnapshotError> {
        let path = directory.join("memory");
        let file = File::open(&path).map_err(SnapshotError::io("open", &path))?;
        let length = file
            .metadata()
            .map_err(SnapshotError::io("open", &path))?
            .len();
        if length != memory.bytes {
            let reason = format!("it has {length} bytes, not {}", memory.bytes);
            return Err(SnapshotError::Memory { path, reason });
        }
        Ok(Self {
            path,
            file,
            memory: memory.clone(),
        })
    }
}

fn read_state(directory: &Path) -> Result<SnapshotState, SnapshotError> {
    let path = directory.join("state");
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(SnapshotError::Missing(directory.into()));
        }
        Err(e) => return Err(SnapshotError::io("open", path)(e)),
    };
    let mut bytes = Vec::new();
    Read::by_ref(&mut file)
        .take(MAX_BODY_BYTES + HEADER_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(SnapshotError::io("read", &path))?;
    SnapshotState::decode(&bytes).map_err(|source| SnapshotError::State { path, source })
}

/// A snapshot that is being written: nothing is there until [`Self::finish`].
pub(crate) struct Writer {
    directory: PathBuf,
    created: bool,
    pub(crate) memory: File,
}

impl Writer {
    /// Makes the directory, or takes an empty one, and a memory file of `bytes` bytes in it.
    pub(crate) fn create(directory: &Path, bytes: u64) -> Result<Self, SnapshotError> {
        let made = DirBuilder::new().mode(0o700).create(directory);
        let created = match made {
            Ok(()) => true,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(SnapshotError::io("create", directory)(e)),
        };
        let occupied = fs::read_dir(directory)
            .map_err(SnapshotError::io("read", directory))?
            .next()
            .is_some();
        if occupied {
            return Err(SnapshotError::Occupied(directory.into()));
        }
        let directory =
            fs::canonicalize(directory).map_err(SnapshotError::io("find", directory))?;
        let path = directory.join("memory");
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|file| file.set_len(bytes).map(|()| file))
            .map_err(SnapshotError::io("create", &path))?;
        Ok(Self {
            directory,
            created,
            memory,
        })
    }

    /// Where the snapshot will be, an absolute path.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// For `map_err` on writes of the memory.
    pub(crate) fn memory_error(&self) -> impl FnOnce(std::io::Error) -> SnapshotError + use<> {
        SnapshotError::io("write", self.directory.join("memory"))
    }

    /// Puts everything on the disk, the state last.
    pub(crate) fn finish(self, state: &mut SnapshotState) -> Result<(), SnapshotError> {
        state.memory.checksums = memory_file::checksums(&self.memory, state.memory.bytes)
            .map_err(self.memory_error())?;
        self.memory.sync_all().map_err(self.memory_error())?;
        let path = self.directory.join("state");
        let partial = self.directory.join("state.partial");
        let bytes = format::encode(state).map_err(|source| SnapshotError::State {
            path: path.clone(),
            source,
        })?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)
            .map_err(SnapshotError::io("create", &partial))?;
        file.write_all(&bytes)
            .and_then(|()| file.sync_all())
            .map_err(SnapshotError::io("write", &partial))?;
        fs::rename(&partial, &path).map_err(SnapshotError::io("create", &path))?;
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(SnapshotError::io("write", &self.directory))
    }

    /// Removes what is there of a snapshot that can't be finished.
    pub(crate) fn discard(self) {
        for name in ["memory", "state.partial"] {
            let _ = fs::remove_file(self.directory.join(name));
        }
        if self.created {
            let _ = fs::remove_dir(&self.directory);
        }
    }
}

/// Writes a full snapshot with what `from`, a differential one, and all before it have, to `to`.
///
/// # Errors
/// As [`Snapshot::open`] and [`Snapshot::verify`], or of the new files.
pub fn merge(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    let mut snapshot = Snapshot::open(from)?;
    snapshot.verify()?;
    let writer = Writer::create(to, snapshot.state.memory.bytes)?;
    if let Err(e) = snapshot.copy_to(&writer.memory, writer.directory()) {
        writer.discard();
        return Err(e);
    }
    snapshot.state.memory.difference = None;
    writer.finish(&mut snapshot.state)
}
