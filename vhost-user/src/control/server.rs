//! Answers requests, a thread for each client.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::{ErrorBody, MAX_LINE, Request, Response, descriptor, prometheus};
use crate::Error;
use crate::catalog::Catalog;
use crate::isolation::{self, Role};
use crate::listener::listen_at;
use crate::sector_cipher::SectorCipher;

/// Clients at once; a further one gets an error line.
const MAX_CLIENTS: usize = 16;
/// How long a client may take to read an answer.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);
const STACK_BYTES: usize = 512 << 10;
/// `EACCES` in the message of a [`std::io::Error`].
const PERMISSION_DENIED: &str = "(os error 13)";

/// The control socket of the process.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
}

impl ControlServer {
    /// Binds the socket and answers from now on, until the process ends.
    pub fn start(path: &Path, catalog: Arc<Catalog>) -> Result<Self, Error> {
        let listener = listen_at(path)?;
        let clients = Arc::new(AtomicUsize::new(0));
        let serve = move || match isolation::enter(Role::Control) {
            Ok(_) => accept(&listener, &catalog, &clients),
            Err(error) => tracing::error!(%error, "no control requests are taken"),
        };
        isolation::spawn("control", STACK_BYTES, serve)
            .map_err(|error| Error::io("can't start the control thread", error))?;
        Ok(Self { path: path.into() })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn accept(listener: &UnixListener, catalog: &Arc<Catalog>, clients: &Arc<AtomicUsize>) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: others are served on.
                tracing::warn!(%error, "can't accept a control client");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let _ = stream.set_write_timeout(Some(WRITE_PATIENCE));
        if clients.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
            clients.fetch_sub(1, Ordering::AcqRel);
            let message = format!("{MAX_CLIENTS} clients are connected");
            let _ = answer(&stream, &refusal("too_many_clients", message));
            continue;
        }
        let (catalog, of_thread) = (Arc::clone(catalog), Arc::clone(clients));
        let serve = move || {
            let entered = isolation::enter(Role::Control).map_err(io::Error::from);
            if let Err(error) = entered.and_then(|_| serve(&stream, &catalog)) {
                tracing::debug!(%error, "a control client is gone");
            }
            of_thread.fetch_sub(1, Ordering::AcqRel);
        };
        if let Err(error) = isolation::spawn("control client", STACK_BYTES, serve) {
            clients.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "can't serve a control client");
        }
    }
}

fn serve(stream: &UnixStream, catalog: &Arc<Catalog>) -> io::Result<()> {
    let mut input = Vec::new();
    let mut key = None;
    let mut chunk = [0; 4096];
    loop {
        let (bytes, descriptor) = descriptor::receive(stream, &mut chunk)?;
        if bytes == 0 {
            return Ok(());
        }
        key = descriptor.or(key);
        input.extend_from_slice(chunk.get(..bytes).unwrap_or_default());
        while let Some(end) = input.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = input.drain(..=end).collect();
            let response = match serde_json::from_slice(&line) {
                Ok(request) => perform(request, key.take(), catalog),
                Err(error) => refusal("bad_request", format!("no request: {error}")),
            };
            answer(stream, &response)?;
        }
        if input.len() > MAX_LINE {
            let message = format!("a line has more than {MAX_LINE} bytes");
            return answer(stream, &refusal("bad_request", message));
        }
    }
}

fn answer(mut stream: &UnixStream, response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn refusal(kind: &str, message: String) -> Response {
    Response::Error(ErrorBody {
        kind: kind.into(),
        message,
    })
}

fn perform(request: Request, key: Option<OwnedFd>, catalog: &Arc<Catalog>) -> Response {
    match try_perform(request, key, catalog) {
        Ok(value) => Response::Ok(value),
        Err(error) => {
            let mut body = ErrorBody::from(error);
            if isolation::restricts_files() && body.message.contains(PERMISSION_DENIED) {
                body.message += "; this process reaches the paths of its --allow-path alone";
            }
            Response::Error(body)
        }
    }
}

fn try_perform(
    request: Request,
    key: Option<OwnedFd>,
    catalog: &Arc<Catalog>,
) -> Result<Value, Error> {
    let value = match request {
        Request::List => json!({ "disks": catalog.list(), "groups": catalog.groups() }),
        Request::Add { disk, key: wanted } => {
            let cipher = match key.filter(|_| wanted) {
                Some(key) => {
                    check_key_source(&key)?;
                    Some(Arc::new(SectorCipher::read_key(key.into())?))
                }
                None if wanted => {
                    return Err(Error::io(
                        format!("disk {}", disk.id),
                        io::Error::new(io::ErrorKind::InvalidInput, "no key came with it"),
                    ));
                }
                None => None,
            };
            let id = disk.id.clone();
            let ended = move || tracing::info!(disk = id, "the disk is no longer served");
            json!(catalog.add(disk, cipher, ended)?)
        }
        Request::Remove { id } => {
            catalog.remove(&id)?;
            json!({})
        }
        Request::Resize { id, bytes } => json!({ "bytes": catalog.resize(&id, bytes)? }),
        Request::Snapshot { id, name } => json!({ "path": catalog.snapshot(&id, &name)? }),
        Request::Limit { id, limits } => {
            catalog.limit(&id, limits)?;
            json!({})
        }
        Request::LimitGroup { group, limits } => {
            catalog.limit_group(&group, limits)?;
            json!({})
        }
        Request::Metrics => json!({ "text": prometheus::text(&catalog.list()) }),
    };
    Ok(value)
}

// A pipe that nobody writes to must not hold the thread forever.
fn check_key_source(key: &OwnedFd) -> Result<(), Error> {
    use rustix::event::{PollFd, PollFlags, poll};
    let patience = Duration::from_secs(5).try_into().unwrap_or_default();
    let mut sources = [PollFd::from_borrowed_fd(key.as_fd(), PollFlags::IN)];
    match poll(&mut sources, Some(&patience)) {
        Ok(0) => Err(Error::io("can't read the key", io::ErrorKind::TimedOut)),
        Ok(_) => Ok(()),
        Err(error) => Err(Error::io("can't read the key", error)),
    }
}
