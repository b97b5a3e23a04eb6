//! The command line client of the host agent.

mod apply;
mod client;
mod completion;
mod console;
mod delete;
mod describe;
mod disk;
mod events;
mod failure;
mod get;
mod host;
mod logs;
mod migrate;
mod net;
mod output;
mod power;
mod schedule;
mod snapshot;
mod top;
mod wait;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use keelson_agent::config::DEFAULT_SOCKET;

use crate::client::Client;
use crate::failure::Failure;

/// Runs and inspects the guests of a host.
///
/// Exit codes: 0 done, 1 failure, 2 wrong usage, 3 not found, 4 the manifest is wrong, 5 what it
/// needs is missing or taken, 6 the agent can't be reached, 7 the time limit passed.
#[derive(Parser)]
#[command(version, infer_subcommands = true)]
struct Arguments {
    /// The agent's Unix socket.
    #[arg(long, global = true, env = "KEELSON_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create or change all objects of a manifest, or none of them.
    Apply(apply::Apply),
    /// List objects, or show one.
    Get(get::Get),
    /// Show one object with its conditions and events.
    Describe(describe::Describe),
    /// Delete objects, and what belongs to them.
    Delete(delete::Delete),
    /// Start a guest.
    Start(power::Start),
    /// Shut a guest down: its power button first, a kill after its time limit.
    Stop(power::Stop),
    /// Let a guest stand still, in the middle of whatever it does.
    Pause(snapshot::Pause),
    /// Let a guest that stands still go on.
    Resume(snapshot::Resume),
    /// Move a running guest to another host, without shutting it down.
    Migrate(migrate::Migrate),
    /// Take guests' snapshots and look after them.
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Start a guest from a snapshot instead of its kernel.
    Restore(snapshot::Restore),
    /// Wait until an object is in a condition.
    Wait(wait::Wait),
    /// Use a guest's serial console; Ctrl-] leaves it.
    Console(console::Console),
    /// Print the log of a guest's serial console.
    Logs(logs::Logs),
    /// Show what happened to objects.
    Events(events::Events),
    /// Take snapshots of disks, and show what guests do with them.
    #[command(subcommand)]
    Disk(disk::Disk),
    /// Show what guests' network interfaces passed and dropped.
    #[command(subcommand)]
    Net(net::Net),
    /// Show what the agent's host is.
    Host(host::Host),
    /// Place no further guests on a host.
    Cordon(schedule::Cordon),
    /// Place guests on a host again.
    Uncordon(schedule::Uncordon),
    /// Have the guests leave a host: each is moved to another host, or shut down and started there.
    Drain(schedule::Drain),
    /// Show what guests use of this host, once a second.
    Top(top::Top),
    /// Print a script that completes this program's command lines in a shell.
    Completion(completion::Completion),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(run(arguments));
            // A read of standard input that never ends must not keep the process.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(Failure::from(anyhow::Error::from(error))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("keelson: {failure}");
            failure.exit_code()
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), Failure> {
    let mut client = Client::connect(&arguments.socket);
    match arguments.command {
        Command::Apply(command) => command.run(&mut client).await,
        Command::Get(command) => command.run(&mut client).await,
        Command::Describe(command) => command.run(&mut client).await,
        Command::Delete(command) => command.run(&mut client).await,
        Command::Start(command) => command.run(&mut client).await,
        Command::Stop(command) => command.run(&mut client).await,
        Command::Pause(command) => command.run(&mut client).await,
        Command::Resume(command) => command.run(&mut client).await,
        Command::Migrate(command) => command.run(&mut client).await,
        Command::Snapshot(command) => command.run(&mut client).await,
        Command::Restore(command) => command.run(&mut client).await,
        Command::Wait(command) => command.run(&mut client).await,
        Command::Console(command) => command.run(&mut client).await,
        Command::Logs(command) => command.run(&mut client).await,
        Command::Events(command) => command.run(&mut client).await,
        Command::Disk(command) => command.run(&mut client).await,
        Command::Net(command) => command.run(&mut client).await,
        Command::Host(command) => command.run(&mut client).await,
        Command::Cordon(command) => command.run(&mut client).await,
        Command::Uncordon(command) => command.run(&mut client).await,
        Command::Drain(command) => command.run(&mut client).await,
        Command::Top(command) => command.run(&mut client).await,
        Command::Completion(command) => command.run(&mut Arguments::command()),
    }
}
