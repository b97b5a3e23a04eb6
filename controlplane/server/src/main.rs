//! `keelson-state`: a member of a replicated state store that speaks etcd v3's API.

mod again;
mod check;
mod compactor;
mod disk;
mod driver;
mod ending;
mod grpc;
mod http;
mod identity;
mod listen;
mod maintenance;
mod metrics;
mod node;
mod open;
mod options;
mod peers;
mod recover;
mod room;
mod serve;
mod snapshot;
mod stall;
mod tls;
mod token;

use std::io::IsTerminal as _;

use clap::Parser as _;

use crate::options::{Command, Options};

fn main() -> std::process::ExitCode {
    let options = Options::parse();
    let filter = tracing_subscriber::EnvFilter::try_new(&options.log_level).unwrap_or_default();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let outcome = match &options.command {
        Some(Command::Snapshot(command)) => snapshot::run(command),
        Some(Command::Recover {
            from,
            member,
            bump_revision,
        }) => recover::run(from, member, *bump_revision),
        None => serve::run(&options),
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
