//! The system calls that each kind of thread may make (seccomp(2)). A thread has the filter of the
//! one that started it as well, so the lists are nested: the owner's has all of the others'.
//!
//! A call that isn't listed is not made: the process says which it was and ends.

pub use keelson_isolation::Mode;
use keelson_isolation::{Argument, RestrictError, SystemCalls, refuse};

use super::IsolationError;

/// `_IOC_TYPE` of KVM's requests, and where it is in one.
const KVM_TYPE: u32 = 0xae << 8;
const TYPE_MASK: u32 = 0xff << 8;
/// Sets whether a socket blocks, and the offloads of a TAP (`asm-generic/ioctls.h`, `if_tun.h`).
const FIONBIO: u32 = 0x5421;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
/// Attaches or detaches a queue of a TAP (`if_tun.h`).
const TUNSETQUEUE: u32 = 0x4004_54d9;
/// Handing queues to vhost-net and taking them back (`linux/vhost.h`).
const VHOST: [u32; 10] = [
    // VHOST_SET_FEATURES, VHOST_SET_OWNER, VHOST_SET_MEM_TABLE
    0x4008_af00,
    0xaf01,
    0x4008_af03,
    // VHOST_SET_VRING_NUM, _ADDR, _BASE, VHOST_GET_VRING_BASE
    0x4008_af10,
    0x4028_af11,
    0x4008_af12,
    0xc008_af12,
    // VHOST_SET_VRING_KICK, _CALL
    0x4008_af20,
    0x4008_af21,
    // VHOST_NET_SET_BACKEND
    0x4008_af30,
];

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// The main thread, which builds machines and takes snapshots. All others come from it.
    Owner,
    /// A vCPU's, which also does what its guest writes to registers: it starts interfaces' threads
    /// and talks to disks' backends.
    Vcpu,
    /// The one that serves the API and the console.
    Api,
    /// One that watches disks' backends.
    Disks,
    /// One that serves an interface.
    Net,
    /// The one that serves the socket device.
    Vsock,
    /// The one that sends or takes a guest.
    Migration,
    /// The one that waits for the watchdog's end.
    Watchdog,
    /// The one that waits for signals.
    Signals,
    /// The process outside of the jail.
    Supervisor,
}

impl Thread {
    const fn name(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Vcpu => "vcpu",
            Self::Api => "api",
            Self::Disks => "disks",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Migration => "migration",
            Self::Watchdog => "watchdog",
            Self::Signals => "signals",
            Self::Supervisor => "supervisor",
        }
    }

    const fn opens_files(self) -> bool {
        matches!(self, Self::Owner | Self::Api)
    }
}

const NET: &[i64] = &[libc::SYS_epoll_pwait, libc::SYS_epoll_wait, libc::SYS_readv];

/// The host's streams: those that ask for the guest, and those that the guest asks for.
const VSOCK: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// A stream, and where in the guest's memory there is something.
const MIGRATION: &[i64] = &[
    libc::SYS_lseek,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// The vhost-user protocol over a connection that is there or made anew.
const DISKS: &[i64] = &[
    // Answered ENOSYS by a filter of its own.
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_fstat,
    libc::SYS_poll,
    libc::SYS_prctl,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// Starting a thread, with its own filter, and a device.
const VCPU: &[i64] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_seccomp,
];

const API: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_fstat,
    libc::SYS_poll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_rename,
    libc::SYS_sendto,
    libc::SYS_statx,
];

const SIGNALS: &[i64] = &[libc::SYS_rt_sigtimedwait];

/// Building machines, loading kernels, snapshots.
const OWNER: &[i64] = &[
    libc::SYS_access,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getsockopt,
    libc::SYS_lseek,
    libc::SYS_mbind,
    libc::SYS_memfd_create,
    libc::SYS_mkdir,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_prlimit64,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readlink,
    libc::SYS_rmdir,
    libc::SYS_sched_setaffinity,
    libc::SYS_unlink,
];

const SUPERVISOR: &[i64] = &[
    libc::SYS_kill,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_unlink,
    libc::SYS_wait4,
];

/// Installs the filter of the calling thread, which also holds for those that it starts.
///
/// # Errors
/// If the kernel has no seccomp.
pub fn apply(thread: Thread, mode: Mode) -> Result<(), IsolationError> {
    restrict(thread, mode).map_err(|source| IsolationError::Thread {
        thread: thread.name(),
        source,
    })
}

fn restrict(thread: Thread, mode: Mode) -> Result<(), RestrictError> {
    if thread == Thread::Owner && mode != Mode::Off {
        // Its flags are in memory, where no filter sees them; glibc then uses clone.
        refuse(libc::SYS_clone3, libc::ENOSYS)?;
    }
    if !thread.opens_files() && mode == Mode::Enforce {
        // glibc looks into /proc before it gives memory back, and does without.
        refuse(libc::SYS_openat, libc::EACCES)?;
    }
    list(thread).enforce(mode)
}

