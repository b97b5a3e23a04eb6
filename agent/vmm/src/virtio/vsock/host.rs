//! The host's side: the socket on which the host asks for connections, and those that the guest's
//! connections go to.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

/// How the host is reached. Neither call waits.
pub trait Host: Send {
    /// Connects to whom the host has at a port.
    fn connect(&self, port: u32) -> io::Result<UnixStream>;
    /// The next connection that the host asks for; `WouldBlock` if there is none.
    fn accept(&self) -> io::Result<UnixStream>;
    /// Readable when the host asks for a connection.
    fn descriptor(&self) -> RawFd;
}

/// Unix sockets: the host connects to the listener and says `CONNECT PORT`; whoever the guest is to
/// reach at a port listens at the listener's path with `_PORT` appended.
#[derive(Debug, Clone)]
pub struct UnixHost {
    listener: Arc<UnixListener>,
    path: PathBuf,
}

impl UnixHost {
    /// `listener`, which doesn't block, is bound to `path`.
    pub fn new(listener: UnixListener, path: &Path) -> Self {
        Self {
            listener: Arc::new(listener),
            path: path.into(),
        }
    }
}

impl Host for UnixHost {
    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Refused while the listener's backlog is full: nobody is waited for.
        rustix::net::connect(&socket, &address)?;
        Ok(socket.into())
    }

    fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    fn descriptor(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}
