//! Processes that outlive the agent: started in groups of their own, recorded on disk, and found
//! again by a later agent.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use keelson_api::ResourceLimits;
use rustix::io::FdFlags;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use super::cgroup::GroupKeeper;
use super::launch::launch;
use crate::failpoint::failpoint;
use crate::fleet::LeaseCheck;
use crate::{AgentError, error::Result};

/// How much of a log's end is searched for its last line.
const TAIL_BYTES: usize = 4096;
/// How long a process that got SIGTERM may take.
const TERMINATE_LIMIT: Duration = Duration::from_secs(10);

/// What to start, and where to leave its traces.
#[derive(Clone, Debug)]
pub struct LaunchRequest {
    /// The program file.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// The name of its control group or scope.
    pub unit: String,
    /// The file for its output; the previous one moves to `<log>.1`.
    pub log: PathBuf,
    /// The file that lets a later agent find the process.
    pub record: PathBuf,
    /// What its control group keeps it to.
    pub limits: ResourceLimits,
    /// A descriptor that the program gets under its own number, beside the usual three.
    pub inherited: Option<Arc<OwnedFd>>,
    /// Without it the process runs whether or not the host has a lease.
    pub lease: Option<LeaseCheck>,
}

/// What tells a process from all others since the host booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ProcessRecord {
    /// Its process id, which another process may have later.
    pub process_id: u32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
    /// The name of its control group or scope.
    pub unit: String,
    /// The file of its output.
    pub log: PathBuf,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code; `None` where a signal ended it, or another agent was its parent.
    pub code: Option<i32>,
    /// The last line of its output, which is the reason where it failed.
    pub last_line: String,
}

/// A process of a guest that runs, or has ended and not been noticed yet.
#[derive(Clone, Debug)]
pub struct ProcessHandle {
    record: ProcessRecord,
    pidfd: Arc<AsyncFd<OwnedFd>>,
}

impl ProcessHandle {
    /// Starts a process and writes its record.
    pub fn launch(request: &LaunchRequest) -> Result<Self> {
        let what = || format!("start {}", request.program.display());
        if request.log.exists() {
            let mut previous = request.log.clone().into_os_string();
            previous.push(".1");
            fs::rename(&request.log, previous).map_err(AgentError::io(what()))?;
        }
        let log = File::create(&request.log)
            .map_err(AgentError::io(format!("create {}", request.log.display())))?;
        let errors = log.try_clone().map_err(AgentError::io(what()))?;
        let keeper = GroupKeeper::detect();
        let (program, mut arguments) =
            keeper.wrap(&request.unit, &request.program, &request.limits);
        arguments.extend(request.arguments.iter().cloned());
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // A terminal's signals to the agent are not meant for guests.
            .process_group(0);
        if let Some(descriptor) = request.inherited.clone() {
            // SAFETY: between fork and exec the closure makes one system call.
            unsafe {
                command.pre_exec(move || {
                    let none = FdFlags::empty();
                    Ok(rustix::io::fcntl_setfd(&*descriptor, none)?)
                });
            }
        }
        let mut launched = None;
        launch(command, |process_id| {
            failpoint(&request.unit, "forked");
            let record = ProcessRecord {
                process_id,
                start_time: start_time(process_id)?,
                unit: request.unit.clone(),
                log: request.log.clone(),
            };
            keeper
                .place(&request.unit, process_id, &request.limits)
                .map_err(io::Error::other)?;
            failpoint(&request.unit, "placed");
            write_atomically(&request.record, &record).map_err(io::Error::other)?;
            failpoint(&request.unit, "recorded");
            launched = Self::open(record).map_err(io::Error::other)?;
            // As late as can be: from here on the guard finds it by its record.
            match &request.lease {
                Some(lease) if !lease.holds() => {
                    Err(io::Error::other("this host's lease is not renewed"))
                }
                _ => Ok(()),
            }
        })
        .map_err(AgentError::io(what()))?;
        failpoint(&request.unit, "executed");
        launched.ok_or_else(|| AgentError::Process {
            reason: "ProcessEnded",
            message: format!("{} ended at once", request.program.display()),
        })
    }

