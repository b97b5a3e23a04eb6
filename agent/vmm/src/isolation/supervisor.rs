//! The process that stays outside of the jail: it has a PID namespace made, in which the VMM is
//! process 1, hands on signals, and ends as the VMM ends.

use std::io::{self, PipeReader, PipeWriter};
use std::mem::MaybeUninit;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::IsolationError;
use super::seccomp::{self, Mode, Thread};

/// Who the calling process is after [`split`].
pub enum Role {
    /// The VMM, in the new namespace.
    Inside(SupervisorLife),
    /// The supervisor: the VMM's process, as seen from outside.
    Supervisor(Child),
}

/// The VMM's process, as its supervisor has it.
#[derive(Debug)]
pub struct Child {
    process: i32,
    /// Closed when the supervisor ends, before the kernel looks for children to signal.
    _life: PipeWriter,
}

/// What the VMM knows its supervisor's end by.
#[derive(Debug)]
pub struct SupervisorLife(PipeReader);

impl SupervisorLife {
    /// Has the kernel kill this process when the supervisor ends. A change of the user makes the kernel
    /// forget it.
    ///
    /// # Errors
    /// If the supervisor has ended: one that ended before it was asked for sends no signal.
    pub fn end_with_it(&self) -> io::Result<()> {
        // SAFETY: prctl with these constants touches no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut ended = [PollFd::new(&self.0, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if poll(&mut ended, Some(&now))? > 0 {
            return Err(io::Error::other("the supervisor has ended"));
        }
        Ok(())
    }
}

/// Forks the process into a new PID namespace. It has one thread.
///
/// # Errors
/// Without the rights.
pub fn split() -> Result<Role, IsolationError> {
    let failed = |step| move |source| IsolationError::Jail { step, source };
    let (theirs, ours) = io::pipe().map_err(failed("make a pipe"))?;
    // SAFETY: touches no memory.
    if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
        return Err(failed("make a PID namespace")(io::Error::last_os_error()));
    }
    // SAFETY: the process has one thread, so its copy is whole.
    match unsafe { libc::fork() } {
        0 => {
            drop(ours);
            let life = SupervisorLife(theirs);
            life.end_with_it()
                .map_err(failed("end with the supervisor"))?;
            Ok(Role::Inside(life))
        }
        process if process > 0 => Ok(Role::Supervisor(Child {
            process,
            _life: ours,
        })),
        _ => Err(failed("fork")(io::Error::last_os_error())),
    }
}

/// Waits for the VMM's end, handing on SIGTERM and SIGINT, and removes its sockets. Returns the exit
/// code.
pub fn supervise(child: &Child, sockets: &[PathBuf], mode: Mode) -> u8 {
    let child = child.process;
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
