//! The system calls that each role may make (seccomp(2)). A thread has the list of the one that starts
//! it as well, so the starter's has all of the others'.
//!
//! A call that isn't listed is not made: the process says which it was and ends.

use std::collections::BTreeMap;
use std::io;
use std::sync::Once;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::{IsolationError, Mode, Role};

/// The flags of glibc's `pthread_create`.
const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// Memory, locks, clocks, and a thread's or the process's end: what the runtime does in every thread.
const RUNTIME: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // A debug build checks descriptors by it before it closes them.
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Refused by a filter of its own to those who open no files.
    libc::SYS_openat,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

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
pub(super) fn restrict(role: Role, mode: Mode) -> Result<(), IsolationError> {
    let action = match mode {
        Mode::Enforce => SeccompAction::Trap,
        Mode::Log => SeccompAction::Log,
        Mode::Off => return Ok(()),
    };
    let failed = |message: String| IsolationError::SystemCalls {
        thread: role.name(),
        message,
    };
    report_refusals().map_err(|error| failed(error.to_string()))?;
    if role == Role::Starter {
        // Its flags are in memory, where no filter sees them; glibc then uses clone.
        refuse(libc::SYS_clone3, libc::ENOSYS).map_err(failed)?;
    }
    if !role.opens_files() && mode == Mode::Enforce {
        // glibc looks into /proc before it gives memory back, and does without.
        refuse(libc::SYS_openat, libc::EACCES).map_err(failed)?;
    }
    let rules = rules(role).map_err(|error| failed(error.to_string()))?;
    install(rules, action, SeccompAction::Allow).map_err(failed)
}

// Lets a call fail with an error, in a filter of its own.
fn refuse(call: i64, errno: libc::c_int) -> Result<(), String> {
    let errno = SeccompAction::Errno(errno.unsigned_abs());
    install(
        BTreeMap::from([(call, Vec::new())]),
        SeccompAction::Allow,
        errno,
    )
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn install(rules: Rules, others: SeccompAction, listed: SeccompAction) -> Result<(), String> {
    let filter = SeccompFilter::new(rules, others, listed, TargetArch::x86_64);
    let program: Result<BpfProgram, _> = filter.and_then(TryInto::try_into);
    let program = program.map_err(|error| error.to_string())?;
    seccompiler::apply_filter(&program).map_err(|error| error.to_string())
}

fn rules(role: Role) -> Result<Rules, BackendError> {
    let lists: &[&[i64]] = match role {
        Role::Worker => &[WORKER],
        Role::Layer => &[LAYER],
        Role::Disk => &[LAYER, DISK],
        Role::Fetch => &[LAYER, FETCH],
        Role::Control => &[LAYER, DISK, FETCH, CONTROL],
        Role::Signals => &[SIGNALS],
        Role::Starter => &[WORKER, LAYER, DISK, FETCH, CONTROL, SIGNALS, STARTER],
    };
    let calls = RUNTIME.iter().chain(lists.iter().copied().flatten());
    let mut rules: Rules = calls.map(|call| (*call, Vec::new())).collect();
    let executable = masked(2, libc::PROT_EXEC, 0)?;
    // Resolving names may load libraries for it.
    let opens_files = role.opens_files();
    let memory = |condition| {
        if opens_files {
            return Ok(Vec::new());
        }
        Ok::<_, BackendError>(vec![SeccompRule::new(vec![condition])?])
    };
    rules.insert(libc::SYS_mmap, memory(executable.clone())?);
    rules.insert(libc::SYS_mprotect, memory(executable)?);
    if opens_files {
        let mut sockets = Vec::new();
        for family in [
            libc::AF_UNIX,
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_NETLINK,
        ] {
            sockets.push(SeccompRule::new(vec![equal(0, family)?])?);
        }
        rules.insert(libc::SYS_socket, sockets);
        // Sizes of block devices, and whether a socket blocks.
        rules.insert(libc::SYS_ioctl, Vec::new());
        let condition = SeccompCmpOp::Eq;
        let flags = SeccompCondition::new(0, SeccompCmpArgLen::Dword, condition, THREAD_FLAGS)?;
        rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![flags])?]);
    }
    Ok(rules)
}

