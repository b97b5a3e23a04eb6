//! `keelson-blk`: serves one disk to one virtual machine over vhost-user.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use keelson_blk::config_space::capacity_bytes;
use keelson_blk::disk::{Disk, SERIAL_SIZE};
use keelson_blk::image::{DirectMode, Image, ImageOptions};
use keelson_blk::server::{Server, ServerOptions, Stopper};
use keelson_blk::{Error, bus_fault, uring};
use serde_json::json;

/// Serves a raw file or a block device as a vhost-user-blk disk, on io_uring.
///
/// Prints one line of JSON when it is ready, then serves one frontend after another until
/// SIGTERM. Exit codes: 0 stopped, 1 runtime failure, 2 usage, 3 the image can't be opened,
/// 4 the image is in use, 5 io_uring is unavailable, 6 the socket can't be bound.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Unix socket to listen on
    #[arg(long)]
    socket: PathBuf,
    /// Raw image file or block device
    #[arg(long)]
    image: PathBuf,
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
    /// What to log to stderr, in RUST_LOG's syntax
    #[arg(long, default_value = "info")]
    log_level: tracing_subscriber::EnvFilter,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Direct {
    /// Where the file allows it
    Auto,
    /// Or refuse to start
    On,
    /// Through the page cache
    Off,
}

type Serial = [u8; SERIAL_SIZE];

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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(arguments.log_level.clone())
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keelson-blk: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Error> {
    let stopper = Stopper::new()?;
    stop_on_signals(&stopper)?;
    bus_fault::install().map_err(|source| Error::Io {
        action: "can't handle SIGBUS".into(),
        source,
    })?;
    uring::check_available()?;
    let image = Image::open(&ImageOptions {
        path: arguments.image.clone(),
        read_only: arguments.read_only,
        direct: match arguments.direct {
            Direct::Auto => DirectMode::Auto,
            Direct::On => DirectMode::On,
            Direct::Off => DirectMode::Off,
        },
    })?;
    let ready = json!({
        "ready": true,
        "capacity_bytes": capacity_bytes(&image),
        "direct": image.direct().is_some(),
        "read_only": image.read_only(),
    });
    let disk = Disk::new(image, arguments.serial);
    let options = ServerOptions {
        socket: arguments.socket.clone(),
        queues: arguments.queues,
        queue_size: arguments.queue_size,
    };
    let server = Server::bind(options, Arc::new(disk), stopper)?;
    announce(&ready).map_err(|source| Error::Io {
        action: "can't print the ready line".into(),
        source,
    })?;
    server.run()
}

fn announce(ready: &serde_json::Value) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{ready}")?;
    stdout.flush()
}

// Blocks the signals in this thread before any other starts, so that they all inherit it, and
// waits for them in a thread of their own.
fn stop_on_signals(stopper: &Stopper) -> Result<(), Error> {
    let failed = |action: &str, source: io::Error| Error::Io {
        action: action.into(),
        source,
    };
    // SAFETY: sigset_t is plain data, filled by sigemptyset before it is used, and all
    // pointers are to this frame.
    let signals = unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGTERM);
        libc::sigaddset(&raw mut signals, libc::SIGINT);
        let error =
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
        if error != 0 {
            return Err(failed(
                "can't block signals",
                io::Error::from_raw_os_error(error),
            ));
        }
        signals
    };
    let stopper = stopper.clone();
    let thread = std::thread::Builder::new().name("signals".into());
    let wait = move || {
        let mut signal = 0;
        // SAFETY: both pointers are to this closure's own values.
        while unsafe { libc::sigwait(&raw const signals, &raw mut signal) } == 0 {
            tracing::info!(signal, "stopping");
            stopper.stop();
        }
    };
    thread
        .spawn(wait)
        .map(|_| ())
        .map_err(|error| failed("can't start the signal thread", error))
}
