//! The keelson-blk process of one disk of a guest.

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use keelson_api::{DiskSpec, MemorySize};
use keelson_blk::control::{ControlError, Request, call};
use keelson_blk::rate_limit::{Limits, Rate};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{GuestPaths, disk_image};
use crate::failpoint::failpoint;
use crate::fleet::LeaseCheck;
use crate::host::{LaunchRequest, ProcessHandle};
use crate::{AgentError, error::Result};

/// How long a backend may take to open its image and listen.
const READY_LIMIT: Duration = Duration::from_secs(10);
const READY_POLL: Duration = Duration::from_millis(2);
/// How long a backend may take to do what it is asked to.
const CONTROL_LIMIT: Duration = Duration::from_secs(10);
/// The kinds of its refusals that are about the disk.
const REFUSALS: [&str; 3] = ["bad_request", "image", "in_use"];

/// What a started keelson-blk says on its first line.
#[derive(Debug, Serialize, Deserialize)]
struct Ready {
    ready: bool,
}

/// Starts the backend of a disk, whose image is there, and waits until it listens.
///
/// # Errors
/// [`AgentError::Process`] with the backend's own reason.
pub async fn start(
    programs: &Path,
    paths: &GuestPaths,
    guest: &str,
    disk: &str,
    spec: &DiskSpec,
    lease: Option<LeaseCheck>,
) -> Result<ProcessHandle> {
    let key = disk_image::key(spec)?;
    let mut arguments = vec![
        "--socket".into(),
        paths.disk_socket(disk).into(),
        "--control".into(),
        paths.disk_control(disk).into(),
        "--id".into(),
        disk.into(),
        "--image".into(),
        spec.path.clone().into(),
        "--queues".into(),
        spec.queues.to_string().into(),
        "--serial".into(),
        disk.into(),
    ];
    if spec.read_only {
        arguments.push("--read-only".into());
    }
    if spec.is_overlay() {
        arguments.extend(["--format".into(), "overlay".into()]);
    }
    let base = spec.base.as_ref();
    if let Some(file) = base.and_then(|base| base.ca_file.clone()) {
        arguments.extend(["--base-ca-file".into(), file.into()]);
    }
    if let Some(rate) = base.and_then(|base| base.fill_bytes_per_second) {
        arguments.extend(["--base-fill".into(), rate.bytes().to_string().into()]);
    }
    if let Some(key) = &key {
        arguments.push("--key-fd".into());
        arguments.push(key.as_raw_fd().to_string().into());
    }
    let rates = [
        (
            "--bytes-per-second",
            spec.limits.bytes_per_second.map(MemorySize::bytes),
        ),
        ("--operations-per-second", spec.limits.operations_per_second),
    ];
    for (option, rate) in rates {
        if let Some(rate) = rate {
            arguments.extend([option.into(), rate.to_string().into()]);
        }
    }
    let request = LaunchRequest {
        program: programs.join("keelson-blk"),
        arguments,
        unit: format!("keelson-disk-{guest}-{disk}"),
        log: paths.disk_log(disk),
        record: paths.disk_record(disk),
        limits: keelson_api::ResourceLimits::default(),
        inherited: key,
        lease,
    };
    let process = ProcessHandle::launch(&request)?;
    match tokio::time::timeout(READY_LIMIT, ready(&process, &request.log)).await {
        Ok(Ok(())) => {
            failpoint(guest, "disk-backend-ready");
            Ok(process)
        }
        Ok(Err(error)) => {
            process.reap();
            Err(error)
        }
        Err(_) => {
            process.kill().await;
            process.reap();
            Err(AgentError::Process {
                reason: "DiskBackendLate",
                message: format!("disk {disk}: keelson-blk was not ready within {READY_LIMIT:?}"),
            })
        }
    }
}

/// Takes over what can change while a disk is served: its limits and its size.
///
/// # Errors
/// [`AgentError::Process`] with the backend's own reason.
pub async fn adjust(
    paths: &GuestPaths,
    disk: &str,
    before: &DiskSpec,
    after: &DiskSpec,
) -> Result<()> {
    if before.limits != after.limits {
        let rate = |per_second| Rate {
            per_second,
            burst: None,
        };
        let limits = after.limits;
        let limits = Limits {
            bytes: limits.bytes_per_second.map(|bytes| rate(bytes.bytes())),
            operations: limits.operations_per_second.map(rate),
        };
        let id = disk.to_owned();
        control(paths, disk, Request::Limit { id, limits }).await?;
    }
    if let Some(size) = after.size.filter(|size| before.size != Some(*size)) {
        let (id, bytes) = (disk.to_owned(), Some(size.bytes()));
        control(paths, disk, Request::Resize { id, bytes }).await?;
    }
    Ok(())
}

/// Has the keelson-blk of a disk do something, and returns its answer.
///
/// # Errors
/// [`AgentError::Precondition`] if it is refused for what the disk is, [`AgentError::Process`] if it
/// fails or isn't answered.
pub async fn control(paths: &GuestPaths, disk: &str, request: Request) -> Result<Value> {
    let socket = paths.disk_control(disk);
    let call = tokio::task::spawn_blocking(move || call(&socket, &request, None));
    let failed = |message: String| AgentError::Process {
        reason: "DiskBackendRefused",
        message: format!("disk {disk}: {message}"),
    };
    match tokio::time::timeout(CONTROL_LIMIT, call).await {
        Ok(Ok(Ok(answer))) => Ok(answer),
        Ok(Ok(Err(ControlError::Refused(body)))) if REFUSALS.contains(&body.kind.as_str()) => {
            Err(AgentError::Precondition(vec![body.message]))
        }
        Ok(Ok(Err(error))) => Err(failed(error.to_string())),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(_) => Err(failed("keelson-blk doesn't answer".into())),
    }
}

/// Whether the image that is served is no longer the file at its path, which a backend that has it
/// open does not notice.
pub fn image_vanished(process: &ProcessHandle, spec: &DiskSpec) -> bool {
    let Ok(here) = std::fs::metadata(&spec.path) else {
        return true;
    };
    let folder = format!("/proc/{}/fd", process.process_id());
    let Ok(descriptors) = std::fs::read_dir(folder) else {
        return false;
    };
    let mut served = descriptors
        .flatten()
        .filter_map(|entry| std::fs::metadata(entry.path()).ok());
    !served.any(|file| (file.dev(), file.ino()) == (here.dev(), here.ino()))
}

async fn ready(process: &ProcessHandle, log: &Path) -> Result<()> {
    loop {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let is_ready =
            |line: &str| serde_json::from_str(line).is_ok_and(|ready: Ready| ready.ready);
        if text.lines().any(is_ready) {
            return Ok(());
        }
        if let Some(exit) = process.has_ended() {
            // The exit codes of keelson-blk, which its --help lists.
            let reason = match exit.code {
                Some(3) => "DiskUnusable",
                Some(4) => "DiskInUse",
                Some(5) => "IoUringUnavailable",
                _ => "DiskBackendFailed",
            };
            return Err(AgentError::Process {
                reason,
                message: exit.last_line,
            });
        }
        tokio::time::sleep(READY_POLL).await;
    }
}
