//! Tries a restriction, in a process of its own.

use crate::RestrictError;

/// The call ended the process.
pub const ENDED: i32 = 1;
const NOT_RESTRICTED: i32 = 2;
const ERRNO: i32 = 100;

/// The outcome of a call that was made.
pub const fn succeeded() -> i32 {
    ERRNO
}

/// The outcome of a call that was made, or refused, with this errno.
pub const fn failed(errno: i32) -> i32 {
    ERRNO + errno
}

/// Makes one system call in a process that is restricted so, and tells what came of it.
///
/// # Panics
/// If the process ends by a signal, or can't be restricted.
pub fn outcome_of(
    restrict: impl FnOnce() -> Result<(), RestrictError>,
    call: i64,
    arguments: [u64; 3],
) -> i32 {
    // SAFETY: the child makes system calls and allocates, which glibc's fork allows.
    match unsafe { libc::fork() } {
        0 => {
            let [first, second, third] = arguments;
            let restricted = restrict().is_ok();
            // SAFETY: the calls that are tried are refused, or touch no memory.
            unsafe {
                let result = libc::syscall(call, first, second, third, 0_u64, 0_u64, 0_u64);
                let errno = if result < 0 {
                    *libc::__errno_location()
                } else {
                    0
                };
                libc::_exit(if restricted {
                    failed(errno)
                } else {
                    NOT_RESTRICTED
                });
            }
        }
        child => {
            let mut status = 0;
            // SAFETY: the pointer is to a live integer.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert!(libc::WIFEXITED(status), "call {call}: {status:#x}");
            let outcome = libc::WEXITSTATUS(status);
            assert_ne!(outcome, NOT_RESTRICTED, "no seccomp in this kernel");
            outcome
        }
    }
}
