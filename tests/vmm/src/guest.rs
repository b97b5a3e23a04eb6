//! `keelson-vmm` with one guest.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use keelson_vmm::api::GuestState;
use keelson_vmm::client::VmmClient;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::backend::Backend;
use crate::binaries::{binary, payload};
use crate::waiting::wait_until;

/// What a guest is to be. Begins as one vCPU, 64 MiB, and the payload as its kernel.
pub struct GuestBuilder {
    directory: TempDir,
    config: Value,
    arguments: Vec<OsString>,
}

impl GuestBuilder {
    /// A guest whose payload takes these steps (see `tests/payload/src/steps/mod.rs`).
    ///
    /// # Panics
    /// If there is no usable `/dev/kvm`, or no place for temporary files.
    pub fn new(steps: &str) -> Self {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        assert!(
            kvm.is_ok(),
            "this test runs a guest and needs a usable /dev/kvm, but: {}",
            kvm.err().map(|error| error.to_string()).unwrap_or_default()
        );
        let directory = TempDir::new().expect("there is a place for temporary files");
        let config = json!({
            "name": "payload",
            "vcpus": 1,
            "memory": {"size_mib": 64},
            "kernel": {
                "image": payload(),
                "command_line": format!("console=ttyS0 -- {steps}"),
            },
            "console": {
                "socket": directory.path().join("console.sock"),
                "log": directory.path().join("console.log"),
            },
            "disks": [],
            "interfaces": [],
        });
        Self {
            directory,
            config,
            arguments: Vec::new(),
        }
    }

    /// The test's own directory, which lives as long as the guest.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Sets a field of the configuration, by its JSON pointer (`/memory/size_mib`).
    ///
    /// # Panics
    /// If its parent isn't there.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        let (parent, name) = pointer
            .rsplit_once('/')
            .expect("a pointer begins with a slash");
        let parent = self
            .config
            .pointer_mut(parent)
            .expect("the field's parent is there");
        parent[name] = value.into();
        self
    }

    /// Adds a disk.
    ///
    /// # Panics
    /// Never: the list is there.
    #[must_use]
    pub fn disk(mut self, id: &str, backend: &Backend, read_only: bool, queues: u16) -> Self {
        let disk = json!({
            "id": id, "socket": backend.socket(), "read_only": read_only, "queues": queues,
        });
        self.config["disks"]
            .as_array_mut()
            .expect("a list")
            .push(disk);
        self
    }

    /// Adds an interface.
    ///
    /// # Panics
    /// Never: the list is there.
    #[must_use]
    pub fn interface(mut self, id: &str, tap: &str, mac: &str) -> Self {
        let interface = json!({"id": id, "tap": tap, "mac": mac});
        self.config["interfaces"]
            .as_array_mut()
            .expect("a list")
            .push(interface);
        self
    }

    /// Adds an interface with fields of its own beside the usual ones.
    ///
    /// # Panics
    /// If `further` is no object.
    #[must_use]
    pub fn interface_with(self, id: &str, tap: &str, mac: &str, further: &Value) -> Self {
        let mut builder = self.interface(id, tap, mac);
        let interfaces = builder.config["interfaces"].as_array_mut();
        let interface = interfaces
            .and_then(|interfaces| interfaces.last_mut())
            .and_then(Value::as_object_mut)
            .expect("it was just added");
        interface.extend(further.as_object().expect("an object").clone());
        builder
    }

    /// Adds an argument for keelson-vmm.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Goes on from a snapshot instead of booting, with further arguments.
    #[must_use]
    pub fn restore(mut self, snapshot: &Path, arguments: &[&str]) -> Self {
        self.arguments.push("--restore".into());
        self.arguments.push(snapshot.into());
        self.arguments.extend(arguments.iter().map(OsString::from));
        self
    }

    /// Starts the VMM.
    ///
    /// # Panics
    /// If the process can't be started.
    pub fn start(self) -> Guest {
        self.start_as(|_| {})
    }

    /// As [`Self::start`], with a command that `prepare` has changed.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn start_as(self, prepare: impl FnOnce(&mut Command)) -> Guest {
        let config = self.directory.path().join("guest.json");
        fs::write(&config, self.config.to_string()).expect("the configuration can be written");
        let errors = File::create(self.directory.path().join("stderr")).expect("a file is made");
        let mut command = Command::new(binary("keelson-vmm"));
        command
            .arg("--config")
            .arg(&config)
            .arg("--api-socket")
            .arg(self.directory.path().join("api.sock"))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        prepare(&mut command);
        let child = command.spawn().expect("keelson-vmm starts");
        let log = self.config["console"]["log"].as_str().unwrap_or_default();
        Guest {
            process: Process(child),
            log: log.into(),
            directory: self.directory,
        }
    }

    /// Starts the VMM and waits for its end.
    ///
    /// # Panics
    /// As [`Self::start`] and [`Guest::wait`].
    pub fn run(self) -> Ended {
        self.start().wait()
    }
}

/// A running VMM, killed when it is dropped.
pub struct Guest {
    process: Process,
    log: PathBuf,
    directory: TempDir,
}

/// How a VMM ended.
#[derive(Debug)]
pub struct Ended {
    /// The process's exit code, `None` if a signal ended it.
    pub code: Option<i32>,
    /// All that it said on stderr.
    pub errors: String,
    /// The console's log.
    pub console: String,
}

