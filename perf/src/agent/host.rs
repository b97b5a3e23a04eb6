//! A host with a real keelsond.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;
use tempfile::TempDir;

use super::client::Client;

/// A host with a real keelsond, whose guests and whose agent end with it.
pub struct Host {
    folder: TempDir,
    agent: Child,
}

impl Host {
    /// Starts an agent with folders of its own, in the calling thread's namespaces; `state` is the state
    /// store's URL, an embedded one where not given.
    pub fn start(
        keelsond: &Path,
        root: &Path,
        state: Option<&str>,
        more: &str,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("perf-agent-")
            .tempdir_in(root)?;
        let place = folder.path().display();
        let pins = Self::pins(folder.path());
        let embedded = format!("embedded:{place}/state");
        let state = state.unwrap_or(&embedded);
        let config = format!(
            "state = \"{state}\"\nsocket = \"{place}/run/keelsond.sock\"\nrun_directory = \"{place}/run\"\n\
             log_directory = \"{place}/log\"\nsnapshot_directory = \"{place}/snapshots\"\n\
             bpf_directory = \"{}\"\n{more}",
            pins.display()
        );
        std::fs::write(folder.path().join("keelsond.toml"), config)?;
        let log = File::create(folder.path().join("keelsond.log"))?;
        let agent = Command::new(keelsond)
            .arg("--config")
            .arg(folder.path().join("keelsond.toml"))
            .args(["--log", "warn"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", keelsond.display()))?;
        Ok(Self { folder, agent })
    }

    /// A client of the agent.
    pub fn client(&self) -> Client {
        Client::new(&self.folder.path().join("run/keelsond.sock"))
    }

    /// The agent.
    pub fn agent(&self) -> &Child {
        &self.agent
    }

    /// The processes of its guests.
    pub fn guests(&self) -> Vec<u32> {
        let place = self.folder.path().join("run/vms").display().to_string();
        let processes = processes_of(&place).into_iter();
        processes.filter_map(|id| id.try_into().ok()).collect()
    }

    /// Ends everything at once, as a loss of power does.
    pub fn crash(&mut self) {
        let place = self.folder.path().display().to_string();
        // The guard first: it is started again by an agent that lives.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        for id in processes_of(&place) {
            if let Some(id) = rustix::process::Pid::from_raw(id) {
                // It may have ended.
                let _ = rustix::process::kill_process(id, rustix::process::Signal::KILL);
            }
        }
    }

    fn pins(folder: &Path) -> PathBuf {
        let name = folder.file_name().unwrap_or_default();
        Path::new("/sys/fs/bpf").join(name)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.crash();
        // A file system of the namespace's own: it goes with that in any case.
        let _ = std::fs::remove_dir_all(Self::pins(self.folder.path()));
    }
}

/// The processes whose command line has this path.
fn processes_of(path: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&line).contains(path).then_some(id)
        })
        .collect()
}
