//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use keelson_blk::catalog::{BaseSpec, Contents, DiskSpec};
use keelson_blk::disk::SERIAL_SIZE;
use keelson_blk::image::DirectMode;
use keelson_blk::isolation::{AllowedPaths, Mode};
use keelson_blk::overlay::session;
use keelson_blk::rate_limit::{Limits, Rate};
use keelson_blk::worker::WorkerOptions;

use crate::cli::control::ControlCommand;
use crate::cli::image::ImageCommand;

/// Serves raw files, block devices and overlays as vhost-user-blk disks, on io_uring.
///
/// One disk: --socket and --image. Several in one process: --disk for each, or over the control
/// socket. Prints one line of
/// JSON when it is ready, then serves one frontend after another on each socket until SIGTERM.
/// SIGHUP measures the images again and tells guests of new sizes. Exit codes: 0 stopped, 1
/// runtime failure, 2 usage, 3 an image can't be opened, 4 an image is in use, 5 io_uring is
/// unavailable, 6 a socket can't be bound.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Arguments {
    /// Instead of serving
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Unix socket to listen on
    #[arg(long, required_unless_present_any = ["disks", "control"])]
    socket: Option<PathBuf>,
    /// Raw image file or block device, or an overlay with --format overlay
    #[arg(long, required_unless_present_any = ["disks", "null", "control"])]
    image: Option<PathBuf>,
    /// What the image is. Not guessed, since a guest could make a raw image look like an overlay
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// The disk's name on the control socket and in metrics [default: the socket's file name]
    #[arg(long)]
    id: Option<String>,
    /// Encrypted, with the key of 32 or 64 bytes that this descriptor holds (a pipe, say)
    #[arg(long)]
    key_fd: Option<RawFd>,
    /// Bytes that the disk may read and write in a second (K, M, G)
    #[arg(long, value_parser = parse_rate)]
    bytes_per_second: Option<u64>,
    /// Bytes that it may move at once after idle time [default: a tenth of a second's]
    #[arg(long, value_parser = parse_rate, requires = "bytes_per_second")]
    bytes_burst: Option<u64>,
    /// Requests that the disk may make in a second
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    operations_per_second: Option<u64>,
    /// Requests that it may make at once after idle time [default: a tenth of a second's]
    #[arg(long, requires = "operations_per_second")]
    operations_burst: Option<u64>,
    /// Group of disks of this process with which it shares limits
    #[arg(long)]
    group: Option<String>,
    /// Certificates (PEM) to trust, instead of the system's, where an overlay's base is on a server
    #[arg(long, value_name = "FILE")]
    base_ca_file: Option<PathBuf>,
    /// Fetch what the guest hasn't asked for of a base on a server, at this many bytes a second (K, M,
    /// G)
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    base_fill: Option<u64>,
    /// After how many seconds a request that waits for the base's server fails [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    base_timeout: Option<u64>,
    /// Limits of a group: NAME,bytes-per-second=N,operations-per-second=N
    #[arg(long = "group-limits", value_name = "NAME,KEY=VALUE,…")]
    groups: Vec<String>,
    /// Unix socket to take control requests on
    #[arg(long)]
    pub control: Option<PathBuf>,
    /// Folder or file that disks which are added later, and their sockets, may be in. All others
    /// are out of the process's reach
    #[arg(long, value_name = "PATH", requires = "control")]
    allow_path: Vec<PathBuf>,
    /// Whether threads are kept from system calls that they have no need for (seccomp), and, with
    /// `enforce`, from files other than the disks' (Landlock)
    #[arg(long, value_enum, default_value_t = Mode::Enforce)]
    pub sandbox: Mode,
    /// Instead of an image: nothing, of this many bytes (K, M, G, T), to measure everything else
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "image")]
    null: Option<u64>,
    /// Refuse writes; other read-only users may share the image
    #[arg(long)]
    read_only: bool,
    /// Number of virtqueues, 1 to 64
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Most descriptors in a virtqueue: a power of two from 4 to 1024
    #[arg(long, default_value_t = 1024, value_parser = parse_queue_size)]
    queue_size: u16,
    /// Serial number that the guest sees, up to 20 bytes
    #[arg(long, default_value = "", value_parser = parse_serial)]
    serial: String,
    /// Whether to go around the page cache with O_DIRECT
    #[arg(long, value_enum, default_value_t = Direct::Auto)]
    direct: Direct,
    /// Look for the end of reads and writes instead of waiting for the device's interrupt, where it has
    /// queues for that (IORING_SETUP_IOPOLL). The worker then uses its processor in full while requests are
    /// under way. Of raw images and block devices that go around the page cache
    #[arg(long)]
    io_poll: bool,
    /// One more disk: socket=PATH,image=PATH or socket=PATH,null=SIZE, and format=raw|overlay, id=NAME,
    /// read-only, queues=N, queue-size=N, serial=TEXT, direct=auto|on|off, io-poll, key-fd=N, group=NAME,
    /// base-ca-file=PATH, base-fill=RATE, base-timeout=SECONDS, bytes-per-second=N, operations-per-second=N, where other than the options of these names
    #[arg(long = "disk", value_name = "KEY=VALUE,…")]
    disks: Vec<String>,
    /// Threads that serve the queues of all disks, or "queue" for one for each running queue
    /// [default: one for each processor]
    #[arg(long, value_name = "N|queue", value_parser = parse_workers)]
    workers: Option<Workers>,
    /// Processors to pin the workers to, one each, for example 2-5,8
    #[arg(long, value_parser = parse_cpus)]
    cpus: Option<Cpus>,
    /// Longest time in microseconds that an idle worker looks for requests before it sleeps
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    poll_us: u64,
    /// Register guest memory with io_uring; keeps all of it in memory
    #[arg(long)]
    pin_memory: bool,
    /// Let a kernel thread take operations out of each ring, which sleeps after this many
    /// milliseconds without any (IORING_SETUP_SQPOLL)
    #[arg(long, value_name = "MS")]
    submission_poll_ms: Option<u64>,
    /// What to log to stderr, in RUST_LOG's syntax
    #[arg(long, default_value = "info")]
    pub log_level: tracing_subscriber::EnvFilter,
}

