//! `keelson-blk control`: one request to a running keelson-blk.

use std::io::{self, Write};
use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use keelson_blk::catalog::{BaseSpec, Contents, DiskSpec};
use keelson_blk::control::{ControlError, Request, call};
use keelson_blk::image::DirectMode;
use keelson_blk::rate_limit::{Limits, Rate};
use serde_json::Value;

use super::size;
use crate::arguments::{DiskArguments, Format, parse_disk};

/// The arguments of `keelson-blk control`.
#[derive(Debug, Args)]
pub struct ControlCommand {
    /// The control socket
    #[arg(short, long)]
    socket: PathBuf,
    #[command(subcommand)]
    request: ControlRequest,
}

#[derive(Debug, Subcommand)]
enum ControlRequest {
    /// Show all disks with their counters and times, and all groups, as JSON
    #[command(visible_alias = "stats")]
    List,
    /// Show the counters of all disks in Prometheus' text format
    Metrics,
    /// Serve one more disk: the keys and values of --disk
    Add {
        /// socket=PATH,image=PATH,…
        #[arg(value_name = "KEY=VALUE,…")]
        disk: String,
    },
    /// Stop serving a disk
    Remove {
        /// Its name
        id: String,
    },
    /// Make a disk larger, or take over the size that its image has by now
    Resize {
        /// Its name
        id: String,
        /// The new size, for example 20G
        #[arg(value_parser = size::parse)]
        size: Option<u64>,
    },
    /// Make a snapshot of an overlay, and go on in a new layer
    Snapshot {
        /// The disk's name
        id: String,
        /// The snapshot's
        name: String,
    },
    /// Change a disk's limits, or a group's with --group; what isn't given is not limited
    Limit {
        /// The disk's name, or the group's
        name: String,
        /// It is a group
        #[arg(long)]
        group: bool,
        /// Bytes in a second (K, M, G)
        #[arg(long, value_parser = size::parse)]
        bytes_per_second: Option<u64>,
        /// Bytes at once after idle time
        #[arg(long, value_parser = size::parse)]
        bytes_burst: Option<u64>,
        /// Requests in a second
        #[arg(long)]
        operations_per_second: Option<u64>,
        /// Requests at once after idle time
        #[arg(long)]
        operations_burst: Option<u64>,
    },
}

/// Sends the request and prints the answer. Exit codes: 0 done, 1 it can't be reached or has
/// failed, 2 usage, 3 there is no such disk.
pub fn run(command: &ControlCommand) -> ExitCode {
    let (request, key_fd) = match request(&command.request) {
        Ok(request) => request,
        Err(reason) => {
            eprintln!("keelson-blk: {reason}");
            return ExitCode::from(2);
        }
    };
    // SAFETY: the caller handed the descriptor over to this process, which does not close it.
    let key = key_fd.map(|descriptor| unsafe { BorrowedFd::borrow_raw(descriptor) });
    match call(&command.socket, &request, key) {
        Ok(answer) => match print(&answer) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("keelson-blk: can't print: {error}");
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            eprintln!("keelson-blk: {error}");
            match error {
                ControlError::Refused(body) if body.kind == "not_found" => ExitCode::from(3),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn print(answer: &Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match answer.get("text").and_then(Value::as_str) {
        Some(text) => write!(out, "{text}"),
        None => writeln!(out, "{answer}"),
    }
}

fn request(command: &ControlRequest) -> Result<(Request, Option<RawFd>), String> {
    let request = match command {
        ControlRequest::List => Request::List,
        ControlRequest::Metrics => Request::Metrics,
        ControlRequest::Add { disk } => {
            let mut arguments = DiskArguments {
                spec: defaults(),
                key_fd: None,
            };
            parse_disk(disk, &mut arguments, Format::Raw)?;
            let (disk, key) = (arguments.spec, arguments.key_fd.is_some());
            return Ok((Request::Add { disk, key }, arguments.key_fd));
        }
        ControlRequest::Remove { id } => Request::Remove { id: id.clone() },
        ControlRequest::Resize { id, size } => Request::Resize {
            id: id.clone(),
            bytes: *size,
        },
        ControlRequest::Snapshot { id, name } => Request::Snapshot {
            id: id.clone(),
            name: name.clone(),
        },
        ControlRequest::Limit {
            name,
            group,
            bytes_per_second,
            bytes_burst,
            operations_per_second,
            operations_burst,
        } => {
            let rate = |per_second: &Option<u64>, burst: &Option<u64>| {
                per_second.map(|per_second| Rate {
                    per_second,
                    burst: *burst,
                })
            };
            let limits = Limits {
                bytes: rate(bytes_per_second, bytes_burst),
                operations: rate(operations_per_second, operations_burst),
            };
            if *group {
                let group = name.clone();
                Request::LimitGroup { group, limits }
            } else {
                let id = name.clone();
                Request::Limit { id, limits }
            }
        }
    };
    Ok((request, None))
}

fn defaults() -> DiskSpec {
    DiskSpec {
        id: String::new(),
        socket: PathBuf::new(),
        contents: Contents::Null(0),
        read_only: false,
        queues: 1,
        queue_size: 1024,
        serial: String::new(),
        direct: DirectMode::Auto,
        io_poll: false,
        limits: Limits::default(),
        group: None,
        base: BaseSpec::default(),
    }
}
