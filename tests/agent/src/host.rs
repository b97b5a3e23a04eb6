//! A host with its agent, and the command line client.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use keelson_vmm_tests::{Namespaces, binary, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How long an agent may take to say why it doesn't start.
const REFUSAL_LIMIT: Duration = Duration::from_mins(1);

/// A host with folders and a network of its own. Its guests and its agent end with it.
pub struct Host {
    folder: TempDir,
    pins: PathBuf,
    /// The state store's URL.
    state: String,
    agent: Option<Child>,
    /// Holds a network namespace of its own, if it has one.
    network: Option<Child>,
    /// The namespaces that it lives in.
    pub namespaces: Namespaces,
}

/// What a command of the client said.
#[derive(Debug)]
pub struct Said {
    /// The exit code.
    pub code: Option<i32>,
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub errors: String,
}

impl Said {
    /// The output of a command that was done.
    ///
    /// # Panics
    /// If it failed.
    #[track_caller]
    pub fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.output, self.errors);
        self.output
    }

    /// Checks that the command was refused with this exit code and that it says all of `words`.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}{}", self.output, self.errors);
        for word in words {
            assert!(
                self.errors.contains(word),
                "no {word:?} in {:?}",
                self.errors
            );
        }
    }
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
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor can be duplicated"))
            .stderr(log);
        command
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

    /// Runs keelson-blk on an image.
    ///
    /// # Panics
    /// If it is not built.
    pub fn blk(&self, arguments: &[&str], image: &Path) -> Said {
        let output = Command::new(binary("keelson-blk"))
            .args(arguments)
            .arg(image)
            .stdin(Stdio::null())
            .output()
            .expect("keelson-blk runs");
        said(&output)
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

    /// Runs the client.
    ///
    /// # Panics
    /// If it is not built.
    pub fn keelson<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Said {
        let output = Command::new(binary("keelson"))
            .env("KEELSON_SOCKET", self.path("run/keelsond.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("keelson runs");
        said(&output)
    }

    /// Runs a command that goes on until it is killed, while `work` is done, and waits until it has
    /// printed all of `words` on one line.
    ///
    /// # Panics
    /// If the client can't be run, or does not print them in time.
    pub fn following<S: AsRef<OsStr>>(&self, arguments: &[S], work: impl FnOnce(), words: &[&str]) {
        let path = self.path("followed");
        let output = File::create(&path).expect("a file is made");
        let mut client = Command::new(binary("keelson"))
            .env("KEELSON_SOCKET", self.path("run/keelsond.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output)
            .spawn()
            .expect("keelson runs");
        // It says nothing when it listens.
        std::thread::sleep(Duration::from_secs(1));
        work();
        wait_until("line with what the command should print", || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            text.lines()
                .any(|line| words.iter().all(|word| line.contains(word)))
                .then_some(())
        });
        client.kill().expect("it runs");
        client.wait().expect("it ends");
    }

    /// Asks the keelson-blk of a guest's disk for what it serves.
    ///
    /// # Panics
    /// If it doesn't answer.
    pub fn served_disk(&self, guest: &str, disk: &str) -> Value {
        let socket = self.path(&format!("run/vms/{guest}/{disk}.disk.control"));
        let output = Command::new(binary("keelson-blk"))
            .args(["control", "--socket"])
            .arg(socket)
            .arg("list")
            .stdin(Stdio::null())
            .output()
            .expect("keelson-blk runs");
        let text = said(&output).done();
        let listed: Value = serde_json::from_str(&text).expect("JSON");
        listed["disks"][0].clone()
    }

    /// Applies a manifest.
    ///
    /// # Panics
    /// If the client can't be run.
    pub fn apply(&self, manifest: &str) -> Said {
        let mut client = Command::new(binary("keelson"))
            .env("KEELSON_SOCKET", self.path("run/keelsond.sock"))
            .args(["apply", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("keelson runs");
        let mut input = client.stdin.take().expect("its input is a pipe");
        // It may refuse before it has read all.
        let _ = input.write_all(manifest.as_bytes());
        drop(input);
        said(&client.wait_with_output().expect("keelson ends"))
    }

    /// An object as JSON.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn object(&self, kind: &str, name: &str) -> Value {
        let text = self.keelson(&["get", kind, name, "-o", "json"]).done();
        serde_json::from_str(&text).expect("the client prints JSON")
    }

    /// All objects, as their kinds and names in JSON.
    ///
    /// # Panics
    /// If the client fails.
    pub fn object_names(&self) -> Vec<String> {
        ["vm", "disk", "net", "sg"]
            .iter()
            .flat_map(|kind| {
                let text = self.keelson(&["get", kind, "-o", "json"]).done();
                let list: Value = serde_json::from_str(&text).expect("the client prints JSON");
                let items = list["items"].as_array().cloned().unwrap_or_default();
                items
                    .iter()
                    .map(|item| format!("{kind}/{}", item["metadata"]["name"]))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// Waits until a guest's status is as `holds` wants it.
    ///
    /// # Panics
    /// With the status that it stays in.
    #[track_caller]
    pub fn wait_for_status(
        &self,
        guest: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Value {
        self.wait_for_object("vm", guest, what, holds)
    }

    /// Waits until an object's status is as `holds` wants it.
    ///
    /// # Panics
    /// With the status that it stays in.
    #[track_caller]
    pub fn wait_for_object(
        &self,
        kind: &str,
        name: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Value {
        let mut last = Value::Null;
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until(what, || {
                last = self.object(kind, name)["status"].clone();
                holds(&last).then(|| last.clone())
            })
        }));
        found.unwrap_or_else(|_| panic!("no {what}: {last:#}\n{}", self.agent_log()))
    }

    /// Waits until a guest is in a phase.
    ///
    /// # Panics
    /// If it doesn't get there.
    #[track_caller]
    pub fn wait_for_phase(&self, guest: &str, phase: &str) -> Value {
        self.wait_for_status(guest, phase, |status| status["phase"] == phase)
    }

    /// Waits until the reason of a guest's `Ready` condition is `reason`; its message.
    ///
    /// # Panics
    /// If it doesn't get so.
    #[track_caller]
    pub fn wait_for_reason(&self, guest: &str, reason: &str) -> String {
        let status = self.wait_for_status(guest, reason, |status| {
            ready(status).is_some_and(|ready| ready["reason"] == reason)
        });
        ready(&status).expect("it was there")["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Waits until a guest's console said `text`.
    ///
    /// # Panics
    /// If it doesn't.
    #[track_caller]
    pub fn wait_for_console(&self, guest: &str, text: &str) {
        wait_until(&format!("{text:?} on {guest}'s console"), || {
            let log = self.keelson(&["logs", guest]).output;
            log.contains(text).then_some(())
        });
    }

    /// Types a line on a guest's console.
    ///
    /// # Panics
    /// If the guest doesn't run.
    pub fn type_line(&self, guest: &str, line: &str) {
        let console = self.path(&format!("run/vms/{guest}/console.sock"));
        let mut console = UnixStream::connect(console).expect("the guest has a console");
        writeln!(console, "{line}").expect("it takes a line");
    }

    /// Sends a signal to the guest's keelson-vmm; its process id.
    ///
    /// # Panics
    /// If it doesn't run.
    pub fn signal_machine(&self, guest: &str, signal: Signal) -> u32 {
        // A guest may print before its status says that it runs.
        let id = wait_until("the guest's process", || {
            self.object("vm", guest)["status"]["processId"].as_u64()
        });
        let id = i32::try_from(id).expect("a process id");
        kill_process(Pid::from_raw(id).expect("not zero"), signal).expect("it is there");
        id.unsigned_abs()
    }

    /// The process ids of a program of this host.
    ///
    /// # Panics
    /// If /proc can't be read.
    pub fn processes(&self, program: &str) -> Vec<u32> {
        let folder = self.folder().to_string_lossy().into_owned();
        let line = |id: u32| {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).into_owned()
        };
        // A jail's inner process has its supervisor's command line.
        let is_inner = |id: u32| {
            let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            parent
                .and_then(|parent| parent.trim().parse().ok())
                .is_some_and(|parent| line(parent) == line(id))
        };
        fs::read_dir("/proc")
            .expect("/proc can be read")
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|id: &u32| {
                let line = line(*id);
                let name = line.split('\0').next().unwrap_or_default().to_owned();
                name.ends_with(program) && line.contains(&folder) && !is_inner(*id)
            })
            .collect()
    }

    /// The network devices of the host.
    ///
    /// # Panics
    /// If they can't be listed.
    pub fn devices(&self) -> Vec<String> {
        let output = Command::new("ip")
            .args(["-o", "link"])
            .output()
            .expect("ip runs");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| Some(line.split(": ").nth(1)?.to_owned()))
            .collect()
    }

    /// Packets that a guest's first interface dropped in a direction, for a reason.
    ///
    /// # Panics
    /// If there are no counters.
    pub fn dropped(&self, guest: &str, direction: &str, reason: &str) -> u64 {
        let text = self
            .keelson(&["net", "counters", guest, "-o", "json"])
            .done();
        let counters: Value = serde_json::from_str(&text).expect("the client prints JSON");
        counters
            .pointer(&format!("/0/{direction}/dropped/{reason}/packets"))
            .and_then(Value::as_u64)
            .unwrap_or(0)
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

/// The `Ready` condition of a status.
fn ready(status: &Value) -> Option<&Value> {
    let conditions = status["conditions"].as_array()?;
    conditions
        .iter()
        .find(|condition| condition["type"] == "Ready")
}

fn said(output: &std::process::Output) -> Said {
    Said {
        code: output.status.code(),
        output: String::from_utf8_lossy(&output.stdout).into_owned(),
        errors: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