/// What keelson-blk does beside serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create, look at and change images that are not being served
    #[command(subcommand)]
    Image(ImageCommand),
    /// Talk to a running keelson-blk over its control socket
    Control(ControlCommand),
}

/// How an image's bytes are to be understood.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Format {
    /// The disk's bytes, one after the other
    #[default]
    Raw,
    /// What `keelson-blk image create` makes
    Overlay,
}

/// One disk of the command line.
#[derive(Clone, Debug)]
pub struct DiskArguments {
    /// What it is made of.
    pub spec: DiskSpec,
    /// The descriptor that its key is to be read from.
    pub key_fd: Option<RawFd>,
}

/// Whether to go around the page cache.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Direct {
    /// Where the file allows it
    Auto,
    /// Or refuse to start
    On,
    /// Through the page cache
    Off,
}

#[derive(Clone, Copy, Debug)]
enum Workers {
    PerQueue,
    Threads(usize),
}

#[derive(Clone, Debug)]
struct Cpus(Vec<usize>);

impl Arguments {
    /// All disks, or what is wrong with one.
    pub fn disks(&self) -> Result<Vec<DiskArguments>, String> {
        let mut disks = Vec::new();
        if let Some(socket) = &self.socket {
            let contents = match (&self.image, self.null) {
                (Some(image), _) => self.format.contents(image.clone()),
                (None, Some(bytes)) => Contents::Null(bytes),
                (None, None) => return Err("--socket needs --image".into()),
            };
            let mut disk = self.with_defaults(socket.clone(), contents);
            if let Some(id) = &self.id {
                disk.spec.id.clone_from(id);
            }
            disks.push(disk);
        }
        for text in &self.disks {
            let disk = self.parse_disk(text);
            disks.push(disk.map_err(|reason| format!("--disk {text}: {reason}"))?);
        }
        for disk in disks.iter().filter(|disk| disk.spec.io_poll) {
            let id = &disk.spec.id;
            if self.pin_memory {
                return Err(format!(
                    "disk {id}: --io-poll doesn't go together with --pin-memory, which registers memory with other rings"
                ));
            }
            if !matches!(disk.spec.contents, Contents::Raw(_)) {
                return Err(format!(
                    "disk {id}: only raw images and block devices can be polled"
                ));
            }
        }
        Ok(disks)
    }

