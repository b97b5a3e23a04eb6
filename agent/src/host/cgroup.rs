//! Control groups of guests' processes, apart from the agent's own, so that stopping the agent
//! leaves them running.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use keelson_api::{CpuAmount, MemorySize, ResourceLimits};

use crate::{AgentError, error::Result};

/// The period of `cpu.max`, in microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;
/// The group of all guests, under systemd a slice.
const SLICE: &str = "keelson-guests.slice";

/// Who keeps the host's control groups.
#[derive(Clone, Debug)]
pub enum GroupKeeper {
    /// systemd: each process gets a transient scope of its own.
    Systemd,
    /// Nobody: each process gets groups of its own under these mounts.
    Mounts(GroupMounts),
    /// There is no writable cgroup v2; processes stay in the agent's group.
    None,
}

/// Where control groups are mounted writable.
#[derive(Clone, Debug)]
pub struct GroupMounts {
    unified: PathBuf,
    /// Controllers that are still on cgroup v1, with the agent's own group there: what limits the agent
    /// limits its guests as well.
    legacy: Vec<(Controller, PathBuf)>,
}

/// What keeps a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Controller {
    Cpu,
    Memory,
}

impl Controller {
    const ALL: [Self; 2] = [Self::Cpu, Self::Memory];

    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
        }
    }

    fn is_wanted(self, limits: &ResourceLimits) -> bool {
        match self {
            Self::Cpu => limits.cpu.is_some(),
            Self::Memory => limits.memory.is_some(),
        }
    }

    /// The file of cgroup v2, and what is written to it.
    fn unified(self, limits: &ResourceLimits) -> (&'static str, String) {
        let value = match self {
            Self::Cpu => limits.cpu.map(quota_us),
            Self::Memory => limits.memory.map(MemorySize::bytes),
        };
        let value = value.map_or("max".into(), |value| value.to_string());
        match self {
            Self::Cpu => ("cpu.max", format!("{value} {PERIOD_US}")),
            Self::Memory => ("memory.max", value),
        }
    }

    /// The file of cgroup v1, whose period is the same unless somebody changes it.
    fn legacy(self, limits: &ResourceLimits) -> (&'static str, String) {
        let (file, value) = match self {
            Self::Cpu => ("cpu.cfs_quota_us", limits.cpu.map(quota_us)),
            Self::Memory => (
                "memory.limit_in_bytes",
                limits.memory.map(MemorySize::bytes),
            ),
        };
        (file, value.map_or("-1".into(), |value| value.to_string()))
    }
}

fn quota_us(cpu: CpuAmount) -> u64 {
    u64::from(cpu.millicpus()) * PERIOD_US / 1000
}

impl GroupKeeper {
    /// Looks at what runs as the host's first process and what is mounted.
    pub fn detect() -> Self {
        // sd_booted(3)
        if Path::new("/run/systemd/system").is_dir() {
            return Self::Systemd;
        }
        GroupMounts::find().map_or(Self::None, Self::Mounts)
    }

    /// The command that starts `program` in its own group where systemd is to make that, with the
    /// program's process replacing the command's.
    pub fn wrap(
        &self,
        unit: &str,
        program: &Path,
        limits: &ResourceLimits,
    ) -> (PathBuf, Vec<OsString>) {
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
                for property in properties(limits) {
                    arguments.push("--property".into());
                    arguments.push(property.into());
                }
                arguments.push("--".into());
                arguments.push(program.into());
                ("systemd-run".into(), arguments)
            }
            Self::Mounts(_) | Self::None => (program.into(), Vec::new()),
        }
    }

    /// Puts a process that was just started into its own group, where systemd did not.
    ///
    /// # Errors
    /// Where the group can't be made, or there is nobody to keep the limits.
    pub fn place(&self, unit: &str, process_id: u32, limits: &ResourceLimits) -> Result<()> {
        match self {
            Self::Systemd => Ok(()),
            Self::Mounts(mounts) => mounts.place(unit, process_id, limits),
            Self::None if *limits == ResourceLimits::default() => Ok(()),
            Self::None => Err(nobody(unit)),
        }
    }

    /// Changes the limits of a process that runs.
    ///
    /// # Errors
    /// Where the group is gone, or there is nobody to keep the limits.
    pub fn change(&self, unit: &str, limits: &ResourceLimits) -> Result<()> {
        match self {
            Self::None => Err(nobody(unit)),
            Self::Mounts(mounts) => mounts.limit(unit, limits),
            Self::Systemd => {
                let what = || format!("change the limits of {unit}.scope");
                let output = Command::new("systemctl")
                    .args(["set-property", "--runtime", &format!("{unit}.scope")])
                    .args(properties(limits))
                    .output()
                    .map_err(AgentError::io(what()))?;
                if output.status.success() {
                    return Ok(());
                }
                let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                Err(AgentError::io(what())(io::Error::other(said)))
            }
        }
    }

    /// Removes the group of a process that has ended. systemd does it by itself.
    pub fn remove(&self, unit: &str) {
        if let Self::Mounts(mounts) = self {
            for mount in mounts.all() {
                // A group that is still in use or gone already is no harm.
                let _ = fs::remove_dir(group(mount, unit));
            }
        }
    }
}

