//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use keelson_blk::disk::SERIAL_SIZE;
use keelson_blk::worker::WorkerOptions;

/// Serves raw files and block devices as vhost-user-blk disks, on io_uring.
///
/// One disk: --socket and --image. Several in one process: --disk for each. Prints one line of
/// JSON when it is ready, then serves one frontend after another on each socket until SIGTERM.
/// SIGHUP measures the images again and tells guests of new sizes. Exit codes: 0 stopped, 1
/// runtime failure, 2 usage, 3 an image can't be opened, 4 an image is in use, 5 io_uring is
/// unavailable, 6 a socket can't be bound.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Arguments {
    /// Unix socket to listen on
    #[arg(long, required_unless_present = "disks")]
    socket: Option<PathBuf>,
    /// Raw image file or block device
    #[arg(long, required_unless_present_any = ["disks", "null"])]
    image: Option<PathBuf>,
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
    serial: Serial,
    /// Whether to go around the page cache with O_DIRECT
    #[arg(long, value_enum, default_value_t = Direct::Auto)]
    direct: Direct,
    /// One more disk: socket=PATH,image=PATH or socket=PATH,null=SIZE, and read-only, queues=N,
    /// queue-size=N, serial=TEXT, direct=auto|on|off, where other than the options of these names
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
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
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

/// What a disk is made of.
#[derive(Clone, Debug)]
pub enum Contents {
    /// A raw file or a block device.
    Image(PathBuf),
    /// Nothing, of this many bytes.
    Null(u64),
}

/// One disk of the command line.
#[derive(Clone, Debug)]
pub struct DiskArguments {
    /// Unix socket to listen on.
    pub socket: PathBuf,
    /// What it is made of.
    pub contents: Contents,
    /// Whether to refuse writes.
    pub read_only: bool,
    /// Virtqueues, 1 to 64.
    pub queues: u16,
    /// Most descriptors in a virtqueue.
    pub queue_size: u16,
    /// The serial number.
    pub serial: Serial,
    /// Whether to go around the page cache.
    pub direct: Direct,
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

/// A serial number, padded with zeroes.
pub type Serial = [u8; SERIAL_SIZE];

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
                (Some(image), _) => Contents::Image(image.clone()),
                (None, Some(bytes)) => Contents::Null(bytes),
                (None, None) => return Err("--socket needs --image".into()),
            };
            disks.push(self.with_defaults(socket.clone(), contents));
        }
        for text in &self.disks {
            let disk = self.parse_disk(text);
            disks.push(disk.map_err(|reason| format!("--disk {text}: {reason}"))?);
        }
        Ok(disks)
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
        DiskArguments {
            socket,
            contents,
            read_only: self.read_only,
            queues: self.queues,
            queue_size: self.queue_size,
            serial: self.serial,
            direct: self.direct,
        }
    }

    fn parse_disk(&self, text: &str) -> Result<DiskArguments, String> {
        let (mut socket, mut contents) = (None, None);
        let mut disk = self.with_defaults(PathBuf::new(), Contents::Null(0));
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match key {
                "socket" => socket = Some(PathBuf::from(value)),
                "image" => contents = Some(Contents::Image(PathBuf::from(value))),
                "null" => contents = Some(Contents::Null(parse_size(value)?)),
                "read-only" if value.is_empty() => disk.read_only = true,
                "queues" => {
                    let queues = value
                        .parse()
                        .ok()
                        .filter(|queues| (1..=64).contains(queues));
                    disk.queues = queues.ok_or("queues= takes 1 to 64")?;
                }
                "queue-size" => disk.queue_size = parse_queue_size(value)?,
                "serial" => disk.serial = parse_serial(value)?,
                "direct" => disk.direct = Direct::from_str(value, false)?,
                _ => return Err(format!("unknown key {key:?}")),
            }
        }
        disk.socket = socket.ok_or("socket= is missing")?;
        disk.contents = contents.ok_or("image= is missing")?;
        Ok(disk)
    }
}

fn parse_serial(text: &str) -> Result<Serial, String> {
    let mut serial = [0; SERIAL_SIZE];
    let field = serial
        .get_mut(..text.len())
        .ok_or_else(|| format!("{} bytes, but virtio-blk has room for 20", text.len()))?;
    field.copy_from_slice(text.as_bytes());
    Ok(serial)
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
