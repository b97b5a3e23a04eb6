//! The host's TAP device (Documentation/networking/tuntap.rst of Linux).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};

use super::buffers::GuestBuffers;

/// `sizeof(struct virtio_net_hdr_v1)`: the header of modern devices (virtio 1.2, 5.1.6).
pub const HEADER_BYTES: usize = 12;

/// Why a TAP can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel has no TAP devices.
    #[error("can't open /dev/net/tun for the interface {interface}: {source}; load the module tun")]
    Open {
        /// The interface's id.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no such TAP.
    #[error(
        "the interface {interface} has no TAP `{tap}` on the host: create it with \
         `ip tuntap add {tap} mode tap vnet_hdr`"
    )]
    Missing {
        /// The interface's id.
        interface: String,
        /// The TAP's name.
        tap: String,
    },
    /// The TAP can't be attached to.
    #[error("can't attach the interface {interface} to the TAP `{tap}`: {source}{hint}")]
    Attach {
        /// The interface's id.
        interface: String,
        /// The TAP's name.
        tap: String,
        /// What the kernel said.
        source: io::Error,
        /// What it means, where that is known.
        hint: &'static str,
    },
    /// The TAP can't be configured.
    #[error("can't {step} of the TAP `{tap}`: {source}")]
    Configure {
        /// What was tried.
        step: &'static str,
        /// The TAP's name.
        tap: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// One attachment to a TAP, non-blocking, with a 12-byte virtio header before every packet.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Attaches the guest's interface `interface` to the existing TAP `name`.
    pub fn open(interface: &str, name: &str) -> Result<Self, TapError> {
        if !exists(name) {
            return Err(TapError::Missing {
                interface: interface.into(),
                tap: name.into(),
            });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(|source| TapError::Open {
                interface: interface.into(),
                source,
            })?;
        let mut request = interface_request(name);
        request.ifr_ifru.ifru_flags = ATTACH_FLAGS;
        // SAFETY: TUNSETIFF takes a pointer to an ifreq with a terminated name.
        let attached = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if attached < 0 {
            let source = io::Error::last_os_error();
            let hint = match source.raw_os_error() {
                Some(libc::EBUSY) => ": another process has it",
                Some(libc::EPERM) => ": it belongs to another user; CAP_NET_ADMIN is needed",
                Some(libc::EINVAL) => ": it is no TAP, or has other flags than tap and vnet_hdr",
                _ => "",
            };
            let (interface, tap) = (interface.into(), name.into());
            return Err(TapError::Attach {
                interface,
                tap,
                source,
                hint,
            });
        }
        let tap = Self {
            file,
            name: name.into(),
        };
        let length = libc::c_int::try_from(HEADER_BYTES).unwrap_or(0);
        // SAFETY: TUNSETVNETHDRSZ takes a pointer to an int.
        let set = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) };
        tap.check(set, "set the header size")?;
        tap.set_offloads(0)?;
        Ok(tap)
    }

    /// What somebody else has attached as [`Self::open`] does, who has the rights for it.
    pub fn of_descriptor(descriptor: OwnedFd, name: &str) -> Result<Self, TapError> {
        let tap = Self {
            file: descriptor.into(),
            name: name.into(),
        };
        let on: libc::c_int = 1;
        // SAFETY: FIONBIO takes a pointer to an int.
        let set = unsafe { libc::ioctl(tap.as_raw_fd(), libc::FIONBIO, &raw const on) };
        tap.check(set, "set the mode")?;
        tap.set_offloads(0)?;
        Ok(tap)
    }

    /// Whatever carries packets.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn of(file: File) -> Self {
        Self {
            file,
            name: String::new(),
        }
    }

    /// Lets the host's stack send what the driver of these features takes: packets without a
    /// checksum, and TCP segments larger than the MTU.
    pub fn set_offloads(&self, features: u64) -> Result<(), TapError> {
        let mut offloads = 0;
        if features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0 {
            offloads |= libc::TUN_F_CSUM;
            for (feature, offload) in [
                (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
                (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
            ] {
                if features & 1 << feature != 0 {
                    offloads |= offload;
                }
            }
            let tso = offloads & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) != 0;
            if tso && features & 1 << VIRTIO_NET_F_GUEST_ECN != 0 {
                offloads |= libc::TUN_F_TSO_ECN;
            }
        }
        let offloads = libc::c_ulong::from(offloads);
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        let set = unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) };
        self.check(set, "set the offloads")
    }

    /// Reads one packet with its header into `buffers`; `None` if there is none now.
    pub fn read(&self, buffers: &GuestBuffers) -> io::Result<Option<usize>> {
        let vectors = buffers.vectors();
        // SAFETY: the vectors are of guest memory, which `buffers` holds mapped.
        let length = unsafe { libc::readv(self.as_raw_fd(), vectors.as_ptr(), count(vectors)) };
        outcome(length)
    }

    /// Writes one packet with its header from `buffers`; `None` if the queue is full.
    pub fn write(&self, buffers: &GuestBuffers) -> io::Result<Option<usize>> {
        let vectors = buffers.vectors();
        // SAFETY: the vectors are of guest memory, which `buffers` holds mapped.
        let length = unsafe { libc::writev(self.as_raw_fd(), vectors.as_ptr(), count(vectors)) };
        outcome(length)
    }

    fn check(&self, result: libc::c_int, step: &'static str) -> Result<(), TapError> {
        if result >= 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        Err(TapError::Configure {
            step,
            tap: self.name.clone(),
            source,
        })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the flags fit the field of struct ifreq"
)]
const ATTACH_FLAGS: libc::c_short =
    (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero: the configuration bounds the name's length, and `zip` here too.
    let room = request.ifr_name.len() - 1;
    for (target, byte) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *target = byte.cast_signed();
    }
    request
}

fn count(buffers: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(buffers.len()).unwrap_or(libc::c_int::MAX)
}

fn outcome(length: isize) -> io::Result<Option<usize>> {
    if let Ok(length) = usize::try_from(length) {
        return Ok(Some(length));
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        Ok(None)
    } else {
        Err(error)
    }
}

/// Whether this network namespace has a device `name`. /sys may show another namespace's.
fn exists(name: &str) -> bool {
    let Ok(name) = std::ffi::CString::new(name) else {
        return false;
    };
    // SAFETY: the name is terminated and outlives the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}
