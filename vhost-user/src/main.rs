//! `keelson-blk`: serves disks to virtual machines over vhost-user.

mod arguments;
mod cli;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use clap::Parser;
use clap::error::ErrorKind;
use keelson_blk::catalog::{Catalog, DiskStatus};
use keelson_blk::control::ControlServer;
use keelson_blk::isolation::{self, AllowedPaths, Role};
use keelson_blk::rate_limit::Limits;
use keelson_blk::worker::WorkerPool;
use keelson_blk::{Error, bus_fault, uring};
use serde_json::json;

use arguments::{Arguments, Command, DiskArguments};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(arguments.log_level.clone())
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    let outcome = match &arguments.command {
        Some(Command::Image(command)) => cli::image::run(command),
        Some(Command::Control(command)) => return cli::control::run(command),
        None => {
            let wrong = |reason: String| -> ! {
                use clap::CommandFactory;
                let error = Arguments::command().error(ErrorKind::ValueValidation, reason);
                error.exit()
            };
            let disks = arguments.disks().unwrap_or_else(|reason| wrong(reason));
            let groups = arguments.groups().unwrap_or_else(|reason| wrong(reason));
            let paths = arguments.allowed_paths(&disks);
            let paths = paths.unwrap_or_else(|reason| wrong(reason));
            serve(&arguments, disks, &groups, paths)
        }
    };
    match outcome {
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

fn serve(
    arguments: &Arguments,
    disks: Vec<DiskArguments>,
    groups: &[(String, Limits)],
    paths: AllowedPaths,
) -> Result<(), Error> {
    let (sender, events) = mpsc::channel();
    let signals = block_signals()?;
    let isolate = |source| Error::Io {
        action: "can't isolate the process".into(),
        source,
    };
    isolation::start(arguments.sandbox, paths).map_err(isolate)?;
    take_signals(signals, sender.clone())?;
    bus_fault::install().map_err(|source| Error::Io {
        action: "can't handle SIGBUS".into(),
        source,
    })?;
    uring::check_available()?;
    let workers = WorkerPool::new(arguments.worker_options());
    let catalog = Arc::new(Catalog::new(workers));
    for (group, limits) in groups {
        catalog.limit_group(group, *limits)?;
    }
    let mut described = Vec::new();
    for disk in disks {
        let cipher = cli::key::read(disk.key_fd)?;
        let sender = sender.clone();
        let ended = move || {
            // Fails only when the process is about to end.
            let _ = sender.send(Event::Ended);
        };
        described.push(describe(&catalog.add(disk.spec, cipher, ended)?));
    }
    let control = arguments.control.as_deref();
    let _control = control
        .map(|path| ControlServer::start(path, Arc::clone(&catalog)))
        .transpose()?;
    // The disks of the command line are open. Later ones are opened by threads that are restricted.
    isolation::enter(Role::Control).map_err(|error| isolate(error.into()))?;
    announce(described).map_err(|source| Error::Io {
        action: "can't print the ready line".into(),
        source,
    })?;
    for event in events {
        match event {
            Event::Stop | Event::Ended => break,
            Event::Resize => catalog.resize_all(),
        }
    }
    catalog.stop()
}

fn describe(disk: &DiskStatus) -> serde_json::Value {
    json!({
        "id": disk.spec.id,
        "socket": disk.spec.socket,
        "capacity_bytes": disk.capacity_bytes,
        "direct": disk.uncached,
        "read_only": disk.spec.read_only,
    })
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

// Blocks the signals in this thread before any other starts, so that they all inherit it.
fn block_signals() -> Result<libc::sigset_t, Error> {
    // SAFETY: sigset_t is plain data, filled by sigemptyset before it is used, and all
    // pointers are to this frame.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut signals, signal);
        }
        let error =
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
        if error != 0 {
            return Err(Error::Io {
                action: "can't block signals".into(),
                source: io::Error::from_raw_os_error(error),
            });
        }
        Ok(signals)
    }
}

// Waits for the signals in a thread of their own.
fn take_signals(signals: libc::sigset_t, events: mpsc::Sender<Event>) -> Result<(), Error> {
    let wait = move || {
        if let Err(error) = isolation::enter(Role::Signals) {
            tracing::error!(%error, "no signals are heard");
            return;
        }
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
    let started = isolation::spawn("signals", 128 << 10, wait);
    started.map(drop).map_err(|source| Error::Io {
        action: "can't start the signal thread".into(),
        source,
    })
}