fn list(thread: Thread) -> SystemCalls {
    let mut calls = SystemCalls::of(match thread {
        Thread::Net => &[NET],
        Thread::Vsock => &[VSOCK],
        Thread::Migration => &[MIGRATION],
        Thread::Watchdog => &[],
        Thread::Disks => &[DISKS],
        Thread::Vcpu => &[NET, VSOCK, DISKS, VCPU],
        Thread::Api => &[API],
        Thread::Signals => &[SIGNALS],
        Thread::Supervisor => &[SUPERVISOR],
        Thread::Owner => &[NET, VSOCK, MIGRATION, DISKS, VCPU, API, SIGNALS, OWNER],
    });
    calls.allow_if(libc::SYS_ioctl, Argument::is(1, FIONBIO));
    if matches!(thread, Thread::Vcpu | Thread::Migration | Thread::Owner) {
        calls.allow_if(libc::SYS_ioctl, Argument::masked(1, TYPE_MASK, KVM_TYPE));
    }
    if matches!(thread, Thread::Vcpu | Thread::Owner) {
        for request in [TUNSETOFFLOAD, TUNSETQUEUE].into_iter().chain(VHOST) {
            calls.allow_if(libc::SYS_ioctl, Argument::is(1, request));
        }
    }
    if thread == Thread::Vsock {
        let local = Argument::is(0, libc::AF_UNIX.unsigned_abs());
        calls.allow_if(libc::SYS_socket, local);
    }
    if matches!(thread, Thread::Disks | Thread::Vcpu | Thread::Owner) {
        let local = Argument::is(0, libc::AF_UNIX.unsigned_abs());
        calls.allow_if(libc::SYS_socket, local);
        // For the notices of a disk's backend.
        calls.allow_if(libc::SYS_socketpair, local);
        calls.allow_threads();
    }
    calls
}

#[cfg(test)]
mod tests {
    use keelson_isolation::trial::{self, ENDED, failed, succeeded};

    use super::*;

    /// What comes of a system call in such a thread.
    fn outcome_of(thread: Thread, call: i64, arguments: [u64; 3]) -> i32 {
        trial::outcome_of(|| restrict(thread, Mode::Enforce), call, arguments)
    }

    const ALL: [Thread; 10] = [
        Thread::Owner,
        Thread::Vcpu,
        Thread::Api,
        Thread::Disks,
        Thread::Net,
        Thread::Vsock,
        Thread::Migration,
        Thread::Watchdog,
        Thread::Signals,
        Thread::Supervisor,
    ];

    #[test]
    fn nobody_executes_traces_mounts_or_leaves_by_the_network() {
        let internet = u64::try_from(libc::AF_INET).unwrap();
        let executable = u64::try_from(libc::PROT_EXEC).unwrap();
        for thread in ALL {
            for (call, arguments) in [
                (libc::SYS_execve, [0; 3]),
                (libc::SYS_ptrace, [0; 3]),
                (libc::SYS_mount, [0; 3]),
                (libc::SYS_unshare, [0; 3]),
                (libc::SYS_bpf, [0; 3]),
                (libc::SYS_io_uring_setup, [0; 3]),
                (libc::SYS_fork, [0; 3]),
                (libc::SYS_socket, [internet, 1, 0]),
                (libc::SYS_mmap, [0, 4096, executable]),
                (libc::SYS_ioctl, [0, 0x5412, 0]),
            ] {
                let outcome = outcome_of(thread, call, arguments);
                assert_eq!(outcome, ENDED, "{thread:?} {call}");
            }
            assert_eq!(
                outcome_of(thread, libc::SYS_gettid, [0; 3]),
                succeeded(),
                "{thread:?}"
            );
        }
    }

    #[test]
    fn threads_of_the_guest_open_no_files() {
        for thread in [
            Thread::Vcpu,
            Thread::Disks,
            Thread::Net,
            Thread::Vsock,
            Thread::Migration,
            Thread::Watchdog,
            Thread::Signals,
        ] {
            for call in [libc::SYS_open, libc::SYS_unlink, libc::SYS_kill] {
                assert_eq!(outcome_of(thread, call, [0; 3]), ENDED, "{thread:?} {call}");
            }
            // An error, for glibc opens a file of /proc on its own.
            let denied = outcome_of(thread, libc::SYS_openat, [0; 3]);
            assert_eq!(denied, failed(libc::EACCES), "{thread:?}");
        }
        let no_path = outcome_of(Thread::Owner, libc::SYS_openat, [0; 3]);
        assert_eq!(no_path, failed(libc::EFAULT));
        // KVM's requests are the vCPUs', not an interface's.
        let run = [u64::MAX, 0xae80, 0];
        let no_descriptor = failed(libc::EBADF);
        assert_eq!(
            outcome_of(Thread::Vcpu, libc::SYS_ioctl, run),
            no_descriptor
        );
        assert_eq!(outcome_of(Thread::Net, libc::SYS_ioctl, run), ENDED);
        // So are vhost-net's; what it isn't asked for (VHOST_SET_LOG_BASE) nobody may.
        let own = [u64::MAX, 0xaf01, 0];
        assert_eq!(
            outcome_of(Thread::Vcpu, libc::SYS_ioctl, own),
            no_descriptor
        );
        assert_eq!(outcome_of(Thread::Net, libc::SYS_ioctl, own), ENDED);
        let log = [u64::MAX, 0x4008_af04, 0];
        assert_eq!(outcome_of(Thread::Owner, libc::SYS_ioctl, log), ENDED);
    }
}
