use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::error::{file, tail};
use crate::lab_initramfs::lab_initramfs;
use crate::protocol::{Exec, ExitStatus, Status};
use crate::qemu::{Machine, find_init};
use crate::root_image::{make_root_image, modules_image};
use crate::{KernelFiles, LabError, LabOptions, LabState, Running, StreamFrame, client};

/// Limit of a command given to [`Lab::run`], in seconds.
const RUN_LIMIT_SECONDS: u64 = 300;

/// Limit of what [`Lab::run`] keeps of each output stream, in bytes.
/// Lines that a command which took too long is quoted with.
const LAST_LINES: usize = 40;
const OUTPUT_LIMIT: usize = 64 << 20;

/// A running lab. Dropping it ends it, unless it was booted detached.
#[derive(Debug)]
pub struct Lab {
    state: LabState,
    folder: PathBuf,
    /// How long the start took, from QEMU's start to `/dev/kvm`.
    boot_time: Duration,
    process: Option<Child>,
    detached: bool,
    /// Removes the state folder when it is the lab's own.
    own_folder: Option<tempfile::TempDir>,
}

/// Of one lab.
const BOOT_ATTEMPTS: u32 = 3;

/// What a command in the lab printed, and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, without the last line end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout)
            .trim_end_matches('\n')
            .to_owned()
    }
}

impl Lab {
    /// Starts a lab and returns when commands run in it and `/dev/kvm` is there.
    ///
    /// Emulated kernels panic now and then while they start, in code of their own, and are started
    /// once more then.
    pub fn boot(options: &LabOptions) -> Result<Self, LabError> {
        for _ in 1..BOOT_ATTEMPTS {
            match Self::boot_once(options) {
                Err(error) if error.is_kernel_panic() => {
                    eprintln!("{error}\nthe lab is started once more");
                }
                other => return other,
            }
        }
        Self::boot_once(options)
    }

    fn boot_once(options: &LabOptions) -> Result<Self, LabError> {
        check(options)?;
        let kernel = KernelFiles::find(&options.kernel)?;
        let (folder, own_folder) = state_folder(options)?;
        let init = find_init()?;
        let token = random_token()?;

        let root_image = folder.join("root.img");
        make_root_image(&root_image, options, &kernel, &init)?;
        let initramfs = folder.join("initramfs");
        let archive = lab_initramfs(options, &kernel, &init, &token)?;
        std::fs::write(&initramfs, archive).map_err(file("write", &initramfs))?;

        let port = free_port()?;
        let console = folder.join("console.log");
        let machine = Machine {
            options,
            kernel: &kernel,
            initramfs: &initramfs,
            root_image: &root_image,
            modules_image: &modules_image(&kernel)?,
            console: &console,
            port,
        };
        let started = Instant::now();
        let process = machine.start()?;
        let process_start = crate::state::process_start(process.id()).unwrap_or_default();
        let process_id = process.id();
        let kernel = options.kernel.clone();
        let state = LabState {
            process_id,
            process_start,
            port,
            token,
            kernel,
            console,
        };
        let mut lab = Self {
            state,
            folder,
            boot_time: Duration::ZERO,
            process: Some(process),
            detached: false,
            own_folder,
        };
        // From here on an error drops `lab`, which ends the process.
        lab.wait_until_ready(options.boot_timeout)?;
        lab.boot_time = started.elapsed();
        lab.state.write(&lab.folder)?;
        lab.detached = options.detached;
        Ok(lab)
    }

    /// The lab that was booted with this state folder, perhaps by another process. It is not ended
    /// when this value is dropped.
    pub fn attach(folder: &Path) -> Result<Self, LabError> {
        Ok(Self {
            state: LabState::read(folder)?,
            folder: folder.to_path_buf(),
            boot_time: Duration::ZERO,
            process: None,
            detached: true,
            own_folder: None,
        })
    }

    /// How to reach it.
    pub fn state(&self) -> &LabState {
        &self.state
    }

    /// Time from QEMU's start to `/dev/kvm`; zero for an attached lab.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// Asks the lab how it is.
    pub fn status(&self) -> Result<Status, LabError> {
        client::status(&self.state, Duration::from_secs(10))
    }

    /// Runs a command to its end. One that takes over five minutes is killed, which is an error:
    /// use [`Lab::output`] for another limit.
    pub fn run(&self, arguments: &[&str]) -> Result<Output, LabError> {
        let arguments = arguments.iter().map(ToString::to_string).collect();
        self.output(
            &Exec {
                arguments,
                ..Exec::default()
            },
            &[],
        )
    }

    /// Runs a script with the lab's shell.
    pub fn shell(&self, script: &str) -> Result<Output, LabError> {
        self.run(&["sh", "-c", script])
    }

