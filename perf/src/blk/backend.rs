//! The programs that are compared, as processes.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};

use super::placement::Placement;
use super::work::{Backing, Work};

const START_LIMIT: Duration = Duration::from_secs(20);

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    Keelson,
    Qemu,
    /// No backend: the limit.
    Straight,
    /// What handing operations over to another thread costs by itself.
    Handover,
}

impl Peer {
    pub const ALL: [Self; 4] = [Self::Keelson, Self::Qemu, Self::Straight, Self::Handover];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Keelson => "keelson-blk",
            Self::Qemu => "qemu-storage-daemon",
            Self::Straight => "io_uring",
            Self::Handover => "io_uring, handed over",
        }
    }
}

/// Where the programs and the disks are.
#[derive(Debug)]
pub struct Scene {
    pub keelson: PathBuf,
    pub qemu: PathBuf,
    pub folder: PathBuf,
    pub file: PathBuf,
    pub loop_device: Option<PathBuf>,
    pub bytes: u64,
    pub placement: Placement,
}

impl Scene {
    /// What is under the disk.
    pub fn disk(&self, backing: Backing) -> Option<&Path> {
        match backing {
            Backing::File => Some(&self.file),
            Backing::Loop => self.loop_device.as_deref(),
            Backing::Null => None,
        }
    }
}

/// A running backend.
#[derive(Debug)]
pub struct Backend {
    process: Child,
    pub socket: PathBuf,
    /// From the start of the process until it took a connection.
    pub started_in: Duration,
}

impl Backend {
    /// Starts a backend for this load. Both have one thread for the disk.
    pub fn start(peer: Peer, scene: &Scene, work: Work) -> anyhow::Result<Self> {
        let socket = scene.folder.join(format!("{}.sock", peer.name()));
        let _ = std::fs::remove_file(&socket);
        let command = match peer {
            Peer::Keelson => keelson(scene, work, &socket),
            _ => qemu(scene, work, &socket),
        };
        scene.placement.as_backend(|| Self::spawn(command, socket))
    }

    /// Starts a keelson-blk with many disks.
    pub fn start_many(scene: &Scene, disks: usize) -> anyhow::Result<(Self, Vec<PathBuf>)> {
        let mut command = Command::new(&scene.keelson);
        let sockets: Vec<PathBuf> = (0..disks)
            .map(|disk| scene.folder.join(format!("many-{disk}.sock")))
            .collect();
        for (disk, socket) in sockets.iter().enumerate() {
            let image = scene.folder.join(format!("many-{disk}.img"));
            std::fs::File::create(&image)?.set_len(64 << 20)?;
            let (socket, image) = (socket.display(), image.display());
            command
                .arg("--disk")
                .arg(format!("socket={socket},image={image}"));
        }
        let last = sockets.last().context("at least one disk")?.clone();
        let backend = scene.placement.as_backend(|| Self::spawn(command, last))?;
        Ok((backend, sockets))
    }

    fn spawn(mut command: Command, socket: PathBuf) -> anyhow::Result<Self> {
        let begin = Instant::now();
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let mut backend = Self {
            process,
            socket,
            started_in: Duration::ZERO,
        };
        while UnixStream::connect(&backend.socket).is_err() {
            if let Some(status) = backend.process.try_wait()? {
                anyhow::bail!("{command:?} ended: {status}");
            }
            anyhow::ensure!(begin.elapsed() < START_LIMIT, "{command:?} doesn't listen");
            std::thread::sleep(Duration::from_micros(500));
        }
        backend.started_in = begin.elapsed();
        Ok(backend)
    }

    /// Processor time of all its threads so far, by the scheduler's clock.
    pub fn processor_time(&self) -> anyhow::Result<Duration> {
        let mut sum = Duration::ZERO;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.process.id()))? {
            let text = std::fs::read_to_string(thread?.path().join("schedstat"));
            let first = text.unwrap_or_default();
            let nanoseconds = first
                .split_whitespace()
                .next()
                .and_then(|field| field.parse().ok());
            sum += Duration::from_nanos(nanoseconds.unwrap_or(0));
        }
        Ok(sum)
    }

    /// Its resident memory in MiB.
    pub fn memory_mib(&self) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: f64 = line
            .and_then(|line| line.split_whitespace().next())
            .and_then(|kib| kib.parse().ok())
            .context("VmRSS in /proc")?;
        Ok(kib / 1024.0)
    }
}

// Told to stop, so that it lets go of the disk before the next one wants it; a killed process's
// io_uring holds on to its files, and so to their locks, for a while.
impl Drop for Backend {
    fn drop(&mut self) {
        let process = i32::try_from(self.process.id()).ok();
        if let Some(process) = process.and_then(Pid::from_raw) {
            let _ = kill_process(process, Signal::TERM);
        }
        let begin = Instant::now();
        while matches!(self.process.try_wait(), Ok(None)) && begin.elapsed() < START_LIMIT {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn keelson(scene: &Scene, work: Work, socket: &Path) -> Command {
    let mut command = Command::new(&scene.keelson);
    command.arg("--socket").arg(socket);
    match scene.disk(work.backing) {
        Some(disk) => command.args(["--direct", "on", "--image"]).arg(disk),
        None => command.arg("--null").arg(scene.bytes.to_string()),
    };
    command.args(["--workers", "1", "--pin-memory"]);
    command.args(["--queues", &work.queues.to_string()]);
    command
}

fn qemu(scene: &Scene, work: Work, socket: &Path) -> Command {
    let mut command = Command::new(&scene.qemu);
    let node = match scene.disk(work.backing) {
        Some(disk) => {
            let driver = if work.backing == Backing::Loop {
                "host_device"
            } else {
                "file"
            };
            format!(
                "driver={driver},node-name=disk,filename={},cache.direct=on,aio=io_uring",
                disk.display()
            )
        }
        None => format!(
            "driver=null-co,node-name=disk,size={},read-zeroes=off",
            scene.bytes
        ),
    };
    command.args(["--object", "iothread,id=thread", "--blockdev", &node]);
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,\
         num-queues={},iothread=thread",
        socket.display(),
        work.queues
    ));
    command
}
