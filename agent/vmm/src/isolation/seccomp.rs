//! The system calls that each kind of thread may make (seccomp(2)). A thread has the filter of the
//! one that started it as well, so the lists are nested: the owner's has all of the others'.
//!
//! A call that isn't listed is not made: the process says which it was and ends.

use std::collections::BTreeMap;
use std::sync::Once;

use clap::ValueEnum;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use vmm_sys_util::signal::register_signal_handler;

use super::IsolationError;

/// `_IOC_TYPE` of KVM's requests, and where it is in one.
const KVM_TYPE: u64 = 0xae << 8;
const TYPE_MASK: u64 = 0xff << 8;
/// Sets whether a socket blocks, and the offloads of a TAP (`asm-generic/ioctls.h`, `if_tun.h`).
const FIONBIO: u64 = 0x5421;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
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

/// What happens at a call that isn't listed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The process ends.
    #[default]
    Enforce,
    /// The kernel logs it, and makes the call.
    Log,
    /// Nothing: there are no filters.
    Off,
}

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
            Self::Signals => "signals",
            Self::Supervisor => "supervisor",
        }
    }

    const fn opens_files(self) -> bool {
        matches!(self, Self::Owner | Self::Api)
    }
}

/// Memory, locks, and a thread's or the process's end: what the runtime does in every thread.
const RUNTIME: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Refused with an error, by a filter of its own, to threads that open no files.
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

const NET: &[i64] = &[libc::SYS_epoll_pwait, libc::SYS_epoll_wait, libc::SYS_readv];

/// The vhost-user protocol over a connection that is there or made anew.
const DISKS: &[i64] = &[
    libc::SYS_clock_nanosleep,
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
    libc::SYS_clock_nanosleep,
    libc::SYS_fstat,
    libc::SYS_poll,
    libc::SYS_recvfrom,
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
    let action = match mode {
        Mode::Enforce => SeccompAction::Trap,
        Mode::Log => SeccompAction::Log,
        Mode::Off => return Ok(()),
    };
    let failed = |e: &dyn std::fmt::Display| IsolationError::Seccomp {
        thread: thread.name(),
        message: e.to_string(),
    };
    report_refusals();
    if thread == Thread::Owner {
        // Its flags are in memory, where no filter sees them; glibc then uses clone.
        refuse(libc::SYS_clone3, libc::ENOSYS).map_err(|e| failed(&e))?;
    }
    if !thread.opens_files() && mode == Mode::Enforce {
        // glibc looks into /proc before it gives memory back, and does without.
        refuse(libc::SYS_openat, libc::EACCES).map_err(|e| failed(&e))?;
    }
    let rules = rules(thread).map_err(|e| failed(&e))?;
    install(rules, action, SeccompAction::Allow).map_err(|e| failed(&e))
}

/// Lets a call fail with an error.
fn refuse(call: i64, errno: libc::c_int) -> Result<(), seccompiler::Error> {
    let errno = SeccompAction::Errno(errno.unsigned_abs());
    install(
        BTreeMap::from([(call, Vec::new())]),
        SeccompAction::Allow,
        errno,
    )
}

fn install(
    rules: Rules,
    unlisted: SeccompAction,
    listed: SeccompAction,
) -> Result<(), seccompiler::Error> {
    let filter = SeccompFilter::new(rules, unlisted, listed, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn rules(thread: Thread) -> Result<Rules, seccompiler::BackendError> {
    let lists: &[&[i64]] = match thread {
        Thread::Net => &[NET],
        Thread::Disks => &[DISKS],
        Thread::Vcpu => &[NET, DISKS, VCPU],
        Thread::Api => &[API],
        Thread::Signals => &[SIGNALS],
        Thread::Supervisor => &[SUPERVISOR],
        Thread::Owner => &[NET, DISKS, VCPU, API, SIGNALS, OWNER],
    };
    let calls = RUNTIME.iter().chain(lists.iter().copied().flatten());
    let mut rules: Rules = calls.map(|call| (*call, Vec::new())).collect();
    // Memory that could be executed is nobody's need.
    let executable = u64::try_from(libc::PROT_EXEC).unwrap_or(0);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(&[masked(2, executable, 0)?])?]);
    }
    let mut ioctls = vec![rule(&[equal(1, FIONBIO)?])?];
    if matches!(thread, Thread::Vcpu | Thread::Owner) {
        ioctls.push(rule(&[masked(1, TYPE_MASK, KVM_TYPE)?])?);
        ioctls.push(rule(&[equal(1, TUNSETOFFLOAD)?])?);
        rules.insert(libc::SYS_clone, vec![rule(&[equal(0, THREAD_FLAGS)?])?]);
        let local = u64::try_from(libc::AF_UNIX).unwrap_or(0);
        rules.insert(libc::SYS_socket, vec![rule(&[equal(0, local)?])?]);
        // For the notices of a disk's backend.
        rules.insert(libc::SYS_socketpair, vec![rule(&[equal(0, local)?])?]);
    }
    if matches!(thread, Thread::Disks) {
        let local = u64::try_from(libc::AF_UNIX).unwrap_or(0);
        rules.insert(libc::SYS_socket, vec![rule(&[equal(0, local)?])?]);
        // For the notices of a disk's backend.
        rules.insert(libc::SYS_socketpair, vec![rule(&[equal(0, local)?])?]);
        rules.insert(libc::SYS_clone, vec![rule(&[equal(0, THREAD_FLAGS)?])?]);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    Ok(rules)
}