    /// Runs a command to its end, with the given standard input.
    pub fn output(&self, exec: &Exec, input: &[u8]) -> Result<Output, LabError> {
        let seconds = exec.timeout_seconds.unwrap_or(RUN_LIMIT_SECONDS);
        let mut running = self.spawn(&Exec {
            timeout_seconds: Some(seconds),
            ..exec.clone()
        })?;
        running.input().write(input)?;
        running.input().close()?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let (kept, piece) = match running.next_frame()? {
                StreamFrame::Stdout(piece) => (&mut stdout, piece),
                StreamFrame::Stderr(piece) => (&mut stderr, piece),
                StreamFrame::Ended(ExitStatus::TimedOut) => {
                    return Err(LabError::CommandTimedOut {
                        command: exec.arguments.join(" "),
                        seconds,
                        output: tail(
                            &String::from_utf8_lossy(&[stdout, stderr].concat()),
                            LAST_LINES,
                        ),
                    });
                }
                StreamFrame::Ended(status) => {
                    return Ok(Output {
                        status,
                        stdout,
                        stderr,
                    });
                }
            };
            if kept.len() + piece.len() > OUTPUT_LIMIT {
                return Err(LabError::Refused(format!(
                    "{} printed more than {OUTPUT_LIMIT} bytes",
                    exec.arguments.join(" ")
                )));
            }
            kept.extend_from_slice(&piece);
        }
    }

    /// Starts a command; its output is streamed.
    pub fn spawn(&self, exec: &Exec) -> Result<Running, LabError> {
        Running::start(&self.state, exec)
    }

    /// Copies a file into the lab, with its permissions.
    pub fn put(&self, from: &Path, to: &Path) -> Result<(), LabError> {
        let metadata = std::fs::metadata(from).map_err(file("read", from))?;
        let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o7777;
        client::put(&self.state, from, to, mode)
    }

    /// Copies a file out of the lab.
    pub fn get(&self, from: &Path, to: &Path) -> Result<(), LabError> {
        let mut target = std::fs::File::create(to).map_err(file("write", to))?;
        client::get(&self.state, from, &mut target)
    }

    /// Powers the lab off and waits for its process to end; kills it if that takes over 10 s.
    pub fn shut_down(mut self) -> Result<(), LabError> {
        let asked = client::power_off(&self.state);
        let limit = Instant::now() + Duration::from_secs(if asked.is_ok() { 10 } else { 0 });
        while self.is_running() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.end();
        Ok(())
    }

    fn wait_until_ready(&mut self, limit: Duration) -> Result<(), LabError> {
        let started = Instant::now();
        loop {
            if !self.is_running() {
                return Err(self.died_early());
            }
            if client::status(&self.state, Duration::from_secs(5)).is_ok_and(|status| status.kvm) {
                return Ok(());
            }
            if started.elapsed() > limit {
                let log = self.keep_console();
                return Err(LabError::TimedOut {
                    doing: "start",
                    seconds: limit.as_secs(),
                    log,
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn died_early(&mut self) -> LabError {
        let status = match self
            .process
            .as_mut()
            .and_then(|process| process.wait().ok())
        {
            Some(status) => status.to_string(),
            None => "exit status unknown".to_owned(),
        };
        let text = std::fs::read(&self.state.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // QEMU lists what TCG lacks of the processor model at each start: that is never the reason.
        let said: Vec<&str> = text
            .lines()
            .filter(|line| !line.contains("TCG doesn't support"))
            .collect();
        let tail = tail(&said.join("\n"), 15);
        LabError::DiedEarly {
            status,
            log: self.keep_console(),
            tail,
        }
    }

    /// Copies the console file out of a folder that is about to be removed.
    fn keep_console(&self) -> PathBuf {
        if self.own_folder.is_none() {
            return self.state.console.clone();
        }
        let kept = std::env::temp_dir().join(format!("keelson-lab-{}.log", self.state.process_id));
        match std::fs::copy(&self.state.console, &kept) {
            Ok(_) => kept,
            Err(_) => self.state.console.clone(),
        }
    }

    fn is_running(&mut self) -> bool {
        match &mut self.process {
            Some(process) => matches!(process.try_wait(), Ok(None)),
            None => self.state.is_running(),
        }
    }

    fn end(&mut self) {
        self.state.signal(Signal::KILL);
        if let Some(process) = &mut self.process {
            let _status = process.wait();
        }
        LabState::remove(&self.folder);
        // The disk is worth nothing without the lab; the console log stays.
        let _absent = std::fs::remove_file(self.folder.join("root.img"));
        let _absent = std::fs::remove_file(self.folder.join("initramfs"));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.detached {
            self.end();
        }
    }
}

fn check(options: &LabOptions) -> Result<(), LabError> {
    if options.memory_mib < 512 {
        return Err(LabError::BadOption(
            "a lab needs at least 512 MiB of memory".into(),
        ));
    }
    if !(1..=16).contains(&options.cpus) {
        return Err(LabError::BadOption("a lab has 1 to 16 processors".into()));
    }
    if !(512..=1 << 20).contains(&options.disk_mib) {
        return Err(LabError::BadOption(
            "a lab's disk has 512 MiB to 1 TiB".into(),
        ));
    }
    Ok(())
}

fn state_folder(options: &LabOptions) -> Result<(PathBuf, Option<tempfile::TempDir>), LabError> {
    let Some(folder) = &options.state_folder else {
        let parent = std::env::temp_dir();
        let own = tempfile::Builder::new()
            .prefix("keelson-lab-")
            .tempdir()
            .map_err(file("make a folder in", &parent))?;
        return Ok((own.path().to_path_buf(), Some(own)));
    };
    if let Ok(state) = LabState::read(folder) {
        let process_id = state.process_id;
        return Err(LabError::AlreadyUp {
            folder: folder.clone(),
            process_id,
        });
    }
    std::fs::create_dir_all(folder).map_err(file("make", folder))?;
    Ok((folder.clone(), None))
}

/// 128 random bits in hexadecimal.
fn random_token() -> Result<String, LabError> {
    let source = Path::new("/dev/urandom");
    let mut bytes = [0; 16];
    std::fs::File::open(source)
        .and_then(|mut urandom| std::io::Read::read_exact(&mut urandom, &mut bytes))
        .map_err(file("read", source))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// A TCP port that is free now. Should another program take it before QEMU does, QEMU ends and says
/// so.
fn free_port() -> Result<u16, LabError> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|source| LabError::Connection {
            doing: "looking for a free port",
            source,
        })
}
