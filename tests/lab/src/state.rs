use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use crate::LabError;
use crate::error::file;

/// What another process needs to talk to a running lab: `lab.json` in its state folder, readable
/// by its owner only, because the token in it is the right to run commands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabState {
    /// QEMU's process.
    pub process_id: u32,
    /// That process's start time in clock ticks, so that a reused id is not taken for it.
    pub process_start: u64,
    /// Control port on 127.0.0.1.
    pub port: u16,
    /// What [`Hello`](crate::protocol::Kind::Hello) must carry.
    pub token: String,
    /// Series of the lab's kernel.
    pub kernel: String,
    /// QEMU's and the lab's console output.
    pub console: PathBuf,
}

impl LabState {
    const FILE: &str = "lab.json";

    /// Reads the state of the lab in a folder, if its process still runs.
    pub fn read(folder: &Path) -> Result<Self, LabError> {
        let path = folder.join(Self::FILE);
        let not_up = || LabError::NotUp {
            folder: folder.to_path_buf(),
        };
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(not_up()),
            Err(error) => return Err(file("read", &path)(error)),
        };
        let state: Self =
            serde_json::from_slice(&text).map_err(|error| file("read", &path)(error.into()))?;
        if state.is_running() {
            Ok(state)
        } else {
            Err(not_up())
        }
    }

    pub(crate) fn write(&self, folder: &Path) -> Result<(), LabError> {
        let path = folder.join(Self::FILE);
        let scratch = tempfile::NamedTempFile::new_in(folder).map_err(file("write", &path))?;
        serde_json::to_writer(&scratch, self)
            .map_err(|error| file("write", &path)(error.into()))?;
        scratch
            .persist(&path)
            .map_err(|error| file("write", &path)(error.error))?;
        Ok(())
    }

    pub(crate) fn remove(folder: &Path) {
        // A state file without its process counts as none: failing to remove it changes nothing.
        let _ignored = std::fs::remove_file(folder.join(Self::FILE));
    }

    /// Whether the process is there and is the one that was started.
    pub fn is_running(&self) -> bool {
        process_start(self.process_id) == Some(self.process_start)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process_id).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|_pid| self.is_running()) {
            // It may end between the check and the signal; then there is nothing left to do.
            let _ended = rustix::process::kill_process(pid, signal);
        }
    }
}

/// Field 22 of /proc/PID/stat (proc_pid_stat(5)); `None` if there is no such process, or only its
/// exit status is left.
pub(crate) fn process_start(process_id: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process_id}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may hold spaces.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(process_start: u64) -> LabState {
        LabState {
            process_id: std::process::id(),
            process_start,
            port: 1,
            token: String::new(),
            kernel: "6.12".into(),
            console: PathBuf::new(),
        }
    }

    #[test]
    fn a_reused_process_id_is_not_the_lab() {
        let folder = tempfile::tempdir().unwrap();
        let start = process_start(std::process::id()).unwrap();
        state(start).write(folder.path()).unwrap();
        assert_eq!(LabState::read(folder.path()).unwrap(), state(start));
        state(start + 1).write(folder.path()).unwrap();
        assert!(matches!(
            LabState::read(folder.path()),
            Err(LabError::NotUp { .. })
        ));
    }
}
