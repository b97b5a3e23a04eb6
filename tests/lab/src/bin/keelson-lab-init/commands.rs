//! Running one command for one connection.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use keelson_lab::protocol::{Exec, ExitStatus, Kind, read_frame, write_frame};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::server::send_answer;

/// Between a polite end and a certain one.
const GRACE: Duration = Duration::from_secs(2);

/// A daemon that a command leaves behind may hold its output open: after the command's end, output is
/// forwarded for as long as it flows, and for this time when it does not.
const DRAIN: Duration = Duration::from_millis(300);

const SEARCH_PATH: &str = "/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs a command to its end, forwarding its streams.
pub fn run(stream: &mut TcpStream, exec: &Exec) -> Result<()> {
    let Spawned {
        mut child,
        input,
        outputs,
        terminal,
    } = spawn(exec)?;
    let group = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .context("no process id")?;
    let writer = Arc::new(Mutex::new(stream.try_clone()?));
    let forwarders: Vec<Forwarder> = outputs
        .into_iter()
        .map(|(kind, output)| Forwarder::start(kind, output, Arc::clone(&writer)))
        .collect();
    let (tell, told) = channel();
    let controls = Controls {
        group,
        terminal,
        tell: tell.clone(),
    };
    let reader = stream.try_clone()?;
    std::thread::spawn(move || controls.follow(reader, input));

    let limit = exec.timeout_seconds.map(Duration::from_secs);
    let waiter = std::thread::spawn(move || {
        let status = child.wait();
        // The receiver is gone only if the connection is.
        let _gone = tell.send(Told::Ended);
        status
    });
    let timed_out = wait_for_end(&told, limit, group);
    let status = waiter
        .join()
        .map_err(|_panic| anyhow::anyhow!("waiting for a command failed"))?;
    for forwarder in forwarders {
        forwarder.drain();
    }
    let status = status.context("waiting for a command")?;
    let status = match (timed_out, status.code(), status.signal()) {
        (true, _, _) => ExitStatus::TimedOut,
        (false, Some(code), _) => ExitStatus::Code(code),
        (false, None, signal) => ExitStatus::Signal(signal.unwrap_or_default()),
    };
    let mut stream = writer.lock().unwrap_or_else(PoisonError::into_inner);
    send_answer(&mut stream, &status)
}

/// What ends the wait for a command.
enum Told {
    Ended,
    ClientGone,
}

/// Returns when the command has ended, of itself or not; true if it took too long.
fn wait_for_end(told: &Receiver<Told>, limit: Option<Duration>, group: Pid) -> bool {
    let first = match limit {
        Some(limit) => told.recv_timeout(limit),
        None => told
            .recv()
            .map_err(|_closed| RecvTimeoutError::Disconnected),
    };
    if matches!(first, Ok(Told::Ended)) {
        return false;
    }
    for signal in [Signal::HUP, Signal::TERM, Signal::CONT] {
        let _gone = kill_process_group(group, signal);
    }
    let deadline = Instant::now() + GRACE;
    while let Ok(message) = told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        if matches!(message, Told::Ended) {
            return first.is_err();
        }
    }
    let _gone = kill_process_group(group, Signal::KILL);
    first.is_err()
}

struct Spawned {
    child: Child,
    input: File,
    outputs: Vec<(Kind, File)>,
    terminal: Option<File>,
}

fn spawn(exec: &Exec) -> Result<Spawned> {
    let (program, arguments) = exec
        .arguments
        .split_first()
        .context("no command was given")?;
    let mut command = match exec.terminal {
        // setsid -c makes the terminal the controlling one.
        Some(_) => Command::new("/usr/bin/setsid"),
        None => Command::new(program),
    };
    if exec.terminal.is_some() {
        command.arg("-c").arg(program);
    } else {
        command.process_group(0);
    }
    command
        .args(arguments)
        .env_clear()
        .envs([
            ("PATH", SEARCH_PATH),
            ("HOME", "/root"),
            ("TERM", "xterm"),
            ("LANG", "C.UTF-8"),
        ])
        .envs(exec.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(exec.directory.as_deref().unwrap_or("/".as_ref()));
    match exec.terminal {
        Some((rows, columns)) => on_terminal(command, rows, columns),
        None => on_pipes(command),
    }
    .with_context(|| format!("cannot run {program}"))
}

fn on_pipes(mut command: Command) -> Result<Spawned> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let input = child.stdin.take().context("no standard input")?;
    let stdout = child.stdout.take().context("no standard output")?;
    let stderr = child.stderr.take().context("no standard error")?;
    let file = |fd: std::os::fd::OwnedFd| File::from(fd);
    let outputs = vec![
        (Kind::Stdout, file(stdout.into())),
        (Kind::Stderr, file(stderr.into())),
    ];
    Ok(Spawned {
        child,
        input: file(input.into()),
        outputs,
        terminal: None,
    })
}

