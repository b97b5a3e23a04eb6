//! `keelson-vmm`: runs one guest, and looks after snapshots.

mod log_limit;
mod tool;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use keelson_vmm::VmmError;
use keelson_vmm::config::GuestConfig;
use keelson_vmm::guest::{JailOptions, Launch, Restore};
use keelson_vmm::isolation::JailUser;
use keelson_vmm::isolation::seccomp::Mode;
use keelson_vmm::isolation::supervisor::{self, Role};
use keelson_vmm::snapshot::Snapshot;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use log_limit::LogLimit;

/// Runs one guest on /dev/kvm.
///
/// Exit codes: 0 the guest shut down or was killed by request, 1 runtime failure, 2 bad
/// configuration or usage, 3 kernel, initrd, snapshot or a guest on its way can't be loaded, 4 no /dev/kvm or no
/// permission, 5 disk backend or TAP can't be connected. The last line on stderr says why.
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Arguments {
    #[command(flatten)]
    run: RunArguments,
    #[command(subcommand)]
    tool: Option<tool::Tool>,
}

#[derive(clap::Args)]
struct RunArguments {
    /// The guest's configuration, a JSON file. With --restore it may be left out; a clone's has a
    /// name, sockets, TAPs and addresses of its own, and the snapshot's hardware.
    #[arg(long, value_name = "GUEST.json", required_unless_present = "restore")]
    config: Option<PathBuf>,
    /// The Unix socket on which to serve the guest's API.
    #[arg(long, value_name = "PATH", required = true)]
    api_socket: Option<PathBuf>,
    /// Go on from the snapshot in this directory instead of booting the kernel.
    #[arg(long, value_name = "DIRECTORY")]
    restore: Option<PathBuf>,
    /// Compare the snapshot's memory with its checksums first, which reads all of it.
    #[arg(long, requires = "restore")]
    verify: bool,
    /// Note what a restored guest writes, so that its first snapshot can be differential.
    #[arg(long, requires = "restore")]
    track_dirty_pages: bool,
    /// Wait for a guest that another process sends (`migrate` of its API), instead of booting: a program
    /// asks this one's API to `receive` it, carries the stream between them, and then has it resumed.
    #[arg(long, conflicts_with = "restore")]
    incoming: bool,
    /// Run as this user in namespaces of its own (mount, PID, network, IPC, host name), with nothing
    /// in its root and its Landlock rules but the snapshot to restore, the folders of the disks'
    /// sockets, which the user must be able to write, and so the folder of the console's log. Needs
    /// root.
    #[arg(long, value_name = "UID:GID")]
    jail: Option<JailUser>,
    /// In a jail, the folder in which snapshots may be taken, which the user must be able to write.
    #[arg(long, value_name = "DIRECTORY", requires = "jail")]
    snapshot_directory: Option<PathBuf>,
    /// In a jail, a folder with the sockets of disks that are added later.
    #[arg(long, value_name = "DIRECTORY", requires = "jail")]
    disk_directory: Option<PathBuf>,
    /// What becomes of a system call that the thread has no need for.
    #[arg(long, value_enum, default_value = "enforce")]
    seccomp: Mode,
    /// What to log to stderr: `warn`, or `info,keelson_vmm=debug`.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log_level: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(tool) = arguments.tool {
        return match tool.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => fail(e.exit_code(), &e.to_string()),
        };
    }
    let arguments = arguments.run;
    // Without filters by spans and fields, whose regular expressions would be much of the program.
    let filter: Targets = match arguments.log_level.parse() {
        Ok(filter) => filter,
        Err(e) => return fail(2, &format!("--log-level {}: {e}", arguments.log_level)),
    };
    let output = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_filter(LogLimit::new());
    tracing_subscriber::registry()
        .with(output)
        .with(filter)
        .init();
    let result = launch(arguments).and_then(|mut launch| {
        let Some(jail) = &mut launch.jail else {
            return keelson_vmm::guest::run(&launch);
        };
        match supervisor::split()? {
            Role::Inside(supervisor) => {
                jail.supervisor = Some(supervisor);
                keelson_vmm::guest::run(&launch)
            }
            Role::Supervisor(child) => {
                let config = launch.config;
                let mut sockets = vec![launch.api_socket, config.console.socket];
                sockets.extend(config.vsock.map(|vsock| vsock.socket));
                std::process::exit(supervisor::supervise(&child, &sockets, launch.seccomp).into());
            }
        }
    });
    match result {
        Ok(exit) => fail(u8::from(exit.reason.is_failure()), &exit.message),
        Err(e) => fail(e.exit_code(), &e.to_string()),
    }
}

fn launch(arguments: RunArguments) -> Result<Launch, VmmError> {
    let config = match (&arguments.config, &arguments.restore) {
        (Some(config), _) => GuestConfig::load(config)?,
        (None, Some(directory)) => Snapshot::open(directory)?.state().config()?,
        // The arguments' parser asks for one of them.
        (None, None) => GuestConfig::load(std::path::Path::new(""))?,
    };
    let mut config = config;
    let mut restore = arguments.restore;
    if arguments.jail.is_some() {
        // In the jail there are no symbolic links on the way.
        resolve(&mut config.console.log);
        for disk in &mut config.disks {
            resolve(&mut disk.socket);
        }
        if let Some(vsock) = &mut config.vsock {
            resolve(&mut vsock.socket);
        }
        restore = restore.map(|path| path.canonicalize().unwrap_or(path));
    }
    Ok(Launch {
        config,
        api_socket: arguments.api_socket.unwrap_or_default(),
        restore: restore.map(|directory| Restore {
            directory,
            verify: arguments.verify,
            track_dirty_pages: arguments.track_dirty_pages,
        }),
        incoming: arguments.incoming,
        seccomp: arguments.seccomp,
        jail: arguments.jail.map(|user| JailOptions {
            user,
            supervisor: None,
            snapshot_directory: canonical(arguments.snapshot_directory),
            disk_directory: canonical(arguments.disk_directory),
        }),
    })
}

fn canonical(path: Option<PathBuf>) -> Option<PathBuf> {
    path.map(|path| path.canonicalize().unwrap_or(path))
}

/// Makes a path one without symbolic links, apart from its last part. What isn't there stays as it
/// is, and is an error later.
fn resolve(path: &mut PathBuf) {
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    if let (Some(folder), Some(name)) = (folder, path.file_name()) {
        *path = folder.join(name);
    }
}

/// Says why the process ends, and with which code.
fn fail(code: u8, reason: &str) -> ExitCode {
    eprintln!("{reason}");
    ExitCode::from(code)
}
