//! A small blocking client of the API socket.

use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::de::DeserializeOwned;

use crate::api::{
    Acknowledged, BalloonAnswer, DeviceAdded, DevicesAnswer, ErrorBody, Event, MAX_LINE,
    MigrationLimits, MigrationStatus, RemovalRequest, Request, Response, SnapshotRequest,
    SnapshotTaken, Status,
};
use crate::config::{DiskConfig, InterfaceConfig, VhostUse};
use crate::virtio::net::Tap;

pub use crate::virtio::net::TapError;

/// How long a request may take before the client gives up. The server answers from memory.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a snapshot may take, or a pause: a disk's requests are finished before.
const LONG_TIMEOUT: Duration = Duration::from_mins(30);

/// Why a request to a VMM failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens at the socket: the guest's process is gone or not there yet.
    #[error("can't connect to the guest's API socket {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The connection broke or timed out.
    #[error("the connection to the guest's API socket {path} failed: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The VMM closed the connection, which it does when it ends.
    #[error("the VMM closed its API socket {path}")]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// The VMM answered with something that is not the protocol.
    #[error("the VMM at {path} sent a line that is not its protocol: {message}")]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong with the line.
        message: String,
    },
    /// An interface's TAP can't be attached to.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The VMM refused the request.
    #[error("the VMM refused: {} ({})", .0.message, .0.kind)]
    Refused(ErrorBody),
}

/// A connection to one guest's VMM.
#[derive(Debug)]
pub struct VmmClient {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl VmmClient {
    /// Connects to the API socket at `path`.
    pub fn connect(path: impl Into<PathBuf>) -> Result<Self, ClientError> {
        let path = path.into();
        let stream = match UnixStream::connect(&path) {
            Ok(stream) => stream,
            Err(source) => return Err(ClientError::Connect { path, source }),
        };
        let limits = stream
            .set_read_timeout(Some(TIMEOUT))
            .and_then(|()| stream.set_write_timeout(Some(TIMEOUT)));
        match limits {
            Ok(()) => Ok(Self {
                path,
                stream: BufReader::new(stream),
            }),
            Err(source) => Err(ClientError::Io { path, source }),
        }
    }

    /// What the guest does now.
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.call(&Request::Status)
    }

    /// Presses the ACPI power button.
    pub fn power_button(&mut self) -> Result<(), ClientError> {
        self.call::<Acknowledged>(&Request::PowerButton).map(drop)
    }

    /// Resets the guest at once.
    pub fn reset(&mut self) -> Result<(), ClientError> {
        self.call::<Acknowledged>(&Request::Reset).map(drop)
    }

    /// Ends the guest at once.
    pub fn kill(&mut self) -> Result<(), ClientError> {
        self.call::<Acknowledged>(&Request::Kill).map(drop)
    }

    /// Pauses the guest, its disks' requests finished.
    pub fn pause(&mut self) -> Result<(), ClientError> {
        self.call_long::<Acknowledged>(&Request::Pause).map(drop)
    }

    /// Lets a paused guest go on.
    pub fn resume(&mut self) -> Result<(), ClientError> {
        self.call_long::<Acknowledged>(&Request::Resume).map(drop)
    }

    /// Takes a snapshot; returns when it is on the disk.
    pub fn snapshot(&mut self, request: SnapshotRequest) -> Result<SnapshotTaken, ClientError> {
        self.call_long(&Request::Snapshot(request))
    }

    /// Begins to send the guest to another process; the connection is the stream from now on.
    pub fn migrate(self, limits: MigrationLimits) -> Result<UnixStream, ClientError> {
        self.into_stream(&Request::Migrate(limits))
    }

    /// Begins to take a guest, in a process that was started for that; the connection is the stream
    /// from now on.
    pub fn receive(self) -> Result<UnixStream, ClientError> {
        self.into_stream(&Request::Receive)
    }

    /// How the latest migration gets on.
    pub fn migration(&mut self) -> Result<MigrationStatus, ClientError> {
        self.call(&Request::Migration)
    }

    /// Keeps a guest stopped that the other side has, until it is told to go on or ended.
    pub fn release_migration(&mut self) -> Result<(), ClientError> {
        self.call::<Acknowledged>(&Request::ReleaseMigration)
            .map(drop)
    }

    /// Lets the guest stay.
    pub fn cancel_migration(&mut self) -> Result<(), ClientError> {
        self.call::<Acknowledged>(&Request::CancelMigration)
            .map(drop)
    }

    /// Makes a request after whose answer the connection is a stream, of which nothing is read here.
    fn into_stream(mut self, request: &Request) -> Result<UnixStream, ClientError> {
        // Without a buffer, which would hold what follows the answer.
        self.stream = BufReader::with_capacity(1, self.stream.into_inner());
        self.call_long::<Acknowledged>(request)?;
        let (path, stream) = (self.path, self.stream.into_inner());
        let limits = stream
            .set_read_timeout(None)
            .and_then(|()| stream.set_write_timeout(None));
        match limits {
            Ok(()) => Ok(stream),
            Err(source) => Err(ClientError::Io { path, source }),
        }
    }

