//! Starts a process that runs only once it is on record.
//!
//! An agent that is killed between a fork and the record of it would leave a process that no later
//! agent knows. So the child waits before it executes its program, and dies with the agent until it
//! is told to go on.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Starts `command`; its process executes its program when `record` has returned. If that fails,
/// the process ends without having executed anything.
///
/// # Errors
/// Of the fork and the execution, or of `record`.
pub fn launch<E: From<io::Error> + Send>(
    mut command: Command,
    record: impl FnOnce(u32) -> Result<(), E>,
) -> Result<Child, E> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let our_end = ours.as_raw_fd();
    let agent = std::process::id();
    // SAFETY: between fork and exec the closure makes system calls only.
    unsafe {
        command.pre_exec(move || wait_for_go_ahead(&theirs, our_end, agent));
    }
    std::thread::scope(|scope| {
        // It returns only when the program is executed.
        let spawning = scope.spawn(move || command.spawn());
        let mut process_id = [0; 4];
        // Where there is no fork, the other end is closed.
        let forked = ours.read_exact(&mut process_id);
        let recorded = match forked {
            Ok(()) => record(u32::from_ne_bytes(process_id)),
            Err(_) => Ok(()),
        };
        if recorded.is_ok() {
            // If the child is gone, spawning fails.
            let _ = ours.write_all(&[1]);
        }
        drop(ours);
        let spawned = spawning
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that started it failed")));
        recorded?;
        Ok(spawned?)
    })
}

/// In the child: says who it is and waits. The error ends the child.
fn wait_for_go_ahead(socket: &UnixStream, agents_end: RawFd, agent: u32) -> io::Result<()> {
    // SAFETY: prctl with these constants touches no memory.
    let asked = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: getppid has no preconditions.
    let parent = unsafe { libc::getppid() };
    if asked != 0 || u32::try_from(parent) != Ok(agent) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: the child's copy of a descriptor that only the agent uses; without it the socket ends
    // with the agent's own.
    unsafe { libc::close(agents_end) };
    let mut socket = socket;
    socket.write_all(&std::process::id().to_ne_bytes())?;
    let mut go = [0];
    if socket.read(&mut go)? != 1 {
        return Err(io::Error::from_raw_os_error(libc::ECANCELED));
    }
    // SAFETY: as above. From here on the process outlives the agent.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_executes_after_its_record() {
        let mut recorded = 0;
        let mut child = launch::<io::Error>(Command::new("true"), |id| {
            recorded = id;
            let program = std::fs::read_link(format!("/proc/{id}/exe"))?;
            assert_eq!(program, std::env::current_exe()?, "it executes already");
            Ok(())
        })
        .unwrap();
        assert_eq!(child.id(), recorded);
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn without_a_record_nothing_is_executed() {
        let folder = tempfile::tempdir().unwrap();
        let trace = folder.path().join("trace");
        let mut command = Command::new("touch");
        command.arg(&trace);
        let failed = launch(command, |_| Err(io::Error::other("no record")));
        assert_eq!(failed.unwrap_err().to_string(), "no record");
        assert!(!trace.exists());
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let error = launch::<io::Error>(Command::new("/nonexistent"), |_| Ok(())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
