use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use keelson_lab::protocol::{self, Kind, Request, Status, read_frame, write_frame};

use crate::{commands, files};

/// Connections served at once; further ones are told so.
const MAX_CONNECTIONS: usize = 128;

/// Serves the control port until a client asks to power off, or the lab's lifetime is over.
pub fn serve() -> Result<()> {
    let token: Arc<str> = std::env::var(crate::TOKEN).context("no token")?.into();
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, protocol::PORT))
        .context("listening on the control port")?;
    end_after(lifetime()?);
    println!("keelson-lab: ready");
    let connections = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        if connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            connections.fetch_sub(1, Ordering::Relaxed);
            let _client_is_gone = write_frame(&mut stream, Kind::Error, b"too many connections");
            continue;
        }
        let (connections, token) = (Arc::clone(&connections), Arc::clone(&token));
        std::thread::spawn(move || {
            if let Err(error) = answer(&mut stream, &token) {
                let message = format!("{error:#}");
                let _client_is_gone = write_frame(&mut stream, Kind::Error, message.as_bytes());
            }
            connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
    bail!("the control port was closed")
}

fn answer(stream: &mut TcpStream, token: &str) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_mins(5)))?;
    if expect(stream, Kind::Hello)? != token.as_bytes() {
        bail!("the token is not this lab's");
    }
    let request = expect(stream, Kind::Request)?;
    let request = serde_json::from_slice(&request).context("reading the request")?;
    // From here on a client may be silent for as long as its command or it likes.
    stream.set_read_timeout(None)?;
    match request {
        Request::Exec(exec) => commands::run(stream, &exec),
        Request::Put { path, mode } => files::put(stream, &path, mode),
        Request::Get { path } => files::get(stream, &path),
        Request::Status => send_answer(stream, &status()?),
        Request::PowerOff => {
            send_answer(stream, &())?;
            // PID 1 syncs and powers off when its child ends well.
            exit(0);
        }
    }
}

/// Answers with a value as JSON.
pub fn send_answer(stream: &mut TcpStream, value: &impl serde::Serialize) -> Result<()> {
    Ok(write_frame(
        stream,
        Kind::Answer,
        &serde_json::to_vec(value)?,
    )?)
}

/// The next frame, which must be of the given kind.
fn expect(stream: &mut TcpStream, kind: Kind) -> Result<Vec<u8>> {
    match read_frame(stream)? {
        Some((got, payload)) if got == kind => Ok(payload),
        Some((got, _)) => bail!("a {got:?} frame where {kind:?} was expected"),
        None => Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
    }
}

fn status() -> Result<Status> {
    let uptime = std::fs::read_to_string("/proc/uptime").context("reading /proc/uptime")?;
    let seconds = uptime
        .split(' ')
        .next()
        .and_then(|field| field.parse().ok());
    Ok(Status {
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        uptime_seconds: seconds.context("/proc/uptime holds no number")?,
        kvm: Path::new("/dev/kvm").exists(),
    })
}

/// The lifetime that the kernel's command line gives.
fn lifetime() -> Result<Duration> {
    let line = std::fs::read_to_string("/proc/cmdline").context("reading /proc/cmdline")?;
    line.split_whitespace()
        .find_map(|word| word.strip_prefix("keelson.lifetime=")?.parse().ok())
        .map(Duration::from_secs)
        .context("the kernel command line has no keelson.lifetime")
}

fn end_after(lifetime: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(lifetime);
        println!(
            "keelson-lab: its lifetime of {} s is over",
            lifetime.as_secs()
        );
        exit(0);
    });
}
