//! `keelson-blk`: serves disks to virtual machines over vhost-user.

mod arguments;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use clap::Parser;
use clap::error::ErrorKind;
use keelson_blk::disk::Disk;
use keelson_blk::image::{DirectMode, Image, ImageOptions};
use keelson_blk::layer::BlockDevice;
use keelson_blk::layer::file::FileDevice;
use keelson_blk::layer::null::NullDevice;
use keelson_blk::server::{DiskServer, ServerOptions};
use keelson_blk::worker::WorkerPool;
use keelson_blk::{Error, bus_fault, uring};
use serde_json::json;

use arguments::{Arguments, Contents, Direct, DiskArguments};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(arguments.log_level.clone())
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    let disks = arguments.disks().unwrap_or_else(|reason| {
        use clap::CommandFactory;
        let error = Arguments::command().error(ErrorKind::ValueValidation, reason);
        error.exit()
    });
    match run(&arguments, &disks) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keelson-blk: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// What the main thread waits for.
enum Event {
    Stop,
    Resize,
    /// A disk has ended by itself.
    Ended,
}

fn run(arguments: &Arguments, disks: &[DiskArguments]) -> Result<(), Error> {
    let (sender, events) = mpsc::channel();
    take_signals(sender.clone())?;
    bus_fault::install().map_err(|source| Error::Io {
        action: "can't handle SIGBUS".into(),
        source,
    })?;
    uring::check_available()?;
    let workers = WorkerPool::new(arguments.worker_options());
    let mut servers = Vec::new();
    let mut described = Vec::new();
    for disk in disks {
        let (server, description) = start(disk, &workers, sender.clone())?;
        servers.push(server);
        described.push(description);
    }
    announce(described).map_err(|source| Error::Io {
        action: "can't print the ready line".into(),
        source,
    })?;
    for event in events {
        match event {
            Event::Stop | Event::Ended => break,
            Event::Resize => resize(&servers),
        }
    }
    for server in &servers {
        server.begin_stop();
    }
    let mut outcome = Ok(());
    for server in servers {
        let stopped = server.stop();
        if outcome.is_ok() {
            outcome = stopped;
        }
    }
    outcome
}

fn start(
    arguments: &DiskArguments,
    workers: &Arc<WorkerPool>,
    events: mpsc::Sender<Event>,
) -> Result<(DiskServer, serde_json::Value), Error> {
    let (device, direct): (Arc<dyn BlockDevice>, bool) = match &arguments.contents {
        Contents::Null(bytes) => (Arc::new(NullDevice::new(*bytes)), true),
        Contents::Image(path) => {
            let image = Image::open(&ImageOptions {
                path: path.clone(),
                read_only: arguments.read_only,
                direct: match arguments.direct {
                    Direct::Auto => DirectMode::Auto,
                    Direct::On => DirectMode::On,
                    Direct::Off => DirectMode::Off,
                },
            })?;
            let direct = image.direct().is_some();
            (Arc::new(FileDevice::new(Arc::new(image))), direct)
        }
    };
    let disk = Arc::new(Disk::new(device, arguments.serial));
    let description = json!({
        "socket": arguments.socket,
        "capacity_bytes": disk.capacity_bytes(),
        "direct": direct,
        "read_only": disk.properties().read_only,
    });
    let options = ServerOptions {
        socket: arguments.socket.clone(),
        queues: arguments.queues,
        queue_size: arguments.queue_size,
    };
    let ended = move || {
        // Fails only when the process is about to end.
        let _ = events.send(Event::Ended);
    };
    let server = DiskServer::start(options, disk, Arc::clone(workers), ended)?;
    Ok((server, description))
}

fn resize(servers: &[DiskServer]) {
    for server in servers {
        let socket = server.socket().display();
        match server.resize() {
            Ok(true) => {
                let bytes = server.disk().capacity_bytes();
                tracing::info!(%socket, bytes, "the disk was resized");
            }
            Ok(false) => {}
            Err(error) => tracing::error!(%socket, %error, "the disk can't be resized"),
        }
    }
}

// One disk is described in the line itself, several in a list.
fn announce(mut disks: Vec<serde_json::Value>) -> io::Result<()> {
    let mut ready = if let [_] = disks.as_slice() {
        disks.remove(0)
    } else {
        json!({ "disks": disks })
    };
    ready["ready"] = json!(true);
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{ready}")?;
    stdout.flush()
}

// Blocks the signals in this thread before any other starts, so that they all inherit it, and
// waits for them in a thread of their own.
fn take_signals(events: mpsc::Sender<Event>) -> Result<(), Error> {
    let failed = |action: &str, source: io::Error| Error::Io {
        action: action.into(),
        source,
    };
    // SAFETY: sigset_t is plain data, filled by sigemptyset before it is used, and all
    // pointers are to this frame.
    let signals = unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut signals, signal);
        }
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
    let thread = std::thread::Builder::new()
        .name("signals".into())
        .stack_size(128 << 10);
    let wait = move || {
        let mut signal = 0;
        // SAFETY: both pointers are to this closure's own values.
        while unsafe { libc::sigwait(&raw const signals, &raw mut signal) } == 0 {
            tracing::info!(signal, "told by a signal");
            let event = match signal {
                libc::SIGHUP => Event::Resize,
                _ => Event::Stop,
            };
            if events.send(event).is_err() {
                return;
            }
        }
    };
    thread
        .spawn(wait)
        .map(|_| ())
        .map_err(|error| failed("can't start the signal thread", error))
}