impl Guest {
    /// The test's own directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A connection to the API socket, as soon as there is one.
    ///
    /// # Panics
    /// If none comes.
    pub fn client(&self) -> VmmClient {
        let path = self.api_socket();
        wait_until("API socket", || VmmClient::connect(&path).ok())
    }

    /// Where the API socket is.
    pub fn api_socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }

    /// A connection to the console socket, as soon as there is one.
    ///
    /// # Panics
    /// If none comes.
    pub fn console(&self) -> UnixStream {
        let path = self.directory.path().join("console.sock");
        wait_until("console socket", || UnixStream::connect(&path).ok())
    }

    /// Types a line on the console.
    ///
    /// # Panics
    /// If the console isn't there.
    pub fn type_line(&self, line: &str) {
        let written = writeln!(self.console(), "{line}");
        written.expect("the console takes input");
    }

    /// Runs a command in the root shell on a stock guest's console; returns what it printed.
    ///
    /// # Panics
    /// If it doesn't end within a minute, or fails.
    pub fn shell(&mut self, command: &str) -> String {
        let mut console = self.console();
        let before = self.log().len();
        // The shell echoes the line, but only its answer has the sums in it.
        let line = format!("echo begin$((40+2)); {command}; echo end$((40+2))-$?-\n");
        let written = console.write_all(line.as_bytes());
        written.expect("the console takes input");
        wait_until(&format!("answer to {command:?}"), || {
            if let Some(status) = self.process.0.try_wait().expect("a child can be asked for") {
                let errors = read_text(&self.directory.path().join("stderr"));
                panic!("the guest has ended, {status}: {}{errors}", self.log());
            }
            let log = self.log();
            let (_, rest) = log.get(before..)?.split_once("begin42")?;
            let (printed, rest) = rest.split_once("end42-")?;
            let (code, _) = rest.split_once('-')?;
            assert_eq!(code, "0", "{command:?} failed: {printed}");
            Some(printed.trim().replace('\r', ""))
        })
    }

    /// The console's log so far.
    pub fn log(&self) -> String {
        read_text(&self.log)
    }

    /// Waits for a console line that begins with `start` and gives it whole.
    ///
    /// # Panics
    /// If none comes, at once when the guest has ended.
    pub fn wait_for_line(&mut self, start: &str) -> String {
        wait_until(&format!("line {start:?} on the console"), || {
            let ended = !self.is_running();
            let log = self.log();
            let line = find_line(&log, start);
            let errors = || read_text(&self.directory.path().join("stderr"));
            assert!(
                line.is_some() || !ended,
                "the guest ended without a line {start:?}: {log}{}",
                errors()
            );
            line
        })
    }

    /// Waits until the guest runs.
    ///
    /// # Panics
    /// If it doesn't, or has ended.
    pub fn wait_for_running(&mut self) {
        wait_until("running guest", || {
            assert!(
                self.is_running(),
                "{}",
                read_text(&self.directory.path().join("stderr"))
            );
            let status = self.client().status().ok()?;
            (status.state == GuestState::Running).then_some(())
        });
    }

    /// The process's id.
    pub fn process_id(&self) -> u32 {
        self.process.0.id()
    }

    /// Sends the process a signal.
    ///
    /// # Panics
    /// If it has ended.
    pub fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.process.0.id())
            .ok()
            .and_then(Pid::from_raw);
        kill_process(id.expect("a process id"), signal).expect("the process is there");
    }

    /// Whether the process still runs.
    ///
    /// # Panics
    /// If the kernel can't say.
    pub fn is_running(&mut self) -> bool {
        self.process
            .0
            .try_wait()
            .expect("a child can be asked for")
            .is_none()
    }

    /// Waits for the process's end.
    ///
    /// # Panics
    /// If it doesn't end within a minute.
    pub fn wait(mut self) -> Ended {
        let status = wait_until("end of keelson-vmm", || {
            self.process.0.try_wait().expect("a child can be asked for")
        });
        Ended {
            code: status.code(),
            errors: read_text(&self.directory.path().join("stderr")),
            console: self.log(),
        }
    }
}

/// A process that is killed when it is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Ended {
    /// The first console line that begins with `start`.
    ///
    /// # Panics
    /// If there is none, with all that is known.
    pub fn line(&self, start: &str) -> String {
        find_line(&self.console, start).unwrap_or_else(|| panic!("no line {start:?}: {self:#?}"))
    }

    /// The last line on stderr: why the process ended.
    pub fn reason(&self) -> &str {
        self.errors.lines().last().unwrap_or_default()
    }

    /// The guest took all its steps and powered off.
    ///
    /// # Panics
    /// If it didn't, with all that is known.
    pub fn assert_passed(&self) {
        let done = self.line("payload: done");
        assert!(done.ends_with("failed=0"), "a step failed: {self:#?}");
        assert_eq!(self.code, Some(0), "{self:#?}");
    }

    /// The VMM ended with this code, and its last line on stderr names all of `words`.
    ///
    /// # Panics
    /// If not, with all that is known.
    pub fn assert_refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for word in words {
            assert!(
                self.reason().contains(word),
                "the reason lacks {word:?}: {self:#?}"
            );
        }
    }
}

/// A whole line: the one still being written doesn't count.
fn find_line(text: &str, start: &str) -> Option<String> {
    let lines = text
        .split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'));
    lines
        .into_iter()
        .find(|line| line.starts_with(start))
        .map(str::to_owned)
}

fn read_text(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut file) = File::open(path) {
        file.read_to_end(&mut bytes).expect("the file can be read");
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