fn rule(conditions: &[SeccompCondition]) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(conditions.to_vec())
}

fn equal(argument: u8, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn masked(
    argument: u8,
    mask: u64,
    value: u64,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
}

/// Lets a refused call end the process with a line that says which it was.
fn report_refusals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Without the handler the signal ends the process as well.
        let _ = register_signal_handler(libc::SIGSYS, refused);
    });
}

/// Offset of `si_syscall` in the kernel's `siginfo_t`.
const SI_SYSCALL: usize = 24;

extern "C" fn refused(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a whole siginfo_t, of 128 bytes.
    let number = unsafe {
        info.cast::<u8>()
            .add(SI_SYSCALL)
            .cast::<i32>()
            .read_unaligned()
    };
    let mut line =
        *b"a thread made the system call ...., which it has no need for: the process ends\n";
    let mut rest = number.unsigned_abs();
    for digit in line[30..34].iter_mut().rev() {
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

    /// Makes one system call in a process of the thread's kind, and tells its exit code.
    fn exit_code_of(thread: Thread, call: i64, arguments: [u64; 3]) -> i32 {
        // SAFETY: the child makes system calls and allocates, which glibc's fork allows.
        match unsafe { libc::fork() } {
            0 => {
                let [first, second, third] = arguments;
                let applied = apply(thread, Mode::Enforce).is_ok();
                // SAFETY: the calls of these tests are refused or touch no memory.
                unsafe {
                    libc::syscall(call, first, second, third);
                    let denied = *libc::__errno_location() == libc::EACCES;
                    libc::_exit(if !applied {
                        43
                    } else if denied {
                        DENIED
                    } else {
                        42
                    });
                }
            }
            child => {
                let mut status = 0;
                // SAFETY: the pointer is to a live integer.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert!(libc::WIFEXITED(status), "{thread:?} {call}: {status:#x}");
                libc::WEXITSTATUS(status)
            }
        }
    }

    /// The exit code of a process whose call failed with EACCES.
    const DENIED: i32 = 44;

    const ALL: [Thread; 7] = [
        Thread::Owner,
        Thread::Vcpu,
        Thread::Api,
        Thread::Disks,
        Thread::Net,
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
                assert_eq!(
                    exit_code_of(thread, call, arguments),
                    1,
                    "{thread:?} {call}"
                );
            }
            assert_eq!(
                exit_code_of(thread, libc::SYS_gettid, [0; 3]),
                42,
                "{thread:?}"
            );
        }
    }

    #[test]
    fn threads_of_the_guest_open_no_files() {
        for thread in [Thread::Vcpu, Thread::Disks, Thread::Net, Thread::Signals] {
            for call in [libc::SYS_open, libc::SYS_unlink, libc::SYS_kill] {
                assert_eq!(exit_code_of(thread, call, [0; 3]), 1, "{thread:?} {call}");
            }
            // An error, for glibc opens a file of /proc on its own.
            let denied = exit_code_of(thread, libc::SYS_openat, [0; 3]);
            assert_eq!(denied, DENIED, "{thread:?}");
        }
        assert_eq!(exit_code_of(Thread::Owner, libc::SYS_openat, [0; 3]), 42);
        // KVM's requests are the vCPUs', not an interface's.
        let run = [u64::MAX, 0xae80, 0];
        assert_eq!(exit_code_of(Thread::Vcpu, libc::SYS_ioctl, run), 42);
        assert_eq!(exit_code_of(Thread::Net, libc::SYS_ioctl, run), 1);
    }
}