    /// Finds the process of the record at `path`. `None` where there is no record; a process that
    /// is gone is an `Err` of how it ended.
    pub fn find(path: &Path) -> Result<Option<std::result::Result<Self, Exit>>> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(AgentError::io(format!("read {}", path.display()))(error));
            }
        };
        let record: ProcessRecord = serde_json::from_slice(&text)
            .map_err(|error| AgentError::io(format!("read {}", path.display()))(error.into()))?;
        let last_line = last_line(&record.log);
        let unit = record.unit.clone();
        Ok(Some(Self::open(record)?.ok_or_else(|| {
            // It ended while no agent was there to see it, so nobody has removed its group.
            GroupKeeper::detect().remove(&unit);
            Exit {
                code: None,
                last_line,
            }
        })))
    }

    fn open(record: ProcessRecord) -> Result<Option<Self>> {
        let what = || format!("watch process {}", record.process_id);
        let opened = record.open().map_err(AgentError::io(what()))?;
        let Some(pidfd) = opened else {
            return Ok(None);
        };
        // SAFETY: an OwnedFd owns its descriptor, which stays open until the AsyncFd drops it.
        let pidfd = unsafe { AsyncFd::register(pidfd) }
            .map_err(|error| AgentError::io(what())(error.into()))?;
        Ok(Some(Self {
            record,
            pidfd: Arc::new(pidfd),
        }))
    }

    /// Changes what its control group keeps it to.
    ///
    /// # Errors
    /// Where the host can't.
    pub fn limit(&self, limits: &ResourceLimits) -> Result<()> {
        GroupKeeper::detect().change(&self.record.unit, limits)
    }

    /// Its process id.
    pub fn process_id(&self) -> u32 {
        self.record.process_id
    }

    /// Waits until the process has ended.
    pub async fn ended(&self) -> Exit {
        // The only errors of the wait come with the runtime's end.
        let _ = self.pidfd.readable().await;
        self.exit()
    }

    /// How the process ended, if it has.
    pub fn has_ended(&self) -> Option<Exit> {
        let mut poll = [rustix::event::PollFd::new(
            self.pidfd.get_ref(),
            rustix::event::PollFlags::IN,
        )];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let ready = rustix::event::poll(&mut poll, Some(&now)).unwrap_or(0);
        (ready > 0).then(|| self.exit())
    }

    /// Asks the process to end, and kills it if it does not within 10 s.
    pub async fn terminate(&self) -> Exit {
        self.signal(Signal::TERM);
        match tokio::time::timeout(TERMINATE_LIMIT, self.ended()).await {
            Ok(exit) => exit,
            Err(_) => self.kill().await,
        }
    }

    /// Ends the process at once.
    pub async fn kill(&self) -> Exit {
        self.signal(Signal::KILL);
        self.ended().await
    }

    fn signal(&self, signal: Signal) {
        // A process that has ended needs no signal.
        let _ = pidfd_send_signal(self.pidfd.get_ref(), signal);
    }

    fn exit(&self) -> Exit {
        // Where another agent was the parent there is no code to be had (ECHILD).
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = waitid(
            WaitId::PidFd(rustix::fd::AsFd::as_fd(self.pidfd.get_ref())),
            options,
        );
        let code = status
            .ok()
            .flatten()
            .and_then(|status| status.exit_status());
        GroupKeeper::detect().remove(&self.record.unit);
        Exit {
            code,
            last_line: last_line(&self.record.log),
        }
    }

    /// Lets the kernel forget a process that has ended.
    pub fn reap(&self) {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let _ = waitid(
            WaitId::PidFd(rustix::fd::AsFd::as_fd(self.pidfd.get_ref())),
            options,
        );
        // What it had started may have been about to end when it was first tried.
        GroupKeeper::detect().remove(&self.record.unit);
    }
}