fn equal(argument: u8, value: libc::c_int) -> Result<SeccompCondition, BackendError> {
    let value = u64::from(value.unsigned_abs());
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, mask: libc::c_int, value: u64) -> Result<SeccompCondition, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(u64::from(mask.unsigned_abs()));
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
}

/// Lets a refused call end the process with a line that says which it was.
fn report_refusals() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut outcome = Ok(());
    ONCE.call_once(|| {
        // SAFETY: sigaction is plain data for which zeroes are valid; the handler makes
        // async-signal-safe system calls only.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = refused as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigemptyset(&raw mut action.sa_mask);
            if libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) != 0 {
                outcome = Err(io::Error::last_os_error());
            }
        }
    });
    outcome
}

/// Offset of `si_syscall` in the kernel's `siginfo_t` on 64-bit machines.
const SI_SYSCALL: usize = 24;

extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a whole siginfo_t, of 128 bytes.
    let number = unsafe {
        info.cast::<u8>()
            .add(SI_SYSCALL)
            .cast::<i32>()
            .read_unaligned()
    };
    let mut line = *b"keelson-blk: the system call .... is not for the thread that made it: the process ends\n";
    let mut rest = number.unsigned_abs();
    for digit in line[29..33].iter_mut().rev() {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
    }
    // SAFETY: write and _exit may be called in a signal handler; the buffer lives through the call.
    unsafe {
        libc::write(2, line.as_ptr().cast(), line.len());
        libc::_exit(1);
    }
}

#[cfg(test)]
mod tests {
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

    /// Makes one system call in a process of the role, and tells its exit code: 1 if the call ended
    /// it, else 100 and the errno.
    fn exit_code_of(role: Role, call: i64, arguments: [u64; 3]) -> i32 {
        // SAFETY: the child makes system calls and allocates, which glibc's fork allows.
        match unsafe { libc::fork() } {
            0 => {
                let [first, second, third] = arguments;
                let restricted = restrict(role, Mode::Enforce).is_ok();
                // SAFETY: the calls of these tests are refused or touch no memory.
                unsafe {
                    let result = libc::syscall(call, first, second, third, 0_u64, 0_u64, 0_u64);
                    let errno = if result < 0 {
                        *libc::__errno_location()
                    } else {
                        0
                    };
                    libc::_exit(if restricted { 100 + errno } else { 99 });
                }
            }
            child => {
                let mut status = 0;
                // SAFETY: the pointer is to a live integer.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert!(libc::WIFEXITED(status), "{role:?} {call}: {status:#x}");
                libc::WEXITSTATUS(status)
            }
        }
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
                assert_eq!(exit_code_of(role, call, [0; 3]), 1, "{role:?} {call}");
            }
            assert_eq!(
                exit_code_of(role, libc::SYS_gettid, [0; 3]),
                100,
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
                assert_eq!(exit_code_of(role, call, arguments), 1, "{role:?} {call}");
            }
            let refused = 100 + libc::EACCES;
            assert_eq!(
                exit_code_of(role, libc::SYS_openat, [0; 3]),
                refused,
                "{role:?}"
            );
        }
        let not_there = 100 + libc::EFAULT;
        let here = u64::MAX - 99; // AT_FDCWD, with no path
        assert_eq!(
            exit_code_of(Role::Control, libc::SYS_openat, [here, 0, 0]),
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
            assert_eq!(exit_code_of(Role::Worker, call, [0; 3]), 1, "{call}");
        }
        let bad_descriptor = 100 + libc::EBADF;
        let nothing = [u64::from(u32::MAX), 0, 0];
        let entered = exit_code_of(Role::Worker, libc::SYS_io_uring_enter, nothing);
        assert_eq!(entered, bad_descriptor);
        let read = exit_code_of(Role::Layer, libc::SYS_pread64, nothing);
        assert_eq!(read, bad_descriptor);
    }
}
