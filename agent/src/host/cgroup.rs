//! Control groups of guests' processes, apart from the agent's own, so that stopping the agent
//! leaves them running.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{AgentError, error::Result};

/// The group of all guests, under systemd a slice.
const SLICE: &str = "keelson-guests.slice";

/// Who keeps the host's control groups.
#[derive(Clone, Debug)]
pub enum GroupKeeper {
    /// systemd: each process gets a transient scope of its own.
    Systemd,
    /// Nobody: each process gets a group under this cgroup v2 mount.
    Cgroup2(PathBuf),
    /// There is no writable cgroup v2; processes stay in the agent's group.
    None,
}

impl GroupKeeper {
    /// Looks at what runs as the host's first process and what is mounted.
    pub fn detect() -> Self {
        // sd_booted(3)
        if Path::new("/run/systemd/system").is_dir() {
            return Self::Systemd;
        }
        cgroup2_mount().map_or(Self::None, Self::Cgroup2)
    }

    /// The command that starts `program` in its own group where systemd is to make that, with the
    /// program's process replacing the command's.
    pub fn wrap(&self, unit: &str, program: &Path) -> (PathBuf, Vec<OsString>) {
        match self {
            Self::Systemd => {
                let arguments = [
                    "--scope",
                    "--quiet",
                    "--collect",
                    "--slice",
                    SLICE,
                    "--unit",
                ];
                let mut arguments: Vec<OsString> = arguments.map(Into::into).into();
                arguments.push(format!("{unit}.scope").into());
                arguments.push("--".into());
                arguments.push(program.into());
                ("systemd-run".into(), arguments)
            }
            Self::Cgroup2(_) | Self::None => (program.into(), Vec::new()),
        }
    }

    /// Puts a process that was just started into its own group, where systemd did not.
    pub fn place(&self, unit: &str, process_id: u32) -> Result<()> {
        let Self::Cgroup2(mount) = self else {
            return Ok(());
        };
        let group = mount.join(SLICE).join(format!("{unit}.scope"));
        let what = || format!("put process {process_id} into {}", group.display());
        fs::create_dir_all(&group).map_err(AgentError::io(what()))?;
        fs::write(group.join("cgroup.procs"), process_id.to_string())
            .map_err(AgentError::io(what()))
    }

    /// Removes the group of a process that has ended. systemd does it by itself.
    pub fn remove(&self, unit: &str) {
        if let Self::Cgroup2(mount) = self {
            // A group that is still in use or gone already is no harm.
            let _ = fs::remove_dir(mount.join(SLICE).join(format!("{unit}.scope")));
        }
    }
}

/// Where cgroup v2 is mounted writable (proc_pid_mounts(5)).
fn cgroup2_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        let writable = options.split(',').any(|option| option == "rw");
        (kind == "cgroup2" && writable).then(|| path.into())
    })
}