    /// What the process may reach after it has opened these disks: places to add others, and where
    /// snapshots of overlays and their sessions are made. Sockets are removed at the end.
    pub fn allowed_paths(&self, disks: &[DiskArguments]) -> Result<AllowedPaths, String> {
        let mut paths = AllowedPaths::default();
        for disk in disks {
            paths.allow_removal(&disk.spec.socket);
            if let Contents::Overlay(image) = &disk.spec.contents {
                if let Some(folder) = session::folder() {
                    paths.allow(&folder);
                }
                if self.control.is_some() {
                    paths.allow_folder_of(image);
                }
            }
        }
        if let Some(control) = &self.control {
            paths.allow_removal(control);
            if let Some(folder) = session::folder().filter(|_| !self.allow_path.is_empty()) {
                paths.allow(&folder);
            }
        }
        for path in &self.allow_path {
            // Landlock knows what is there, not names.
            if !path.exists() {
                return Err(format!("--allow-path {}: there is nothing", path.display()));
            }
            paths.allow(path);
        }
        if disks.is_empty() && self.allow_path.is_empty() && self.sandbox == Mode::Enforce {
            return Err(
                "with no disk yet, say where disks may be added: --allow-path FOLDER".into(),
            );
        }
        Ok(paths)
    }

    /// The groups with limits, or what is wrong with one.
    pub fn groups(&self) -> Result<Vec<(String, Limits)>, String> {
        let groups = self.groups.iter().map(|text| {
            let (name, rest) = text.split_once(',').unwrap_or((text, ""));
            let mut limits = Limits::default();
            for part in rest.split(',').filter(|part| !part.is_empty()) {
                let (key, value) = part.split_once('=').unwrap_or((part, ""));
                if !parse_limit(&mut limits, key, value)? {
                    return Err(format!("--group-limits {text}: unknown key {key:?}"));
                }
            }
            Ok((name.to_owned(), limits))
        });
        groups.collect()
    }

    /// How to run the workers.
    pub fn worker_options(&self) -> WorkerOptions {
        let cpus = self.cpus.clone().map_or(Vec::new(), |Cpus(cpus)| cpus);
        let defaults = WorkerOptions::default();
        WorkerOptions {
            threads: match self.workers {
                Some(Workers::PerQueue) => None,
                Some(Workers::Threads(threads)) => Some(threads),
                None if cpus.is_empty() => defaults.threads,
                None => Some(cpus.len()),
            },
            cpus,
            poll: Duration::from_micros(self.poll_us),
            pin_memory: self.pin_memory,
            submission_poll: self.submission_poll_ms.map(Duration::from_millis),
        }
    }

    fn with_defaults(&self, socket: PathBuf, contents: Contents) -> DiskArguments {
        let rate = |per_second: Option<u64>, burst| {
            per_second.map(|per_second| Rate { per_second, burst })
        };
        let spec = DiskSpec {
            id: default_id(&socket),
            socket,
            contents,
            read_only: self.read_only,
            queues: self.queues,
            queue_size: self.queue_size,
            serial: self.serial.clone(),
            direct: self.direct.mode(),
            io_poll: self.io_poll,
            limits: Limits {
                bytes: rate(self.bytes_per_second, self.bytes_burst),
                operations: rate(self.operations_per_second, self.operations_burst),
            },
            group: self.group.clone(),
            base: BaseSpec {
                ca_file: self.base_ca_file.clone(),
                fill_bytes_per_second: self.base_fill,
                timeout_seconds: self.base_timeout,
            },
        };
        DiskArguments {
            spec,
            key_fd: self.key_fd,
        }
    }

    fn parse_disk(&self, text: &str) -> Result<DiskArguments, String> {
        // A key can be read once, so it belongs to one disk.
        let mut disk = DiskArguments {
            key_fd: None,
            ..self.with_defaults(PathBuf::new(), Contents::Null(0))
        };
        parse_disk(text, &mut disk, self.format)?;
        Ok(disk)
    }
}

/// Reads `key=value,…` into a disk that has the defaults.
pub fn parse_disk(text: &str, disk: &mut DiskArguments, format: Format) -> Result<(), String> {
    let (mut socket, mut image, mut null, mut id) = (None, None, None, None);
    let mut format = format;
    let spec = &mut disk.spec;
    for part in text.split(',') {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        match key {
            "socket" => socket = Some(PathBuf::from(value)),
            "image" => image = Some(PathBuf::from(value)),
            "null" => null = Some(parse_size(value)?),
            "format" => format = Format::from_str(value, false)?,
            "id" => id = Some(value.to_owned()),
            "read-only" if value.is_empty() => spec.read_only = true,
            "queues" => {
                let queues = value
                    .parse()
                    .ok()
                    .filter(|queues| (1..=64).contains(queues));
                spec.queues = queues.ok_or("queues= takes 1 to 64")?;
            }
            "queue-size" => spec.queue_size = parse_queue_size(value)?,
            "serial" => spec.serial = parse_serial(value)?,
            "direct" => spec.direct = Direct::from_str(value, false)?.mode(),
            "io-poll" if value.is_empty() => spec.io_poll = true,
            "group" => spec.group = Some(value.to_owned()),
            "base-ca-file" => spec.base.ca_file = Some(value.into()),
            "base-fill" => spec.base.fill_bytes_per_second = Some(parse_rate(value)?),
            "base-timeout" => {
                let seconds = value.parse();
                let seconds = seconds.map_err(|_| "base-timeout= takes a number of seconds")?;
                spec.base.timeout_seconds = Some(seconds);
            }
            "key-fd" => {
                let descriptor = value.parse().map_err(|_| "key-fd= takes a number")?;
                disk.key_fd = Some(descriptor);
            }
            _ if parse_limit(&mut spec.limits, key, value)? => {}
            _ => return Err(format!("unknown key {key:?}")),
        }
    }
    spec.socket = socket.ok_or("socket= is missing")?;
    spec.id = id.unwrap_or_else(|| default_id(&spec.socket));
    spec.contents = match (image, null) {
        (Some(image), None) => format.contents(image),
        (None, Some(bytes)) => Contents::Null(bytes),
        _ => return Err("it takes either image= or null=".into()),
    };
    Ok(())
}

