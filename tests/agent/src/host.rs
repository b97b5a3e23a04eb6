//! A host with its agent, and the command line client.

mod client;
mod machines;
mod said;
mod waiting;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keelson_vmm_tests::{Namespaces, binary, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

pub use self::said::Said;

/// How long an agent may take to say why it doesn't start.
const REFUSAL_LIMIT: Duration = Duration::from_mins(1);

/// A host with folders and a network of its own. Its guests and its agent end with it.
pub struct Host {
    folder: TempDir,
    pins: PathBuf,
    /// The state store's URL.
    state: String,
    agent: Option<Child>,
    /// What the agent finds in its environment.
    variables: Vec<(OsString, OsString)>,
    /// Holds a network namespace of its own, if it has one.
    network: Option<Child>,
    /// The namespaces that it lives in.
    pub namespaces: Namespaces,
}

impl Host {
    /// A host whose agent does not run yet.
    ///
    /// # Panics
    /// Without root.
    pub fn without_agent() -> Self {
        let folder = TempDir::new().expect("there is a place for temporary files");
        let state = format!("embedded:{}/state", folder.path().display());
        let host = Self::in_namespaces(Namespaces::enter_for_agent(), folder, state);
        host.configure("");
        host
    }

    /// A host that shares namespaces, `/dev/kvm` and a state store with others, but no folder. Its agent
    /// does not run yet, and has to be configured.
    ///
    /// # Panics
    /// If there is no place for it.
    pub fn of_fleet(namespaces: Namespaces, state: &str) -> Self {
        let folder = TempDir::new().expect("there is a place for temporary files");
        Self::in_namespaces(namespaces, folder, state.into())
    }

    fn in_namespaces(namespaces: Namespaces, folder: TempDir, state: String) -> Self {
        let name = folder.path().file_name().unwrap_or_default();
        let pins = Path::new("/sys/fs/bpf").join(format!(
            "keelson-{}",
            name.to_string_lossy().trim_start_matches('.')
        ));
        Self {
            folder,
            pins,
            state,
            agent: None,
            variables: Vec::new(),
            network: None,
            namespaces,
        }
    }

    /// Gives a host whose agent does not run yet a network namespace of its own, in which the device `eth0` has
    /// `address` (`10.0.0.1/24`) and is linked to the bridge `bridge` of the namespace that it lives in.
    ///
    /// # Panics
    /// If iproute2 or util-linux is missing.
    pub fn set_apart(&mut self, bridge: &str, address: &str) {
        let holder = Command::new("unshare")
            .args(["--net", "sleep", "infinity"])
            .spawn()
            .expect("unshare is installed");
        let id = holder.id();
        self.network = Some(holder);
        let own = fs::read_link("/proc/thread-self/ns/net").expect("it has a network namespace");
        wait_until("network namespace of the host", || {
            let path = format!("/proc/{id}/ns/net");
            (fs::read_link(path).ok()? != own).then_some(())
        });
        let link = format!("to-{id}");
        let id = id.to_string();
        let peer = ["peer", "name", "eth0", "netns", &id];
        self.namespaces
            .ip(&[&["link", "add", &link, "type", "veth"][..], &peer].concat());
        self.namespaces
            .ip(&["link", "set", &link, "master", bridge, "up"]);
        for arguments in [
            &["link", "set", "lo", "up"][..],
            &["addr", "add", address, "dev", "eth0"],
            &["link", "set", "eth0", "up"],
        ] {
            self.within("ip", arguments);
        }
    }

    /// Runs a program in the host's own network namespace; its output.
    ///
    /// # Panics
    /// If it fails.
    pub fn within(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output();
        let output = output.expect("it is installed");
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {problem}"
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A command in the host's own network namespace, if it has one.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some(network) = &self.network else {
            return Command::new(program);
        };
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/proc/{}/ns/net", network.id()))
            .arg(program);
        command
    }

    /// A host whose agent runs.
    ///
    /// # Panics
    /// If it doesn't start.
    pub fn new() -> Self {
        let mut host = Self::without_agent();
        host.start_agent();
        host
    }

