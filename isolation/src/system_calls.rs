//! Lists of system calls.

use std::collections::BTreeMap;

use clap::ValueEnum;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::{RestrictError, refusal};

/// Memory, locks, clocks, and a thread's or the process's end: what Rust's runtime and glibc do in
/// every thread, which is on every list.
pub const RUNTIME: &[i64] = &[
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
    // To be refused, with an error, to those who open no files.
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

/// The flags of glibc's `pthread_create`.
pub const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// What becomes of what isn't on a list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// A system call that isn't listed ends the process
    #[default]
    Enforce,
    /// The kernel logs calls that aren't listed, and makes them
    Log,
    /// Nothing is restricted
    Off,
}

/// What one argument of a call has to be. Its lower 32 bits are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Argument {
    index: u8,
    mask: u32,
    value: u32,
}

impl Argument {
    /// Argument `index`, counted from 0, is `value`.
    pub const fn is(index: u8, value: u32) -> Self {
        Self::masked(index, u32::MAX, value)
    }

    /// Argument `index`, counted from 0, has `value` in the bits of `mask`.
    pub const fn masked(index: u8, mask: u32, value: u32) -> Self {
        Self { index, mask, value }
    }

    fn condition(self) -> Result<SeccompCondition, BackendError> {
        let operator = match self.mask {
            u32::MAX => SeccompCmpOp::Eq,
            mask => SeccompCmpOp::MaskedEq(mask.into()),
        };
        let (length, value) = (SeccompCmpArgLen::Dword, self.value.into());
        SeccompCondition::new(self.index, length, operator, value)
    }
}

/// The system calls that a thread may make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemCalls {
    /// By call, what one of its arguments has to be: one of these; anything, where there are none.
    calls: BTreeMap<i64, Vec<Argument>>,
}

impl SystemCalls {
    /// Those of the lists, and [`RUNTIME`]. Memory may be mapped, but not as code.
    pub fn of(lists: &[&[i64]]) -> Self {
        let calls = RUNTIME.iter().chain(lists.iter().copied().flatten());
        let mut calls = Self {
            calls: calls.map(|call| (*call, Vec::new())).collect(),
        };
        let no_code = Argument::masked(2, libc::PROT_EXEC.unsigned_abs(), 0);
        calls.allow_if(libc::SYS_mmap, no_code);
        calls.allow_if(libc::SYS_mprotect, no_code);
        calls
    }

    /// One more call, whatever its arguments.
    pub fn allow(&mut self, call: i64) -> &mut Self {
        self.calls.insert(call, Vec::new());
        self
    }

    /// One more call, if an argument is this, or what it was said that it may be before.
    pub fn allow_if(&mut self, call: i64, argument: Argument) -> &mut Self {
        self.calls.entry(call).or_default().push(argument);
        self
    }

    /// Starting threads, by clone(2).
    pub fn allow_threads(&mut self) -> &mut Self {
        let flags = u32::try_from(THREAD_FLAGS).unwrap_or(0);
        self.allow_if(libc::SYS_clone, Argument::is(0, flags))
    }

    /// Leaves the calling thread these calls alone, of those that it has from before.
    ///
    /// # Errors
    /// If the kernel has no seccomp.
    pub fn enforce(&self, mode: Mode) -> Result<(), RestrictError> {
        let unlisted = match mode {
            Mode::Enforce => SeccompAction::Trap,
            Mode::Log => SeccompAction::Log,
            Mode::Off => return Ok(()),
        };
        refusal::report();
        install(&self.calls, unlisted, SeccompAction::Allow)
    }
}

/// Lets a call fail with an error from now on, which is for what a library tries and can do without.
///
/// # Errors
/// If the kernel has no seccomp.
pub fn refuse(call: i64, errno: libc::c_int) -> Result<(), RestrictError> {
    let refused = SeccompAction::Errno(errno.unsigned_abs());
    let calls = BTreeMap::from([(call, Vec::new())]);
    install(&calls, SeccompAction::Allow, refused)
}

fn install(
    calls: &BTreeMap<i64, Vec<Argument>>,
    unlisted: SeccompAction,
    listed: SeccompAction,
) -> Result<(), RestrictError> {
    let mut rules = BTreeMap::new();
    for (call, arguments) in calls {
        let rule = |argument: &Argument| SeccompRule::new(vec![argument.condition()?]);
        let alternatives: Result<Vec<_>, BackendError> = arguments.iter().map(rule).collect();
        rules.insert(*call, alternatives?);
    }
    let filter = SeccompFilter::new(rules, unlisted, listed, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trial::{ENDED, failed, outcome_of, succeeded};

    #[test]
    fn a_call_that_is_not_listed_ends_the_process_in_mode_enforce_alone() {
        let listed = || SystemCalls::of(&[&[libc::SYS_geteuid]]);
        for (mode, expected) in [
            (Mode::Enforce, ENDED),
            (Mode::Log, succeeded()),
            (Mode::Off, succeeded()),
        ] {
            let outcome = |call| outcome_of(|| listed().enforce(mode), call, [0; 3]);
            assert_eq!(outcome(libc::SYS_getuid), expected, "{mode:?}");
            assert_eq!(outcome(libc::SYS_geteuid), succeeded(), "{mode:?}");
            assert_eq!(outcome(libc::SYS_gettid), succeeded(), "{mode:?}");
        }
    }

    #[test]
    fn arguments_are_looked_at_and_alternatives_added() {
        let outcome = |call, arguments| {
            let restrict = || {
                let mut calls = SystemCalls::of(&[]);
                calls.allow_if(libc::SYS_dup, Argument::is(0, 1000));
                calls.allow_if(libc::SYS_dup, Argument::masked(0, 0xf000, 0x5000));
                calls.enforce(Mode::Enforce)
            };
            outcome_of(restrict, call, arguments)
        };
        let no_descriptor = failed(libc::EBADF);
        for (descriptor, expected) in [
            (1000, no_descriptor),
            (1001, ENDED),
            (0x5123, no_descriptor),
            (0x6123, ENDED),
        ] {
            let outcome = outcome(libc::SYS_dup, [descriptor, 0, 0]);
            assert_eq!(outcome, expected, "{descriptor}");
        }
        let code = u64::from(libc::PROT_EXEC.unsigned_abs());
        assert_eq!(outcome(libc::SYS_mmap, [0, 4096, code]), ENDED);
        assert_eq!(outcome(libc::SYS_mprotect, [0, 4096, code]), ENDED);
        assert_eq!(outcome(libc::SYS_clone, [THREAD_FLAGS, 0, 0]), ENDED);
    }

    #[test]
    fn a_refused_call_fails_and_nothing_else_changes() {
        let restrict = || refuse(libc::SYS_getuid, libc::ENOSYS);
        let outcome = |call| outcome_of(restrict, call, [0; 3]);
        assert_eq!(outcome(libc::SYS_getuid), failed(libc::ENOSYS));
        assert_eq!(outcome(libc::SYS_geteuid), succeeded());
    }
}
