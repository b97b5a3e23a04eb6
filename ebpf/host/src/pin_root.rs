//! The folder of a BPF file system that holds what outlives the process.
//!
//! ```text
//! ROOT/state            layout version and the next free number
//! ROOT/maps/NAME        the maps; NAME_N since the layout N in which their entries got another form
//! ROOT/links/N_PROGRAM  TCX links of the interface with index N
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData, MapError};
use keelson_ebpf_common::{LAYOUT_VERSION, OLDEST_LAYOUT};
use rustix::fs::{CWD, FlockOperation, statfs};
use rustix::mount::{MountFlags, mount};

use crate::error::DatapathError;
use crate::migration;

/// Where every distribution mounts the BPF file system.
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: rustix::fs::FsWord = 0xcafe_4a11;
const STATE: &str = "state";
const STATE_ENTRIES: u32 = 8;
const LAYOUT_SLOT: u32 = 0;
const NEXT_NUMBER_SLOT: u32 = 1;

/// An open pin root; no other process can have it open.
pub struct PinRoot {
    path: PathBuf,
    state: Array<MapData, u64>,
    layout: u64,
    _lock: File,
}

impl PinRoot {
    /// Opens or creates the folder, mounting the BPF file system if there is none.
    pub fn open(path: &Path) -> Result<Self, DatapathError> {
        ensure_bpffs(path)?;
        for folder in [path.to_owned(), path.join("maps"), path.join("links")] {
            fs::create_dir_all(&folder).map_err(pin_error("create the folder", &folder))?;
        }
        let lock = lock(path)?;
        let (state, layout) = open_state(path)?;
        Ok(Self {
            path: path.to_owned(),
            state,
            layout,
            _lock: lock,
        })
    }

    /// The file of a map in the layout of this program.
    pub fn map(&self, name: &str) -> PathBuf {
        self.map_of_layout(name, migration::formed_in(name))
    }

    /// The file of a map whose entries have had their form since a layout.
    pub fn map_of_layout(&self, name: &str, formed_in: u64) -> PathBuf {
        let maps = self.path.join("maps");
        match formed_in {
            0 => maps.join(name),
            layout => maps.join(format!("{name}_{layout}")),
        }
    }

    /// Removes the files of maps other than these.
    pub fn remove_maps_except(&self, wanted: &[PathBuf]) -> Result<(), DatapathError> {
        let folder = self.path.join("maps");
        let entries: Result<Vec<_>, _> = fs::read_dir(&folder).and_then(Iterator::collect);
        for entry in entries.map_err(pin_error("read the folder", &folder))? {
            if !wanted.contains(&entry.path()) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// The layout whose maps count.
    pub fn layout(&self) -> u64 {
        self.layout
    }

    /// Makes the maps of a layout those that count.
    pub fn set_layout(&mut self, layout: u64) -> Result<(), DatapathError> {
        self.state
            .set(LAYOUT_SLOT, layout, 0)
            .map_err(DatapathError::map("write", STATE))?;
        self.layout = layout;
        Ok(())
    }

    /// The file of a TCX link.
    pub fn link(&self, ifindex: u32, program: &str) -> PathBuf {
        self.path.join("links").join(format!("{ifindex}_{program}"))
    }

    /// The indexes of interfaces that have a pinned link.
    pub fn linked_interfaces(&self) -> Result<Vec<u32>, DatapathError> {
        let folder = self.path.join("links");
        let error = pin_error("read the folder", &folder);
        let names: Result<Vec<_>, _> = fs::read_dir(&folder)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect());
        let mut indexes: Vec<u32> = names
            .map_err(error)?
            .iter()
            .filter_map(|name| name.to_str()?.split_once('_')?.0.parse().ok())
            .collect();
        indexes.sort_unstable();
        indexes.dedup();
        Ok(indexes)
    }

    /// Reserves `count` numbers that were never given out; returns the first. They are never zero.
    pub fn reserve_numbers(&mut self, count: u32) -> Result<u32, DatapathError> {
        let first = self
            .state
            .get(&NEXT_NUMBER_SLOT, 0)
            .map_err(DatapathError::map("read", STATE))?
            .max(1);
        let next = first + u64::from(count);
        let (Ok(first), Ok(_)) = (u32::try_from(first), u32::try_from(next)) else {
            return Err(DatapathError::Full { map: STATE });
        };
        self.state
            .set(NEXT_NUMBER_SLOT, next, 0)
            .map_err(DatapathError::map("write", STATE))?;
        Ok(first)
    }
}

/// Removes a pinned file; that it isn't there is fine.
pub fn remove(path: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(pin_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn pin_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DatapathError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => DatapathError::NotPermitted {
            action: format!("to {action} {}", path.display()),
        },
        _ => DatapathError::Pin {
            action,
            path,
            source,
        },
    }
}

fn ensure_bpffs(root: &Path) -> Result<(), DatapathError> {
    if is_bpffs(root) {
        return Ok(());
    }
    let unavailable = |problem: String| DatapathError::BpffsUnavailable {
        path: root.to_owned(),
        problem,
    };
    if !root.starts_with(BPFFS) {
        return Err(unavailable("the folder is in another file system".into()));
    }
    match mount("bpf", BPFFS, "bpf", MountFlags::empty(), c"mode=0700") {
        Ok(()) => {
            tracing::info!(path = BPFFS, "mounted the BPF file system");
            Ok(())
        }
        Err(error @ (rustix::io::Errno::PERM | rustix::io::Errno::ACCESS)) => Err(unavailable(
            format!("mounting it is not permitted ({error})"),
        )),
        Err(error) => Err(unavailable(format!("mounting it failed ({error})"))),
    }
}

/// Whether the folder, or the nearest parent that exists, is in a BPF file system.
fn is_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find_map(|ancestor| statfs(ancestor).ok())
        .is_some_and(|statistics| statistics.f_type == BPF_FS_MAGIC)
}

