//! The other side of the socket.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use super::{ErrorBody, Request, Response, descriptor};

/// The longest answer, in bytes.
const MAX_ANSWER: u64 = 64 << 20;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody answers.
    #[error("can't reach keelson-blk at its control socket: {0}")]
    Io(#[from] io::Error),
    /// It answers something else.
    #[error("the answer makes no sense: {0}")]
    Answer(#[from] serde_json::Error),
    /// It was refused.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
}

/// Sends one request, with the descriptor that holds a key, and waits for the answer.
pub fn call(
    socket: &Path,
    request: &Request,
    key: Option<BorrowedFd<'_>>,
) -> Result<Value, ControlError> {
    let stream = UnixStream::connect(socket)?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    descriptor::send(&stream, &line, key)?;
    let mut answer = Vec::new();
    BufReader::new(stream.take(MAX_ANSWER)).read_until(b'\n', &mut answer)?;
    match serde_json::from_slice(&answer)? {
        Response::Ok(value) => Ok(value),
        Response::Error(error) => Err(ControlError::Refused(error)),
    }
}