impl GroupMounts {
    fn find() -> Option<Self> {
        let mut legacy = Vec::new();
        for controller in Controller::ALL {
            let mount = find_mount("cgroup", Some(controller.name()));
            legacy.extend(mount.map(|mount| (controller, own_group(&mount, controller))));
        }
        Some(Self {
            unified: find_mount("cgroup2", None)?,
            legacy,
        })
    }

    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        let legacy = self.legacy.iter().map(|(_, mount)| mount);
        legacy.chain([&self.unified])
    }

    /// Puts a process into groups of its own; in those of cgroup v1 also if it is not limited now, for
    /// what it starts can't be moved later.
    fn place(&self, unit: &str, process_id: u32, limits: &ResourceLimits) -> Result<()> {
        for mount in self.all() {
            let group = group(mount, unit);
            let what = format!("create {}", group.display());
            fs::create_dir_all(&group).map_err(AgentError::io(what))?;
        }
        if *limits != ResourceLimits::default() {
            self.limit(unit, limits)?;
        }
        for mount in self.all() {
            let group = group(mount, unit);
            let what = format!("put process {process_id} into {}", group.display());
            fs::write(group.join("cgroup.procs"), process_id.to_string())
                .map_err(AgentError::io(what))?;
        }
        Ok(())
    }

    /// Writes the limits of a group.
    fn limit(&self, unit: &str, limits: &ResourceLimits) -> Result<()> {
        for controller in Controller::ALL {
            let mut legacy = self.legacy.iter();
            let (mount, (file, value)) =
                if let Some((_, mount)) = legacy.find(|(known, _)| *known == controller) {
                    (mount, controller.legacy(limits))
                } else {
                    match self.enable(controller) {
                        Err(_) if !controller.is_wanted(limits) => continue,
                        enabled => enabled?,
                    }
                    (&self.unified, controller.unified(limits))
                };
            let path = group(mount, unit).join(file);
            let what = format!("write {value:?} to {}", path.display());
            fs::write(&path, value).map_err(AgentError::io(what))?;
        }
        Ok(())
    }

    /// Lets groups below the slice have a controller of cgroup v2.
    fn enable(&self, controller: Controller) -> Result<()> {
        let name = controller.name();
        for group in [self.unified.clone(), self.unified.join(SLICE)] {
            let path = group.join("cgroup.subtree_control");
            let enabled = fs::read_to_string(&path).unwrap_or_default();
            if enabled.split_whitespace().any(|enabled| enabled == name) {
                continue;
            }
            let what = format!("let groups below {} limit their {name}", group.display());
            fs::write(&path, format!("+{name}")).map_err(AgentError::io(what))?;
        }
        Ok(())
    }
}

fn group(mount: &Path, unit: &str) -> PathBuf {
    mount.join(SLICE).join(format!("{unit}.scope"))
}

/// The limits as systemd has them (systemd.resource-control(5)).
fn properties(limits: &ResourceLimits) -> [String; 2] {
    let percent = |millicpus: u32| format!("{}.{}%", millicpus / 10, millicpus % 10);
    let cpu = limits.cpu.map(|cpu| percent(cpu.millicpus()));
    let memory = limits.memory.map(|memory| memory.bytes().to_string());
    [
        format!("CPUQuota={}", cpu.unwrap_or_default()),
        format!("MemoryMax={}", memory.unwrap_or("infinity".into())),
    ]
}

fn nobody(unit: &str) -> AgentError {
    AgentError::Host(format!(
        "spec.limits of {unit}: there is neither systemd nor a writable cgroup v2 to keep them"
    ))
}

/// The agent's own group under a mount of cgroup v1 (proc_pid_cgroup(5)).
fn own_group(mount: &Path, controller: Controller) -> PathBuf {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let has = controllers.split(',').any(|name| name == controller.name());
        has.then(|| path.trim_start_matches('/').to_owned())
    });
    mount.join(own.unwrap_or_default())
}

/// Where a file system of control groups is mounted writable (proc_pid_mounts(5)), with this
/// controller.
fn find_mount(kind: &str, controller: Option<&str>) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, found, options) = (fields.next()?, fields.next()?, fields.next()?);
        let has = |wanted: &str| options.split(',').any(|option| option == wanted);
        (found == kind && has("rw") && controller.is_none_or(has)).then(|| path.into())
    })
}