impl Format {
    fn contents(self, image: PathBuf) -> Contents {
        match self {
            Self::Raw => Contents::Raw(image),
            Self::Overlay => Contents::Overlay(image),
        }
    }
}

impl Direct {
    fn mode(self) -> DirectMode {
        match self {
            Self::Auto => DirectMode::Auto,
            Self::On => DirectMode::On,
            Self::Off => DirectMode::Off,
        }
    }
}

fn default_id(socket: &std::path::Path) -> String {
    let name = socket.file_name().unwrap_or(socket.as_os_str());
    name.to_string_lossy().into_owned()
}

// Whether the key is one of a limit's.
fn parse_limit(limits: &mut Limits, key: &str, value: &str) -> Result<bool, String> {
    let (rate, burst) = match key {
        "bytes-per-second" => (&mut limits.bytes, false),
        "bytes-burst" => (&mut limits.bytes, true),
        "operations-per-second" => (&mut limits.operations, false),
        "operations-burst" => (&mut limits.operations, true),
        _ => return Ok(false),
    };
    let number = parse_rate(value)?;
    match rate {
        Some(rate) if burst => rate.burst = Some(number),
        None if burst => return Err(format!("{key}= comes after its …-per-second=")),
        rate => {
            *rate = Some(Rate {
                per_second: number,
                burst: None,
            });
        }
    }
    Ok(true)
}

fn parse_rate(text: &str) -> Result<u64, String> {
    crate::cli::size::parse(text)
        .ok()
        .filter(|rate| *rate > 0)
        .ok_or_else(|| "not a number above 0, perhaps with K, M or G".into())
}

fn parse_serial(text: &str) -> Result<String, String> {
    if text.len() > SERIAL_SIZE {
        return Err(format!(
            "{} bytes, but virtio-blk has room for 20",
            text.len()
        ));
    }
    Ok(text.to_owned())
}

fn parse_queue_size(text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|size: &u16| size.is_power_of_two() && (4..=1024).contains(size))
        .ok_or_else(|| "not a power of two from 4 to 1024".into())
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.char_indices().last() {
        Some((end, 'K')) => (&text[..end], 10),
        Some((end, 'M')) => (&text[..end], 20),
        Some((end, 'G')) => (&text[..end], 30),
        Some((end, 'T')) => (&text[..end], 40),
        _ => (text, 0),
    };
    let bytes = number
        .parse()
        .ok()
        .and_then(|number: u64| number.checked_mul(1 << shift));
    bytes
        .filter(|bytes| *bytes > 0 && bytes.is_multiple_of(512))
        .ok_or_else(|| {
            "not a size: a number of bytes, a multiple of 512, perhaps with K, M, G or T".into()
        })
}

fn parse_workers(text: &str) -> Result<Workers, String> {
    if text == "queue" {
        return Ok(Workers::PerQueue);
    }
    text.parse()
        .ok()
        .filter(|threads| (1..=1024).contains(threads))
        .map(Workers::Threads)
        .ok_or_else(|| "neither \"queue\" nor a number from 1 to 1024".into())
}

fn parse_cpus(text: &str) -> Result<Cpus, String> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = first.parse::<usize>().ok().zip(last.parse::<usize>().ok());
        let range = range.filter(|(first, last)| first <= last && *last < 1024);
        let (first, last) = range.ok_or("not a list of processors such as 2-5,8")?;
        cpus.extend(first..=last);
    }
    Ok(Cpus(cpus))
}
