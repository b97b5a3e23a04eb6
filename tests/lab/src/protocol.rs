//! The control channel between this machine and the lab's init: frames on a TCP connection.
//!
//! A connection carries one request. The client sends [`Kind::Hello`] with the lab's token, then a
//! [`Kind::Request`]; what follows depends on the request. A frame is one byte of [`Kind`], a
//! 32-bit big-endian payload length, and the payload, at most [`MAX_PAYLOAD`] bytes.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Limit of a frame's payload, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// TCP port of the init inside the lab.
pub const PORT: u16 = 2;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Client: the lab's token, first frame of a connection.
    Hello = 1,
    /// Client: a [`Request`] as JSON, second frame.
    Request = 2,
    /// Both ways: standard input of a command, or a file's content.
    Data = 3,
    /// Both ways: no more [`Kind::Data`] comes.
    End = 4,
    /// Client: a signal number as one byte, for the command's process group.
    Signal = 5,
    /// Client: rows and columns as two 16-bit big-endian numbers.
    WindowSize = 6,
    /// Lab: standard output of a command.
    Stdout = 7,
    /// Lab: standard error of a command.
    Stderr = 8,
    /// Lab: the answer to a request as JSON: an [`ExitStatus`], or a [`Status`].
    Answer = 9,
    /// Lab: why the request failed, one sentence of UTF-8.
    Error = 10,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Hello,
            Self::Request,
            Self::Data,
            Self::End,
            Self::Signal,
            Self::WindowSize,
            Self::Stdout,
            Self::Stderr,
            Self::Answer,
            Self::Error,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// What a client asks of the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Run a command; [`Kind::Data`] and [`Kind::End`] are its standard input. If the connection
    /// ends before the command, its process group gets SIGHUP, SIGTERM, and then SIGKILL.
    Exec(Exec),
    /// Write a file: [`Kind::Data`] frames, then [`Kind::End`]. It appears, whole, at the end.
    Put {
        /// Absolute path; missing folders are made.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// Read a file: the lab answers [`Kind::Data`] frames and [`Kind::End`].
    Get {
        /// Absolute path.
        path: PathBuf,
    },
    /// Answered with a [`Status`].
    Status,
    /// End the lab: file systems are synced, then the emulated machine powers off.
    PowerOff,
}

/// A command for [`Request::Exec`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Program (looked up in the lab's `PATH`) and arguments.
    pub arguments: Vec<String>,
    /// Environment variables beside the lab's own.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// Working directory; `/` if `None`.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// Give it a terminal with these rows and columns; standard error is then part of standard output.
    #[serde(default)]
    pub terminal: Option<(u16, u16)>,
    /// The lab kills it after this many seconds.
    #[serde(default)]
    pub timeout_seconds: Option<u64>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It ran longer than its limit and was killed.
    TimedOut,
}

impl ExitStatus {
    /// Whether it exited with code 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }

    /// The exit code a shell would give: 128 + the signal's number, 124 for a time-out.
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
            Self::TimedOut => 124,
        }
    }
}

/// What a running lab says about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `uname -r`.
    pub kernel: String,
    /// Seconds since the kernel started.
    pub uptime_seconds: f64,
    /// Whether `/dev/kvm` is there.
    pub kvm: bool,
}

/// Writes one frame.
pub fn write_frame(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    if payload.len() > MAX_PAYLOAD {
        return Err(invalid(format!(
            "a frame of {length} bytes is over the limit"
        )));
    }
    let mut header = [kind as u8, 0, 0, 0, 0];
    header[1..].copy_from_slice(&length.to_be_bytes());
    to.write_all(&header)?;
    to.write_all(payload)?;
    to.flush()
}

/// Reads one frame; `None` at the end of the stream between two frames.
pub fn read_frame(from: &mut impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut first = [0; 1];
    loop {
        match from.read(&mut first) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let kind = Kind::from_byte(first[0])
        .ok_or_else(|| invalid(format!("{} is not a kind of frame", first[0])))?;
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_PAYLOAD {
        return Err(invalid(format!(
            "a frame of {length} bytes is over the limit"
        )));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(Some((kind, payload)))
}

/// An error for input that breaks the protocol.
pub fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_come_back_as_they_were(frames in prop::collection::vec((1u8..=10, prop::collection::vec(any::<u8>(), 0..2000)), 0..20)) {
            let mut wire = Vec::new();
            for (kind, payload) in &frames {
                write_frame(&mut wire, Kind::from_byte(*kind).unwrap(), payload).unwrap();
            }
            let mut wire = wire.as_slice();
            for (kind, payload) in &frames {
                let (read_kind, read_payload) = read_frame(&mut wire).unwrap().unwrap();
                prop_assert_eq!(read_kind as u8, *kind);
                prop_assert_eq!(&read_payload, payload);
            }
            prop_assert!(read_frame(&mut wire).unwrap().is_none());
        }

        #[test]
        fn any_bytes_are_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut wire = bytes.as_slice();
            while let Ok(Some((_, payload))) = read_frame(&mut wire) {
                prop_assert!(payload.len() <= bytes.len());
            }
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_it_is_allocated() {
        let error = read_frame(&mut [3u8, 0xff, 0xff, 0xff, 0xff].as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_cut_frame_is_an_error() {
        let error = read_frame(&mut [3u8, 0, 0, 0, 5, 1, 2].as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