impl ProcessRecord {
    /// A descriptor of the process, unless it is gone.
    fn open(&self) -> io::Result<Option<OwnedFd>> {
        let pid = i32::try_from(self.process_id).ok().and_then(Pid::from_raw);
        let Some(pid) = pid else { return Ok(None) };
        let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Only after the descriptor is held can the id not be given to another process.
        let same = start_time(self.process_id).ok() == Some(self.start_time);
        Ok(same.then_some(pidfd))
    }
}

/// The process id of the record at `path`, unless the process is gone.
pub fn recorded_process(path: &Path) -> Option<u32> {
    let record: ProcessRecord = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    record.open().ok()?.map(|_| record.process_id)
}

/// Kills the process of the record at `path`; whether it was there. Without the agent's runtime.
pub fn kill_recorded(path: &Path) -> io::Result<bool> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let record: ProcessRecord = serde_json::from_slice(&text)?;
    let Some(pidfd) = record.open()? else {
        return Ok(false);
    };
    // One that has ended and was not waited for is not there any more, but for the kernel.
    let mut poll = [rustix::event::PollFd::new(
        &pidfd,
        rustix::event::PollFlags::IN,
    )];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    if rustix::event::poll(&mut poll, Some(&now))? > 0 {
        return Ok(false);
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Writes `value` as JSON to `path`, whole or not at all.
pub fn write_atomically<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let what = || format!("write {}", path.display());
    let text = serde_json::to_vec(value).map_err(|error| AgentError::io(what())(error.into()))?;
    let mut temporary = path.to_path_buf().into_os_string();
    temporary.push(".new");
    fs::write(&temporary, text).map_err(AgentError::io(what()))?;
    fs::rename(&temporary, path).map_err(AgentError::io(what()))
}

fn start_time(process_id: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{process_id}/stat"))?;
    // The second field is the program's name in parentheses, which may itself hold any character.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::other("/proc/PID/stat has no start time"))
}

fn last_line(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let tail = text
        .get(text.len().saturating_sub(TAIL_BYTES)..)
        .unwrap_or_default();
    let tail = String::from_utf8_lossy(tail);
    tail.lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty())
        .unwrap_or_default()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(directory: &Path, script: &str) -> LaunchRequest {
        LaunchRequest {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            unit: format!("keelson-test-{}", std::process::id()),
            log: directory.join("log"),
            record: directory.join("record"),
            limits: ResourceLimits::default(),
            inherited: None,
            lease: None,
        }
    }

    #[tokio::test]
    async fn a_process_is_found_again_by_its_record_until_it_ends() {
        let directory = tempfile::tempdir().unwrap();
        let request = request(directory.path(), "echo started; echo; sleep 100");
        let process = ProcessHandle::launch(&request).unwrap();
        let found = ProcessHandle::find(&request.record)
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(found.process_id(), process.process_id());
        assert_eq!(found.has_ended(), None);
        let exit = process.terminate().await;
        assert_eq!(exit.code, None);
        process.reap();
        assert!(
            ProcessHandle::find(&request.record)
                .unwrap()
                .unwrap()
                .is_err()
        );
    }

    #[tokio::test]
    async fn the_reason_of_a_failure_is_the_last_line() {
        let directory = tempfile::tempdir().unwrap();
        let script = "echo first; echo the reason >&2; exit 3";
        let process = ProcessHandle::launch(&request(directory.path(), script)).unwrap();
        let exit = process.ended().await;
        assert_eq!(
            exit,
            Exit {
                code: Some(3),
                last_line: "the reason".into()
            }
        );
    }

    #[tokio::test]
    async fn another_process_with_the_recorded_id_is_not_taken_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let record = ProcessRecord {
            process_id: std::process::id(),
            start_time: 1,
            unit: "none".into(),
            log: "/nonexistent".into(),
        };
        write_atomically(&path, &record).unwrap();
        assert!(ProcessHandle::find(&path).unwrap().unwrap().is_err());
    }
}
