//! The system calls that each role may make (seccomp(2)). A thread has the list of the one that starts
//! it as well, so the starter's has all of the others'.
//!
//! A call that isn't listed is not made: the process says which it was and ends.

use keelson_isolation::{Argument, Mode, RestrictError, SystemCalls, refuse};

use super::Role;

/// Its ring, which knows operations on its files alone, and registering them.
const WORKER: &[i64] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_poll,
    libc::SYS_ppoll,
];

/// Contents of open files.
const LAYER: &[i64] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_statx,
];

/// The vhost-user protocol over a connection that is accepted.
const DISK: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_eventfd2,
    libc::SYS_getsockopt,
    libc::SYS_memfd_create,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// HTTP, and the names of servers, which are resolved in threads.
const FETCH: &[i64] = &[
    // Answered ENOSYS by a filter of its own.
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_newfstatat,
    libc::SYS_prctl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_uname,
    // Of the session of an overlay that it was the last to use.
    libc::SYS_unlink,
];

/// Opening and locking images, snapshots, sockets.
const CONTROL: &[i64] = &[
    libc::SYS_access,
    libc::SYS_bind,
    libc::SYS_fchmod,
    libc::SYS_fstatfs,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_listen,
    libc::SYS_mkdir,
    libc::SYS_mlock,
    libc::SYS_munlock,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_statfs,
    libc::SYS_unlink,
];

const SIGNALS: &[i64] = &[libc::SYS_rt_sigtimedwait];

/// What threads do before they enter their role.
const STARTER: &[i64] = &[
    libc::SYS_io_uring_setup,
    444, // landlock_create_ruleset
    445, // landlock_add_rule
    446, // landlock_restrict_self
    libc::SYS_sched_setaffinity,
    libc::SYS_seccomp,
];

/// Restricts the calling thread, and those that it starts.
pub(super) fn restrict(role: Role, mode: Mode) -> Result<(), RestrictError> {
    if role == Role::Starter && mode != Mode::Off {
        // Its flags are in memory, where no filter sees them; glibc then uses clone.
        refuse(libc::SYS_clone3, libc::ENOSYS)?;
    }
    if !role.opens_files() && mode == Mode::Enforce {
        // glibc looks into /proc before it gives memory back, and does without.
        refuse(libc::SYS_openat, libc::EACCES)?;
    }
    list(role).enforce(mode)
}

fn list(role: Role) -> SystemCalls {
    let mut calls = SystemCalls::of(match role {
        Role::Worker => &[WORKER],
        Role::Layer => &[LAYER],
        Role::Disk => &[LAYER, DISK],
        Role::Fetch => &[LAYER, FETCH],
        Role::Control => &[LAYER, DISK, FETCH, CONTROL],
        Role::Signals => &[SIGNALS],
        Role::Starter => &[WORKER, LAYER, DISK, FETCH, CONTROL, SIGNALS, STARTER],
    });
    if role.opens_files() {
        // Resolving names may load libraries for it.
        calls.allow(libc::SYS_mmap).allow(libc::SYS_mprotect);
        for family in [
            libc::AF_UNIX,
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_NETLINK,
        ] {
            calls.allow_if(libc::SYS_socket, Argument::is(0, family.unsigned_abs()));
        }
        // Sizes of block devices, and whether a socket blocks.
        calls.allow(libc::SYS_ioctl).allow_threads();
    }
    calls
}

#[cfg(test)]
mod tests {
    use keelson_isolation::THREAD_FLAGS;
    use keelson_isolation::trial::{self, ENDED, failed, succeeded};

    use super::*;

    const ALL: [Role; 7] = [
        Role::Worker,
        Role::Layer,
        Role::Disk,
        Role::Fetch,
        Role::Control,
        Role::Signals,
        Role::Starter,
    ];

    /// What comes of a system call in a thread of the role.
    fn outcome_of(role: Role, call: i64, arguments: [u64; 3]) -> i32 {
        trial::outcome_of(|| restrict(role, Mode::Enforce), call, arguments)
    }

    #[test]
    fn nobody_executes_traces_or_mounts() {
        for role in ALL {
            for call in [
                libc::SYS_execve,
                libc::SYS_fork,
                libc::SYS_ptrace,
                libc::SYS_process_vm_writev,
                libc::SYS_mount,
                libc::SYS_unshare,
                libc::SYS_bpf,
                libc::SYS_kill,
                libc::SYS_open,
            ] {
                assert_eq!(outcome_of(role, call, [0; 3]), ENDED, "{role:?} {call}");
            }
            assert_eq!(
                outcome_of(role, libc::SYS_gettid, [0; 3]),
                succeeded(),
                "{role:?}"
            );
        }
    }

    #[test]
    fn those_who_serve_guests_open_no_files_start_no_threads_and_make_no_rings_or_sockets() {
        let internet = u64::try_from(libc::AF_INET).unwrap();
        let executable = u64::try_from(libc::PROT_EXEC).unwrap();
        for role in [Role::Worker, Role::Layer, Role::Disk, Role::Signals] {
            for (call, arguments) in [
                (libc::SYS_clone, [THREAD_FLAGS, 0, 0]),
                (libc::SYS_io_uring_setup, [0; 3]),
                (libc::SYS_socket, [internet, 1, 0]),
                (libc::SYS_connect, [0; 3]),
                (libc::SYS_unlink, [0; 3]),
                (libc::SYS_rename, [0; 3]),
                (libc::SYS_link, [0; 3]),
                (libc::SYS_ioctl, [0; 3]),
                (libc::SYS_mmap, [0, 4096, executable]),
            ] {
                assert_eq!(outcome_of(role, call, arguments), ENDED, "{role:?} {call}");
            }
            let refused = failed(libc::EACCES);
            assert_eq!(
                outcome_of(role, libc::SYS_openat, [0; 3]),
                refused,
                "{role:?}"
            );
        }
        let not_there = failed(libc::EFAULT);
        let here = u64::MAX - 99; // AT_FDCWD, with no path
        assert_eq!(
            outcome_of(Role::Control, libc::SYS_openat, [here, 0, 0]),
            not_there
        );
    }

    #[test]
    fn a_worker_reads_and_writes_through_its_ring_alone() {
        for call in [
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_recvmsg,
            libc::SYS_fallocate,
        ] {
            assert_eq!(outcome_of(Role::Worker, call, [0; 3]), ENDED, "{call}");
        }
        let bad_descriptor = failed(libc::EBADF);
        let nothing = [u64::from(u32::MAX), 0, 0];
        let entered = outcome_of(Role::Worker, libc::SYS_io_uring_enter, nothing);
        assert_eq!(entered, bad_descriptor);
        let read = outcome_of(Role::Layer, libc::SYS_pread64, nothing);
        assert_eq!(read, bad_descriptor);
    }
}
