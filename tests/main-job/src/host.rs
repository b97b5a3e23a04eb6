//! The agent under show and its client.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::network_show;

/// How long anything of the show may take: a guest that boots on emulated nested KVM, above all.
const LIMIT: Duration = Duration::from_mins(2);
/// Every look starts a program, which an emulated host does slowly.
const INTERVAL: Duration = Duration::from_millis(200);

/// A host agent with folders of its own, as a service of the host would run it.
#[derive(Debug)]
pub struct Host {
    programs: PathBuf,
    folder: PathBuf,
    pins: PathBuf,
    agent: Option<Child>,
}

impl Host {
    /// A host in `folder` whose state is in the store at the URL `state`, with the programs that
    /// stand beside this one.
    pub fn new(folder: &Path, state: &str) -> Result<Self> {
        let own = std::env::current_exe().context("find the own program file")?;
        let programs = own
            .parent()
            .context("the own program file has no folder")?
            .to_owned();
        let pins = PathBuf::from(format!("/sys/fs/bpf/keelson-run-{}", std::process::id()));
        let config = format!(
            "state = \"{state}\"\nsocket = \"{0}/run/keelsond.sock\"\n\
             run_directory = \"{0}/run\"\nlog_directory = \"{0}/log\"\nbpf_directory = \"{1}\"\n",
            folder.display(),
            pins.display()
        );
        std::fs::write(folder.join("keelsond.toml"), config).context("write keelsond.toml")?;
        Ok(Self {
            programs,
            folder: folder.into(),
            pins,
            agent: None,
        })
    }

    /// Starts the agent and waits until it answers.
    pub fn start_agent(&mut self) -> Result<u32> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("keelsond.log"))?;
        let child = Command::new(self.programs.join("keelsond"))
            .arg("--config")
            .arg(self.folder.join("keelsond.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start keelsond")?;
        let process_id = child.id();
        let mut agent = child;
        let answers = until("the agent answers", || {
            if let Some(status) = agent.try_wait()? {
                bail!("it ended with {status}");
            }
            Ok(self.keelson(&["host"]).is_ok())
        });
        self.agent = Some(agent);
        if let Err(error) = answers {
            let log = std::fs::read_to_string(self.folder.join("keelsond.log")).unwrap_or_default();
            bail!(
                "{error}; it says: {}",
                log.lines()
                    .find(|line| line.starts_with("keelsond:"))
                    .unwrap_or("nothing")
            );
        }
        Ok(process_id)
    }

    /// Kills the agent as a crash would (SIGKILL).
    pub fn kill_agent(&mut self) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().context("kill keelsond")?;
            agent.wait().context("wait for keelsond")?;
        }
        Ok(())
    }

    /// Kills the keelson-blk of the guest's disk `data` as a crash would, and waits for the next
    /// one; the process ids of both.
    pub fn kill_disk_backend(&self) -> Result<(u64, u64)> {
        let record = self.folder.join("run/vms/web/data.disk.process");
        let process = || {
            let record: Value = serde_json::from_slice(&std::fs::read(&record)?)?;
            let process = record.pointer("/process_id").and_then(Value::as_u64);
            process.context("no process id on record")
        };
        let before = process()?;
        let id = rustix::process::Pid::from_raw(i32::try_from(before)?);
        let id = id.context("no process id")?;
        rustix::process::kill_process(id, rustix::process::Signal::KILL)
            .context("kill keelson-blk")?;
        let mut after = before;
        until("keelson-blk is started again", || {
            after = process().unwrap_or(before);
            Ok(after != before)
        })?;
        Ok((before, after))
    }

    /// Runs `keelson-blk` with these arguments; its output.
    pub fn keelson_blk(&self, arguments: &[&std::ffi::OsStr]) -> Result<String> {
        let output = Command::new(self.programs.join("keelson-blk"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("run keelson-blk")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs the command line client; its output.
    pub fn keelson(&self, arguments: &[&str]) -> Result<String> {
        let output = self
            .client()
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("run keelson")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A command of the client, for what is not over at once.
    pub fn client(&self) -> Command {
        let mut command = Command::new(self.programs.join("keelson"));
        command.env("KEELSON_SOCKET", self.folder.join("run/keelsond.sock"));
        command
    }

    /// Runs the client with `-o json`; what it says.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let arguments = [arguments, &["-o", "json"]].concat();
        serde_json::from_str(&self.keelson(&arguments)?).context("keelson's JSON")
    }

    /// Waits until the guest's console said `text`; the line.
    pub fn console_line(&self, guest: &str, text: &str) -> Result<String> {
        let mut line = None;
        until(&format!("the guest says {text:?}"), || {
            let log = self.keelson(&["logs", guest]).unwrap_or_default();
            // The last line may be on its way.
            let log = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(failed) = log.lines().find(|line| line.contains("FAIL")) {
                bail!("the guest says: {failed}");
            }
            line = log
                .lines()
                .find(|line| line.contains(text))
                .map(str::to_owned);
            Ok(line.is_some())
        })?;
        line.context("no line")
    }

    /// Packets that the guest's first interface dropped in a direction, for a reason.
    pub fn dropped(&self, guest: &str, direction: &str, reason: &str) -> Result<u64> {
        let counters = self.json(&["net", "counters", guest])?;
        let path = format!("/0/{direction}/dropped/{reason}/packets");
        Ok(counters.pointer(&path).and_then(Value::as_u64).unwrap_or(0))
    }
}

/// Waits until something holds.
pub fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while started.elapsed() < LIMIT {
        if holds()? {
            return Ok(());
        }
        std::thread::sleep(INTERVAL);
    }
    bail!("waited {LIMIT:?} in vain until {what}")
}

impl Drop for Host {
    fn drop(&mut self) {
        // Best effort at the end of a show: its guests first, then the agent, then the pins.
        for guest in ["web"].into_iter().chain(network_show::GUESTS) {
            let _ = self.keelson(&["stop", guest, "--force"]);
        }
        let _ = self.kill_agent();
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}
