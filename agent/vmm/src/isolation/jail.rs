//! The jail: mount, network, IPC and host name namespaces, a root with nothing but the guest's own
//! files, Landlock, and an unprivileged user.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use keelson_isolation::AllowedPaths;
use rustix::fs::CWD;
use rustix::mount::MountPropagationFlags;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, mount_remount,
    move_mount, open_tree, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::IsolationError;
use super::supervisor::SupervisorLife;

/// Where the new root is put together; only this process sees it there.
const STAGE: &str = "/tmp";
/// The new root itself holds folders and mount points.
const ROOT_OPTIONS: &std::ffi::CStr = c"size=1m,nr_inodes=4096,mode=755";

/// The user and group that the process becomes: `UID:GID`, neither of them root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JailUser {
    /// The user id.
    pub user: u32,
    /// The group id.
    pub group: u32,
}

impl FromStr for JailUser {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let id = |text: &str| {
            text.parse::<u32>()
                .ok()
                .filter(|id| (1..u32::MAX).contains(id))
        };
        text.split_once(':')
            .and_then(|(user, group)| {
                Some(Self {
                    user: id(user)?,
                    group: id(group)?,
                })
            })
            .ok_or_else(|| format!("`{text}` is not UID:GID, two numbers from 1 to 4294967294"))
    }
}

/// What the process may reach in its jail.
#[derive(Debug)]
pub struct Jail {
    user: JailUser,
    /// By path, whether it may be written.
    paths: BTreeMap<PathBuf, bool>,
}

impl Jail {
    /// A jail with nothing in it.
    pub const fn new(user: JailUser) -> Self {
        Self {
            user,
            paths: BTreeMap::new(),
        }
    }

    /// A file or folder that may be read.
    pub fn allow_read(&mut self, path: &Path) -> &mut Self {
        self.paths.entry(path.into()).or_insert(false);
        self
    }

    /// A folder that may be written.
    pub fn allow_write(&mut self, path: &Path) -> &mut Self {
        self.paths.insert(path.into(), true);
        self
    }

    /// Enters it, for good, or until its supervisor ends. The process has one thread.
    ///
    /// # Errors
    /// Without the rights, or if a path isn't there. The process is then of no more use.
    pub fn enter(&self, supervisor: Option<&SupervisorLife>) -> Result<(), IsolationError> {
        let paths = self.resolved()?;
        let flags = UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS;
        // SAFETY: the descriptors stay shared with nobody: there is one thread.
        unsafe { unshare_unsafe(flags) }
            .map_err(IsolationError::jail("make the jail's namespaces"))?;
        change_root(&paths)?;
        self.drop_rights()?;
        // The change of the user forgot it.
        supervisor
            .map_or(Ok(()), SupervisorLife::end_with_it)
            .map_err(|source| IsolationError::Jail {
                step: "end with the supervisor",
                source,
            })?;
        restrict_files(&paths)
    }

    /// The paths without symbolic links, for within the jail there is nothing to follow.
    fn resolved(&self) -> Result<BTreeMap<PathBuf, bool>, IsolationError> {
        let mut resolved = BTreeMap::new();
        for (path, write) in &self.paths {
            let real = fs::canonicalize(path).map_err(failed(path))?;
            let absolute = std::path::absolute(path).map_err(failed(path))?;
            if real != absolute {
                // The guest's configuration has the path as it was given.
                let source = io::Error::other(format!(
                    "it is a symbolic link: name what it stands for, {}",
                    real.display()
                ));
                return Err(failed(path)(source));
            }
            let entry = resolved.entry(real).or_insert(false);
            *entry |= *write;
        }
        Ok(resolved)
    }

    fn drop_rights(&self) -> Result<(), IsolationError> {
        let JailUser { user, group } = self.user;
        let check = |step, result: libc::c_int| {
            if result == 0 {
                return Ok(());
            }
            Err(IsolationError::Jail {
                step,
                source: io::Error::last_os_error(),
            })
        };
        // SAFETY: no groups are read.
        check("leave the groups", unsafe {
            libc::setgroups(0, std::ptr::null())
        })?;
        // SAFETY: no memory is involved.
        check("change the group", unsafe {
            libc::setresgid(group, group, group)
        })?;
        // SAFETY: as above. Changing from root drops all capabilities.
        check("change the user", unsafe {
            libc::setresuid(user, user, user)
        })?;
        // SAFETY: prctl with these constants touches no memory.
        check("give up new rights", unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        })
    }
}

/// Makes a root that holds `paths` alone, at the places where they were.
fn change_root(paths: &BTreeMap<PathBuf, bool>) -> Result<(), IsolationError> {
    let propagation = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", propagation).map_err(IsolationError::jail("make the mounts private"))?;
    // Cloned first, so that the new root may hide them.
    let mut trees = Vec::with_capacity(paths.len());
    for (path, write) in paths {
        // What is in a folder of the jail is there with it.
        let covered = paths.iter().any(|(other, other_write)| {
            path != other && path.starts_with(other) && write == other_write
        });
        if covered {
            continue;
        }
        let tree = open_tree(
            CWD,
            path,
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )
        .map_err(|e| failed(path)(e.into()))?;
        trees.push((
            path,
            *write,
            fs::metadata(path).map_err(failed(path))?.is_dir(),
            tree,
        ));
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("jail", STAGE, "tmpfs", flags, Some(ROOT_OPTIONS))
        .map_err(IsolationError::jail("make the jail's root"))?;
    for (path, write, is_folder, tree) in &trees {
        place(path, *write, *is_folder, tree)?;
    }
    rustix::process::chdir(STAGE).map_err(IsolationError::jail("enter the jail's root"))?;
    rustix::process::pivot_root(".", ".").map_err(IsolationError::jail("change the root"))?;
    // The old root is on top of the new one now.
    unmount(".", UnmountFlags::DETACH).map_err(IsolationError::jail("leave the old root"))?;
    rustix::process::chdir("/").map_err(IsolationError::jail("enter the jail's root"))?;
    mount_remount("/", flags | MountFlags::RDONLY, c"")
        .map_err(IsolationError::jail("make the jail's root read-only"))
}

fn place(path: &Path, write: bool, is_folder: bool, tree: &OwnedFd) -> Result<(), IsolationError> {
    let inside = path.strip_prefix("/").unwrap_or(path);
    let target = Path::new(STAGE).join(inside);
    if is_folder {
        fs::create_dir_all(&target).map_err(failed(path))?;
    } else {
        let parent = target.parent().unwrap_or(Path::new(STAGE));
        fs::create_dir_all(parent).map_err(failed(path))?;
        if !target.exists() {
            fs::File::create(&target).map_err(failed(path))?;
        }
    }
    move_mount(
        tree,
        "",
        CWD,
        &target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(|e| failed(path)(e.into()))?;
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if !write {
        flags |= MountFlags::RDONLY;
    }
    mount_remount(&target, flags, c"").map_err(|e| failed(path)(e.into()))
}

/// The same once more by Landlock, which holds even where a mount could be escaped.
fn restrict_files(paths: &BTreeMap<PathBuf, bool>) -> Result<(), IsolationError> {
    let mut allowed = AllowedPaths::default();
    for (path, write) in paths {
        if *write {
            allowed.allow(path);
        } else {
            allowed.allow_read(path);
        }
    }
    allowed.enforce().map(drop).map_err(IsolationError::Files)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> IsolationError {
    let path = path.to_owned();
    move |source| IsolationError::Path { path, source }
}
