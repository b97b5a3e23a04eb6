//! Sends whole frames out of a device, many with one system call (packet(7)).

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::namespaces::device_index;

/// `sendmmsg` takes at most this many (`UIO_MAXIOV`).
const BATCH: usize = 1024;

/// A packet socket bound to a device, which takes nothing in.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
}

impl PacketSocket {
    /// Opens one on a device of the calling thread's namespace, past its queueing discipline.
    pub fn open(device: &str) -> io::Result<Self> {
        let index = device_index(device)?;
        // SAFETY: socket(2) takes three numbers.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        let on: libc::c_int = 1;
        // SAFETY: the option's value is an integer that lives through the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const on).cast(),
                length_of::<libc::c_int>()?,
            )
        };
        check(result)?;
        // SAFETY: all bytes zero are a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET.try_into().map_err(io::Error::other)?;
        address.sll_ifindex = index.cast_signed();
        // SAFETY: the address is a sockaddr_ll of the length given and lives through the call.
        let result = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                length_of::<libc::sockaddr_ll>()?,
            )
        };
        check(result)?;
        Ok(Self { socket })
    }

    /// Sends the frames, in order; how many the device took.
    pub fn send(&self, frames: &[Vec<u8>]) -> io::Result<usize> {
        let mut parts: Vec<libc::iovec> = frames
            .iter()
            .take(BATCH)
            .map(|frame| libc::iovec {
                iov_base: frame.as_ptr().cast_mut().cast(),
                iov_len: frame.len(),
            })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = parts
            .iter_mut()
            .map(|part| {
                // SAFETY: all bytes zero are a valid mmsghdr.
                let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
                message.msg_hdr.msg_iov = part;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        let count = u32::try_from(messages.len()).unwrap_or(0);
        // SAFETY: each message points at one part, which points at a frame; all live through the
        // call, and the kernel only reads the frames.
        let sent =
            unsafe { libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), count, 0) };
        match usize::try_from(sent) {
            Ok(sent) => Ok(sent),
            Err(_) => match io::Error::last_os_error() {
                // The device's own queue is full.
                error if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(0),
                error => Err(error),
            },
        }
    }
}

fn length_of<T>() -> io::Result<libc::socklen_t> {
    size_of::<T>().try_into().map_err(io::Error::other)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
