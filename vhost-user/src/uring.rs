//! Setting up io_uring instances on kernels from 6.1 on.

use std::io;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode};

use crate::Error;

/// Operations that disks need; the kernel refuses every other one on our rings.
const OPERATIONS: [(u8, &str); 10] = [
    (opcode::Readv::CODE, "readv"),
    (opcode::Writev::CODE, "writev"),
    (opcode::Read::CODE, "read"),
    (opcode::Write::CODE, "write"),
    (opcode::ReadFixed::CODE, "read_fixed"),
    (opcode::WriteFixed::CODE, "write_fixed"),
    (opcode::Fsync::CODE, "fsync"),
    (opcode::Fallocate::CODE, "fallocate"),
    (opcode::PollAdd::CODE, "poll_add"),
    (opcode::AsyncCancel::CODE, "async_cancel"),
];
/// What may be registered with a ring: files and buffers, also sparse tables of them, and the probe
/// (`enum io_uring_register_op`, linux/io_uring.h).
const REGISTRATIONS: [u8; 5] = [6, 8, 13, 15, 16];
/// `IOSQE_FIXED_FILE`: operations name files by their place in the ring's table.
const FIXED_FILE: u8 = 1;

/// Creates a ring for the calling thread, the only one that may use it, and for the operations that
/// disks need alone.
///
/// With `submission_poll`, a kernel thread takes the operations out and sleeps after that time
/// without any. Leaves out the setup flags that an older kernel refuses.
pub fn create(entries: u32, submission_poll: Option<Duration>) -> io::Result<IoUring> {
    let builder = || {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_r_disabled();
        builder
    };
    if let Some(idle) = submission_poll {
        let idle = u32::try_from(idle.as_millis()).unwrap_or(u32::MAX);
        return restrict(builder().setup_sqpoll(idle.max(1)).build(entries)?);
    }
    let best = builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(entries);
    match best {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            restrict(builder().build(entries)?)
        }
        other => restrict(other?),
    }
}

// Whoever finds a way to put entries into the ring reaches nothing but the disks' own files and
// memory with them (io_uring_register(2), IORING_REGISTER_RESTRICTIONS).
fn restrict(ring: IoUring) -> io::Result<IoUring> {
    let operations = OPERATIONS
        .iter()
        .map(|(code, _)| Restriction::sqe_op(*code));
    let registrations = REGISTRATIONS.iter().map(|op| Restriction::register_op(*op));
    let mut restrictions: Vec<_> = operations.chain(registrations).collect();
    restrictions.push(Restriction::sqe_flags_allowed(FIXED_FILE));
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
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
    match OPERATIONS
        .iter()
        .find(|(code, _)| !probe.is_supported(*code))
    {
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

#[cfg(test)]
mod tests {
    use io_uring::types;

    use super::*;

    #[test]
    fn a_ring_does_what_disks_need_and_nothing_else() {
        let mut ring = create(8, None).unwrap();
        let path = c"/etc/passwd";
        let entries = [
            opcode::Nop::new().build(),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Fsync::new(types::Fd(-1)).build(),
        ];
        let mut results = Vec::new();
        for entry in entries {
            // SAFETY: the path outlives the operation, which is waited for.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            results.extend(ring.completion().map(|done| done.result()));
        }
        let refused = -libc::EACCES;
        assert_eq!(results, [refused, refused, refused, -libc::EBADF]);
        let registered = ring.submitter().register_personality();
        assert_eq!(registered.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
