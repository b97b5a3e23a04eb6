//! Talking to a running lab.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::protocol::{
    Exec, ExitStatus, Kind, MAX_PAYLOAD, Request, Status, read_frame, write_frame,
};
use crate::{LabError, LabState};

/// How much of a file goes into one frame.
const CHUNK: usize = 256 << 10;
const _: () = assert!(CHUNK <= MAX_PAYLOAD);

/// Opens a connection and sends a request.
fn request(lab: &LabState, request: &Request) -> Result<TcpStream, LabError> {
    let stream = connect(lab, request).map_err(connection("sending a request"))?;
    Ok(stream)
}

fn connect(lab: &LabState, request: &Request) -> io::Result<TcpStream> {
    let address = (Ipv4Addr::LOCALHOST, lab.port).into();
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(Duration::from_mins(1)))?;
    write_frame(&mut stream, Kind::Hello, lab.token.as_bytes())?;
    write_frame(&mut stream, Kind::Request, &serde_json::to_vec(request)?)?;
    Ok(stream)
}

/// What a running command sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamFrame {
    /// A piece of standard output.
    Stdout(Vec<u8>),
    /// A piece of standard error.
    Stderr(Vec<u8>),
    /// The command ended; nothing comes after this.
    Ended(ExitStatus),
}

/// A command that runs in the lab. Dropping it before its end ends the command.
#[derive(Debug)]
pub struct Running {
    stream: TcpStream,
    input: Input,
}

/// Where a running command gets its standard input and signals from; usable from another thread.
#[derive(Debug, Clone)]
pub struct Input(Arc<Mutex<TcpStream>>);

impl Running {
    /// Starts a command in the lab.
    pub fn start(lab: &LabState, exec: &Exec) -> Result<Self, LabError> {
        let stream = request(lab, &Request::Exec(exec.clone()))?;
        let writer = stream
            .try_clone()
            .map_err(connection("starting a command"))?;
        Ok(Self {
            stream,
            input: Input(Arc::new(Mutex::new(writer))),
        })
    }

    /// Standard input and signals.
    pub fn input(&self) -> Input {
        self.input.clone()
    }

    /// The next piece of output, or the end.
    pub fn next_frame(&mut self) -> Result<StreamFrame, LabError> {
        let (kind, payload) = expect_frame(&mut self.stream, "a command runs")?;
        match kind {
            Kind::Stdout => Ok(StreamFrame::Stdout(payload)),
            Kind::Stderr => Ok(StreamFrame::Stderr(payload)),
            Kind::Answer => Ok(StreamFrame::Ended(parse(&payload)?)),
            other => Err(unexpected(other)),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The clone held by `Input` would keep the connection open.
        let _closed = self.stream.shutdown(Shutdown::Both);
    }
}

impl Input {
    /// Sends bytes to standard input.
    pub fn write(&self, mut bytes: &[u8]) -> Result<(), LabError> {
        while !bytes.is_empty() {
            let (chunk, rest) = bytes.split_at(bytes.len().min(CHUNK));
            self.send(Kind::Data, chunk)?;
            bytes = rest;
        }
        Ok(())
    }

    /// Ends standard input.
    pub fn close(&self) -> Result<(), LabError> {
        self.send(Kind::End, &[])
    }

    /// Sends a signal, by number, to the command's process group.
    pub fn signal(&self, signal: u8) -> Result<(), LabError> {
        self.send(Kind::Signal, &[signal])
    }

    /// Tells the command's terminal its size.
    pub fn window_size(&self, rows: u16, columns: u16) -> Result<(), LabError> {
        let [[a, b], [c, d]] = [rows.to_be_bytes(), columns.to_be_bytes()];
        self.send(Kind::WindowSize, &[a, b, c, d])
    }

    fn send(&self, kind: Kind, payload: &[u8]) -> Result<(), LabError> {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        write_frame(&mut *stream, kind, payload).map_err(connection("sending input"))
    }
}

/// Copies a file of this machine into the lab.
pub fn put(lab: &LabState, from: &Path, to: &Path, mode: u32) -> Result<(), LabError> {
    let file = crate::error::file;
    let mut source = std::fs::File::open(from).map_err(file("read", from))?;
    let mut stream = request(
        lab,
        &Request::Put {
            path: to.to_path_buf(),
            mode,
        },
    )?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = source.read(&mut chunk).map_err(file("read", from))?;
        if length == 0 {
            break;
        }
        if write_frame(&mut stream, Kind::Data, &chunk[..length]).is_err() {
            // The lab has closed its end: it said why.
            break;
        }
    }
    let _lab_said_why = write_frame(&mut stream, Kind::End, &[]);
    match expect_frame(&mut stream, "a file is sent")? {
        (Kind::Answer, _) => Ok(()),
        (other, _) => Err(unexpected(other)),
    }
}

/// Copies a file of the lab to `to`.
pub fn get(lab: &LabState, from: &Path, to: &mut impl Write) -> Result<(), LabError> {
    let mut stream = request(
        lab,
        &Request::Get {
            path: from.to_path_buf(),
        },
    )?;
    loop {
        match expect_frame(&mut stream, "a file is fetched")? {
            (Kind::Data, chunk) => to
                .write_all(&chunk)
                .map_err(connection("writing a fetched file"))?,
            (Kind::End, _) => return Ok(()),
            (other, _) => return Err(unexpected(other)),
        }
    }
}

/// Asks the lab how it is, waiting at most `limit` for an answer.
pub fn status(lab: &LabState, limit: Duration) -> Result<Status, LabError> {
    let mut stream = request(lab, &Request::Status)?;
    stream
        .set_read_timeout(Some(limit))
        .map_err(connection("asking for the status"))?;
    match expect_frame(&mut stream, "the status is asked for")? {
        (Kind::Answer, payload) => parse(&payload),
        (other, _) => Err(unexpected(other)),
    }
}

/// Asks the lab to power off; it has not yet when this returns.
pub fn power_off(lab: &LabState) -> Result<(), LabError> {
    let mut stream = request(lab, &Request::PowerOff)?;
    let limit = Some(Duration::from_secs(5));
    stream
        .set_read_timeout(limit)
        .map_err(connection("asking to power off"))?;
    expect_frame(&mut stream, "it powers off").map(|_answer| ())
}

fn expect_frame(stream: &mut TcpStream, doing: &'static str) -> Result<(Kind, Vec<u8>), LabError> {
    let ended = || connection(doing)(io::ErrorKind::UnexpectedEof.into());
    let (kind, payload) = read_frame(stream)
        .map_err(connection(doing))?
        .ok_or_else(ended)?;
    if kind == Kind::Error {
        return Err(LabError::Refused(
            String::from_utf8_lossy(&payload).into_owned(),
        ));
    }
    Ok((kind, payload))
}

fn parse<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, LabError> {
    serde_json::from_slice(payload).map_err(|error| connection("reading an answer")(error.into()))
}

fn unexpected(kind: Kind) -> LabError {
    connection("reading an answer")(crate::protocol::invalid(format!(
        "unexpected {kind:?} frame"
    )))
}

fn connection(doing: &'static str) -> impl FnOnce(io::Error) -> LabError {
    move |source| LabError::Connection { doing, source }
}