    /// What the guest's balloon has, and how the guest uses its memory.
    pub fn balloon(&mut self) -> Result<BalloonAnswer, ClientError> {
        self.call(&Request::Balloon)
    }

    /// Asks the guest to give so much memory back in all, in MiB.
    pub fn resize_balloon(&mut self, size_mib: u64) -> Result<(), ClientError> {
        self.call::<Acknowledged>(&Request::ResizeBalloon { size_mib })
            .map(drop)
    }

    /// Tells the guest the size of the terminal that shows its console, if that is a virtio console.
    pub fn resize_console(&mut self, columns: u16, rows: u16) -> Result<(), ClientError> {
        self.call::<Acknowledged>(&Request::ResizeConsole { columns, rows })
            .map(drop)
    }

    /// Adds a disk, whose backend listens.
    pub fn add_disk(&mut self, disk: DiskConfig) -> Result<DeviceAdded, ClientError> {
        self.call_long(&Request::AddDisk(disk))
    }

    /// Adds an interface on a TAP, which this process attaches to and hands over.
    pub fn add_interface(
        &mut self,
        interface: InterfaceConfig,
    ) -> Result<DeviceAdded, ClientError> {
        // What is added has one queue pair, and the process that gets it serves it.
        let one_pair = InterfaceConfig {
            queues: Some(1),
            vhost: VhostUse::Off,
            ..interface.clone()
        };
        let tap = Tap::open(&one_pair, 1)?;
        let descriptor = tap.queue(0).map(AsFd::as_fd);
        self.send(&Request::AddInterface(interface), descriptor.as_slice())?;
        self.answer()
    }

    /// Asks the guest to let go of a disk or an interface; returns when it has.
    pub fn remove_device(&mut self, removal: RemovalRequest) -> Result<(), ClientError> {
        self.call_long::<Acknowledged>(&Request::RemoveDevice(removal))
            .map(drop)
    }

    /// Which disks and interfaces the guest has.
    pub fn devices(&mut self) -> Result<DevicesAnswer, ClientError> {
        self.call(&Request::Devices)
    }

    /// Turns the connection into an iterator of events, which ends when the VMM does.
    ///
    /// Without a timeout: an idle guest has no events.
    pub fn subscribe(mut self) -> Result<Events, ClientError> {
        self.call::<Acknowledged>(&Request::Subscribe)?;
        match self.stream.get_ref().set_read_timeout(None) {
            Ok(()) => Ok(Events {
                path: self.path,
                stream: self.stream,
            }),
            Err(source) => Err(ClientError::Io {
                path: self.path,
                source,
            }),
        }
    }

    fn call_long<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ClientError> {
        let limit = |limit| self.stream.get_ref().set_read_timeout(Some(limit));
        limit(LONG_TIMEOUT).map_err(|source| ClientError::Io {
            path: self.path.clone(),
            source,
        })?;
        let answer = self.call(request);
        // If it fails, so does the next call.
        let _ = self.stream.get_ref().set_read_timeout(Some(TIMEOUT));
        answer
    }

    fn call<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ClientError> {
        self.send(request, &[])?;
        self.answer()
    }

    /// Sends a request, with descriptors.
    fn send(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let io = |source| ClientError::Io {
            path: self.path.clone(),
            source,
        };
        let mut line = serde_json::to_vec(request).map_err(|e| io(e.into()))?;
        line.push(b'\n');
        let stream = self.stream.get_mut();
        let mut sent = 0;
        if !descriptors.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(descriptors));
            let slices = [IoSlice::new(&line)];
            let result = sendmsg(&*stream, &slices, &mut control, SendFlags::NOSIGNAL);
            sent = result.map_err(|e| io(e.into()))?;
        }
        stream.write_all(&line[sent..]).map_err(io)
    }

    fn answer<T: DeserializeOwned>(&mut self) -> Result<T, ClientError> {
        match read_line(&mut self.stream, &self.path)? {
            None => Err(ClientError::Closed {
                path: self.path.clone(),
            }),
            Some(Response::Ok(answer)) => Ok(answer),
            Some(Response::Error(body)) => Err(ClientError::Refused(body)),
        }
    }
}

/// The events of one guest, in order. See [`VmmClient::subscribe`].
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Iterator for Events {
    type Item = Result<Event, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        read_line(&mut self.stream, &self.path).transpose()
    }
}

/// Reads one line; `None` at the end of the stream.
fn read_line<T: DeserializeOwned>(
    stream: &mut BufReader<UnixStream>,
    path: &Path,
) -> Result<Option<T>, ClientError> {
    let mut line = Vec::new();
    let limit = MAX_LINE as u64;
    let length = stream
        .by_ref()
        .take(limit)
        .read_until(b'\n', &mut line)
        .map_err(|source| ClientError::Io {
            path: path.into(),
            source,
        })?;
    if length == 0 {
        return Ok(None);
    }
    let protocol = |message| ClientError::Protocol {
        path: path.into(),
        message,
    };
    if line.last() != Some(&b'\n') {
        return Err(protocol(format!("no end of line within {length} bytes")));
    }
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(|e| protocol(e.to_string()))
}
