//! Setting up io_uring instances on kernels from 6.1 on.

use std::io;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode};

use crate::Error;

/// Creates a ring for the calling thread, the only one that may use it.
///
/// With `submission_poll`, a kernel thread takes the operations out and sleeps after that time
/// without any. Leaves out the setup flags that an older kernel refuses.
pub fn create(entries: u32, submission_poll: Option<Duration>) -> io::Result<IoUring> {
    if let Some(idle) = submission_poll {
        let idle = u32::try_from(idle.as_millis()).unwrap_or(u32::MAX);
        return IoUring::builder()
            .setup_sqpoll(idle.max(1))
            .dontfork()
            .build(entries);
    }
    let best = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .dontfork()
        .build(entries);
    match best {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().dontfork().build(entries)
        }
        other => other,
    }
}

/// Finds out, before anything is promised, whether this process may use io_uring and whether
/// the kernel knows the operations.
pub fn check_available() -> Result<(), Error> {
    let ring = create(4, None).map_err(|error| Error::UringUnavailable {
        reason: explain(&error),
    })?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|error| Error::UringUnavailable {
            reason: format!("asking for its operations failed ({error}); the kernel is too old"),
        })?;
    let needed = [
        (opcode::Readv::CODE, "readv"),
        (opcode::Writev::CODE, "writev"),
        (opcode::Read::CODE, "read"),
        (opcode::Write::CODE, "write"),
        (opcode::Fsync::CODE, "fsync"),
        (opcode::Fallocate::CODE, "fallocate"),
        (opcode::PollAdd::CODE, "poll_add"),
        (opcode::AsyncCancel::CODE, "async_cancel"),
    ];
    match needed.iter().find(|(code, _)| !probe.is_supported(*code)) {
        None => Ok(()),
        Some((_, name)) => Err(Error::UringUnavailable {
            reason: format!("the kernel lacks its operation {name}; use Linux 6.1 or later"),
        }),
    }
}

fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => match disabled_sysctl() {
            Some(level @ ("1" | "2")) => format!(
                "the sysctl kernel.io_uring_disabled is {level}; set it to 0, for example: \
                 sysctl -w kernel.io_uring_disabled=0"
            ),
            _ => "the kernel forbids it to this process (EPERM), by a seccomp filter or security \
                  module; allow io_uring_setup, io_uring_enter and io_uring_register"
                .into(),
        },
        Some(libc::ENOSYS) => "the kernel has none, or a seccomp filter hides it (ENOSYS); use \
                               Linux 6.1 or later and allow io_uring_setup"
            .into(),
        Some(libc::ENOMEM) => "no memory for a ring (ENOMEM); raise the limit of locked memory \
                               (ulimit -l, LimitMEMLOCK=)"
            .into(),
        _ => error.to_string(),
    }
}

fn disabled_sysctl() -> Option<&'static str> {
    let text = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?;
    match text.trim() {
        "1" => Some("1"),
        "2" => Some("2"),
        _ => None,
    }
}
