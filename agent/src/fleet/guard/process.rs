//! The guard's process: a socket, a timer, and what it kills.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::handle::socket_path;
use super::{Deadline, Step};
use crate::fleet::Instant;
use crate::guest::GuestPaths;
use crate::host::kill_recorded;

/// How long the agent may take over what it tells.
const TELL_LIMIT: Duration = Duration::from_millis(200);
/// The longest message, in bytes.
const MESSAGE_LIMIT: u64 = 64;

/// Guards the guests of a run directory until there is nothing to guard any more.
///
/// # Errors
/// Of its socket and its timer. What can't be killed is tried again.
pub fn run(run_directory: &Path, deadline: Instant) -> io::Result<()> {
    let listener = listen(&socket_path(run_directory))?;
    protect();
    // Unlike the time limit of poll(2), it counts the time for which the host is suspended.
    let timer = timerfd_create(
        TimerfdClockId::Boottime,
        TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
    )?;
    let mut deadline = Deadline::new(deadline);
    loop {
        let until = match deadline.step(Instant::now()) {
            Step::Wait(until) => until,
            Step::Fence => {
                let found = fence(run_directory);
                deadline.fenced(Instant::now(), found);
                continue;
            }
            Step::End => {
                let _ = fs::remove_file(socket_path(run_directory));
                return Ok(());
            }
        };
        timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME, &once(until))?;
        let mut events = [
            PollFd::new(&listener, PollFlags::IN),
            PollFd::from_borrowed_fd(timer.as_fd(), PollFlags::IN),
        ];
        match poll(&mut events, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // A deadline that has passed is over, whatever is said of it now: the host may have stood still.
        if deadline.step(Instant::now()) == Step::Fence {
            continue;
        }
        while let Ok((stream, _)) = listener.accept() {
            match hear(stream) {
                Ok(told) => deadline.extend(told),
                Err(error) => eprintln!("a message could not be read: {error}"),
            }
        }
    }
}

/// Kills what runs on the host's lease; whether there was anything.
pub fn fence(run_directory: &Path) -> bool {
    let entries = fs::read_dir(GuestPaths::all_in(run_directory));
    let mut found = false;
    for entry in entries.into_iter().flatten().flatten() {
        let paths = GuestPaths::in_run_directory(run_directory, &entry.file_name());
        if paths.lease().exists() {
            found |= fence_guest(&paths);
        }
    }
    found
}

fn fence_guest(paths: &GuestPaths) -> bool {
    let mut found = false;
    // What writes comes first; it takes nothing from the guest any more then, either.
    for record in paths.disk_records().into_iter().chain([paths.vmm_record()]) {
        match kill_recorded(&record) {
            Ok(killed) => found |= killed,
            Err(error) => {
                eprintln!("{}: {error}; trying again", record.display());
                found = true;
            }
        }
    }
    if found && !paths.fenced().exists() {
        let at = Timestamp::now();
        eprintln!(
            "{}: killed, since the host's lease ends",
            paths.run().display()
        );
        // It tells why; whether it can be written changes nothing.
        let _ = fs::write(paths.fenced(), at.to_string());
    }
    found
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Keeps it from being swapped out, killed for memory, or made to wait for other processes.
fn protect() {
    if let Err(error) = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE) {
        eprintln!("its memory can be swapped out: {error}");
    }
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        eprintln!("it can be killed when memory runs out: {error}");
    }
    if let Err(error) = rustix::process::nice(-20) {
        eprintln!("it runs like any other process: {error}");
    }
}

/// Reads one deadline, in nanoseconds since boot, and says that it was heard.
fn hear(mut stream: UnixStream) -> io::Result<Instant> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TELL_LIMIT))?;
    stream.set_write_timeout(Some(TELL_LIMIT))?;
    let mut line = String::new();
    let limited = io::Read::take(stream.try_clone()?, MESSAGE_LIMIT);
    BufReader::new(limited).read_line(&mut line)?;
    let nanoseconds: u64 = line
        .trim()
        .parse()
        .map_err(|_| io::Error::other(format!("{line:?} is no deadline")))?;
    stream.write_all(b"ok\n")?;
    Ok(Instant::since_boot(Duration::from_nanos(nanoseconds)))
}

fn once(at: Instant) -> Itimerspec {
    let time = at.time_since_boot();
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    Itimerspec {
        it_interval: zero,
        it_value: Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            // Zero would switch the timer off.
            tv_nsec: i64::from(time.subsec_nanos().max(1)),
        },
    }
}
