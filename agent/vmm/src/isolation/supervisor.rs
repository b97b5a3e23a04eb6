//! The process that stays outside of the jail: it has a PID namespace made, in which the VMM is
//! process 1, hands on signals, and ends as the VMM ends.

use std::io;
use std::mem::MaybeUninit;
use std::path::PathBuf;

use super::IsolationError;
use super::seccomp::{self, Mode, Thread};

/// Who the calling process is after [`split`].
pub enum Role {
    /// The VMM, in the new namespace.
    Inside,
    /// The supervisor: the VMM's process, as seen from outside.
    Supervisor(i32),
}

/// Forks the process into a new PID namespace. It has one thread.
///
/// # Errors
/// Without the rights.
pub fn split() -> Result<Role, IsolationError> {
    let failed = |step| move |source| IsolationError::Jail { step, source };
    // SAFETY: touches no memory.
    if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
        return Err(failed("make a PID namespace")(io::Error::last_os_error()));
    }
    // SAFETY: the process has one thread, so its copy is whole.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: prctl with these constants touches no memory.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            Ok(Role::Inside)
        }
        child if child > 0 => Ok(Role::Supervisor(child)),
        _ => Err(failed("fork")(io::Error::last_os_error())),
    }
}

/// Waits for the VMM's end, handing on SIGTERM and SIGINT, and removes its sockets. Returns the exit
/// code.
pub fn supervise(child: i32, sockets: &[PathBuf], mode: Mode) -> u8 {
    let signals = block(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]);
    if let Err(e) = seccomp::apply(Thread::Supervisor, mode) {
        eprintln!("{e}");
    }
    let code = loop {
        let mut status = 0;
        // SAFETY: the pointer is to a live integer.
        let ended = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
        if ended == child && libc::WIFEXITED(status) {
            break u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(1);
        }
        if ended == child && libc::WIFSIGNALED(status) {
            eprintln!(
                "the jailed process was killed by signal {}",
                libc::WTERMSIG(status)
            );
            break 1;
        }
        let mut signal = 0;
        // SAFETY: both pointers are to live values of the types that sigwait takes.
        if unsafe { libc::sigwait(&raw const signals, &raw mut signal) } == 0
            && signal != libc::SIGCHLD
        {
            // SAFETY: the child isn't waited for yet, so the id is its own.
            unsafe { libc::kill(child, signal) };
        }
    };
    for socket in sockets {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(socket);
    }
    code
}

fn block(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set before the other calls read it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        let set = set.assume_init();
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    }
}
