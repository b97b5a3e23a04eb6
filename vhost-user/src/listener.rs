//! The socket on which a disk waits for its frontend.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

use crate::Error;

/// Frontends that may wait while one is served.
const BACKLOG: i32 = 16;

/// Binds a socket, readable and writable for this user only. A socket that was left behind is
/// replaced, one that somebody listens on isn't.
pub(crate) fn listen_at(path: &Path) -> Result<UnixListener, Error> {
    let refuse = |reason: String| Error::BindSocket {
        path: path.into(),
        reason,
    };
    match bind_private(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket =
                fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
            if !is_socket {
                return Err(refuse("something that is no socket is in its place".into()));
            }
            match UnixStream::connect(path) {
                Ok(_) => Err(refuse(
                    "another process listens there; stop it first".into(),
                )),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(|error| {
                        refuse(format!("a stale socket can't be removed: {error}"))
                    })?;
                    bind_private(path).map_err(|error| refuse(error.to_string()))
                }
                Err(error) => Err(refuse(format!("it can't be examined: {error}"))),
            }
        }
        result => result.map_err(|error| refuse(error.to_string())),
    }
}

// The socket's own mode becomes that of its file (unix(7)): a chmod of the file afterwards would
// leave a moment for others, and a umask is the whole process's.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}
