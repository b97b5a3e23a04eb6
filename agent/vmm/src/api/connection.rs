//! A connection that stops being one of the API: a migration's stream goes over it.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use super::{Acknowledged, ErrorBody, Response};

/// A client's connection, whose request waits for its answer.
#[derive(Debug)]
pub(crate) struct Connection(UnixStream);

impl Connection {
    pub(super) const fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// Answers that it was taken; what follows is no longer the API's.
    pub(crate) fn accept(mut self) -> io::Result<UnixStream> {
        self.0.set_nonblocking(false)?;
        let answer = Response::Ok(Acknowledged {});
        self.write(&answer)?;
        Ok(self.0)
    }

    /// Answers why not, and closes.
    pub(crate) fn refuse(mut self, kind: &str, message: impl Into<String>) {
        // The client sees the end of the connection, if it doesn't hear why.
        let _ = self.write(&Response::Error(ErrorBody {
            kind: kind.to_owned(),
            message: message.into(),
        }));
    }

    fn write(&mut self, answer: &Response<Acknowledged>) -> io::Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        self.0.write_all(&line)
    }
}