fn lock(root: &Path) -> Result<File, DatapathError> {
    let folder = rustix::fs::openat(
        CWD,
        root,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .map_err(|error| pin_error("open the folder", root)(error.into()))?;
    match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(folder.into()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DatapathError::InUse {
            path: root.to_owned(),
        }),
        Err(error) => Err(pin_error("lock the folder", root)(error.into())),
    }
}

/// Opens the state map and checks the layout; creates it if the root is new.
fn open_state(root: &Path) -> Result<(Array<MapData, u64>, u64), DatapathError> {
    let path = root.join(STATE);
    if path.exists() {
        let state = MapData::from_pin(&path)
            .and_then(Map::from_map_data)
            .and_then(Array::<MapData, u64>::try_from)
            .map_err(DatapathError::map("open", STATE))?;
        let found = state
            .get(&LAYOUT_SLOT, 0)
            .map_err(DatapathError::map("read", STATE))?;
        if !(OLDEST_LAYOUT..=LAYOUT_VERSION).contains(&found) {
            return Err(DatapathError::LayoutMismatch {
                path: root.to_owned(),
                found,
                expected: LAYOUT_VERSION,
            });
        }
        return Ok((state, found));
    }
    let mut state = Array::<MapData, u64>::create(STATE_ENTRIES, 0).map_err(create_error)?;
    // Pinned only when it is complete: a crash before leaves no half state.
    state
        .set(LAYOUT_SLOT, LAYOUT_VERSION, 0)
        .and_then(|()| state.set(NEXT_NUMBER_SLOT, 1, 0))
        .map_err(DatapathError::map("write", STATE))?;
    state.pin(&path).map_err(|error| DatapathError::Load {
        what: format!("the pinned map {}", path.display()),
        problem: error.to_string(),
    })?;
    let state = MapData::from_pin(&path)
        .and_then(Map::from_map_data)
        .and_then(Array::<MapData, u64>::try_from)
        .map_err(DatapathError::map("open", STATE))?;
    Ok((state, LAYOUT_VERSION))
}

/// Creating the state map is the first use of the bpf system call: here it shows whether we may.
fn create_error(error: MapError) -> DatapathError {
    let MapError::CreateError { io_error, .. } = &error else {
        return DatapathError::map("create", STATE)(error);
    };
    match io_error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => DatapathError::NotPermitted {
            action: "to create a BPF map".into(),
        },
        Some(libc::ENOSYS) => DatapathError::BpfUnavailable,
        _ => DatapathError::map("create", STATE)(error),
    }
}