    /// Writes the agent's configuration: its folders, and `more`.
    ///
    /// # Panics
    /// If it can't be written.
    pub fn configure(&self, more: &str) {
        let config = format!(
            "state = \"{2}\"\nsocket = \"{0}/run/keelsond.sock\"\n\
             run_directory = \"{0}/run\"\nlog_directory = \"{0}/log\"\nsnapshot_directory = \"{0}/snapshots\"\nbpf_directory = \"{1}\"\n{more}",
            self.folder().display(),
            self.pins.display(),
            self.state
        );
        fs::write(self.path("keelsond.toml"), config).expect("the configuration can be written");
    }

    /// The host's folder, for images as well.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path in the host's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// The agent's command, with its output in the log.
    ///
    /// # Panics
    /// If the agent is not built or the log can't be written.
    pub fn agent_command(&self) -> Command {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("keelsond.log"))
            .expect("the log can be written");
        let mut command = self.command(binary("keelsond"));
        command
            .arg("--config")
            .arg(self.path("keelsond.toml"))
            .envs(self.variables.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor can be duplicated"))
            .stderr(log);
        command
    }

    /// Has agents that are started from now on find these variables in their environment.
    pub fn set_variables(&mut self, variables: &[(OsString, OsString)]) {
        variables.clone_into(&mut self.variables);
    }

    /// Starts the agent and waits until it answers.
    ///
    /// # Panics
    /// If it doesn't.
    pub fn start_agent(&mut self) {
        let mut agent = self.agent_command().spawn().expect("keelsond starts");
        wait_until("answer of the agent", || {
            let ended = agent.try_wait().expect("a child can be asked for");
            assert!(ended.is_none(), "it ended: {}", self.agent_log());
            (self.keelson(&["host"]).code == Some(0)).then_some(())
        });
        self.agent = Some(agent);
    }

    /// Starts an agent that may be killed at once, with these variables; whether it came up.
    ///
    /// # Panics
    /// If it neither answers nor ends.
    pub fn start_agent_with(&mut self, variables: &[(&str, &str)]) -> bool {
        let mut command = self.agent_command();
        let agent = command.envs(variables.iter().copied()).spawn();
        self.agent = Some(agent.expect("keelsond starts"));
        wait_until("answer or end of the agent", || {
            if !self.agent_lives() {
                return Some(false);
            }
            (self.keelson(&["host"]).code == Some(0)).then_some(true)
        })
    }

    /// Where its eBPF maps and links are pinned.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// Starts an agent that must not come up; what it says.
    ///
    /// # Panics
    /// If it comes up.
    pub fn refused_agent(&self) -> Said {
        let _ = fs::remove_file(self.path("keelsond.log"));
        let mut agent = self.agent_command().spawn().expect("keelsond starts");
        let started = Instant::now();
        loop {
            if let Some(status) = agent.try_wait().expect("a child can be asked for") {
                return Said {
                    code: status.code(),
                    output: String::new(),
                    errors: self.agent_log(),
                };
            }
            if started.elapsed() > REFUSAL_LIMIT {
                let _ = agent.kill();
                let _ = agent.wait();
                panic!("the agent runs: {}", self.agent_log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What the agent logged.
    pub fn agent_log(&self) -> String {
        fs::read_to_string(self.path("keelsond.log")).unwrap_or_default()
    }

    /// Whether the agent still runs.
    ///
    /// # Panics
    /// If it wasn't started.
    pub fn agent_lives(&mut self) -> bool {
        let agent = self.agent.as_mut().expect("an agent was started");
        agent
            .try_wait()
            .expect("a child can be asked for")
            .is_none()
    }

    /// Kills the agent with SIGKILL.
    ///
    /// # Panics
    /// If it can't be waited for.
    pub fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            // It may have ended.
            let _ = agent.kill();
            agent.wait().expect("a child can be waited for");
        }
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", self.agent_log());
        }
        self.kill_agent();
        // The guard is a keelsond as well.
        for program in ["keelsond", "keelson-vmm", "keelson-blk"] {
            for id in self.processes(program) {
                let id = i32::try_from(id).ok().and_then(Pid::from_raw);
                // It may have ended.
                let _ = id.map(|id| kill_process(id, Signal::KILL));
            }
        }
        if let Some(mut network) = self.network.take() {
            let _ = network.kill();
            let _ = network.wait();
        }
    }
}