fn on_terminal(mut command: Command, rows: u16, columns: u16) -> Result<Spawned> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags).context("opening a terminal")?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let theirs = File::from(ioctl_tiocgptpeer(&ours, flags).context("opening a terminal")?);
    let ours = File::from(ours);
    resize(&ours, rows, columns)?;
    command
        .stdin(theirs.try_clone()?)
        .stdout(theirs.try_clone()?)
        .stderr(theirs);
    let child = command.spawn()?;
    // `command` holds the child's side: while it lives, the end of output is not seen.
    drop(command);
    let outputs = vec![(Kind::Stdout, ours.try_clone()?)];
    Ok(Spawned {
        child,
        input: ours.try_clone()?,
        outputs,
        terminal: Some(ours),
    })
}

fn resize(terminal: &File, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Follows what the client sends while the command runs.
struct Controls {
    group: Pid,
    terminal: Option<File>,
    tell: Sender<Told>,
}

impl Controls {
    fn follow(self, mut stream: TcpStream, input: File) {
        let mut input = Some(input);
        while let Ok(Some((kind, payload))) = read_frame(&mut stream) {
            if self.obey(kind, &payload, &mut input).is_err() {
                break;
            }
        }
        // The command may have ended long ago; then nobody listens.
        let _gone = self.tell.send(Told::ClientGone);
    }

    fn obey(&self, kind: Kind, payload: &[u8], input: &mut Option<File>) -> Result<()> {
        match (kind, payload) {
            (Kind::Data, bytes) => {
                // A command that does not read its input is its own business.
                if input
                    .as_mut()
                    .is_some_and(|input| input.write_all(bytes).is_err())
                {
                    *input = None;
                }
            }
            (Kind::End, _) if self.terminal.is_some() => {
                // A terminal's input ends with its end-of-file character.
                if let Some(input) = input {
                    input.write_all(&[4])?;
                }
            }
            (Kind::End, _) => *input = None,
            (Kind::Signal, [number]) => {
                let signal = Signal::from_named_raw(i32::from(*number));
                kill_process_group(self.group, signal.context("not a signal")?)?;
            }
            (Kind::WindowSize, [a, b, c, d]) => {
                if let Some(terminal) = &self.terminal {
                    resize(
                        terminal,
                        u16::from_be_bytes([*a, *b]),
                        u16::from_be_bytes([*c, *d]),
                    )?;
                }
            }
            (other, _) => bail!("a {other:?} frame while a command runs"),
        }
        Ok(())
    }
}

/// Sends one of a command's output streams to the client.
struct Forwarder {
    thread: JoinHandle<()>,
    progress: Arc<AtomicBool>,
}

impl Forwarder {
    fn start(kind: Kind, mut output: File, writer: Arc<Mutex<TcpStream>>) -> Self {
        let progress = Arc::new(AtomicBool::new(false));
        let moved = Arc::clone(&progress);
        let thread = std::thread::spawn(move || {
            let mut chunk = vec![0; 64 << 10];
            // A terminal whose other side is closed gives EIO: the end, like 0 bytes of a pipe.
            while let Ok(length @ 1..) = output.read(&mut chunk) {
                moved.store(true, Ordering::Relaxed);
                let mut stream = writer.lock().unwrap_or_else(PoisonError::into_inner);
                if write_frame(&mut *stream, kind, &chunk[..length]).is_err() {
                    break;
                }
            }
        });
        Self { thread, progress }
    }

    /// Waits for the end of the stream, or until nothing has come for a while.
    fn drain(self) {
        let mut last_progress = Instant::now();
        while !self.thread.is_finished() && last_progress.elapsed() < DRAIN {
            if self.progress.swap(false, Ordering::Relaxed) {
                last_progress = Instant::now();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
