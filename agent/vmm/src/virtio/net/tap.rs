//! The host's TAP device (Documentation/networking/tuntap.rst of Linux).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};

use super::buffers::GuestBuffers;
use super::vhost::VhostDescriptor;
use crate::config::{InterfaceConfig, MAX_INTERFACE_QUEUES, VhostUse};

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
         `ip tuntap add {tap} mode tap vnet_hdr multi_queue`"
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
    /// The TAP is one of a single queue.
    #[error(
        "the interface {interface} is to have {pairs} queue pairs, and the TAP `{tap}` has one queue: \
         create it with `multi_queue`, or set the interface's `queues` to 1"
    )]
    OneQueue {
        /// The interface's id.
        interface: String,
        /// The TAP's name.
        tap: String,
        /// The queue pairs that were asked for.
        pairs: u16,
    },
    /// The kernel's own device can't be used, and must be.
    #[error(
        "the interface {interface} has `vhost` on, and /dev/vhost-net can't be used: {source}; load the \
         module vhost_net"
    )]
    Vhost {
        /// The interface's id.
        interface: String,
        /// What the kernel said.
        source: io::Error,
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

/// An interface's attachment to its TAP: a queue for each of its queue pairs. The first is always in
/// use; the others are when the driver says so.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<TapQueue>,
    /// One for each queue, or none.
    vhost: Vec<VhostDescriptor>,
    vhost_use: VhostUse,
}

/// One queue of a TAP, non-blocking, with a 12-byte virtio header before every packet.
#[derive(Debug)]
pub struct TapQueue {
    file: File,
    attached: AtomicBool,
}

impl Tap {
    /// Attaches a guest's interface to its TAP, which exists. Without a number of queue pairs in the
    /// configuration, it is that of the vCPUs if the TAP has several queues.
    pub fn open(config: &InterfaceConfig, vcpus: u8) -> Result<Self, TapError> {
        let (interface, name) = (&config.id, &config.tap);
        if !exists(name) {
            return Err(TapError::Missing {
                interface: interface.clone(),
                tap: name.clone(),
            });
        }
        let wanted = config.queues.unwrap_or(u16::from(vcpus));
        let wanted = wanted.clamp(1, MAX_INTERFACE_QUEUES);
        let first = open_tun(interface)?;
        let several = match attach(&first, name, libc::IFF_MULTI_QUEUE) {
            // It has other flags: a single queue, most likely.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                if wanted > 1 && config.queues.is_some() {
                    return Err(TapError::OneQueue {
                        interface: interface.clone(),
                        tap: name.clone(),
                        pairs: wanted,
                    });
                }
                attach(&first, name, 0).map_err(refused(interface, name))?;
                false
            }
            other => other.map_err(refused(interface, name)).map(|()| true)?,
        };
        let mut tap = Self {
            name: name.clone(),
            queues: vec![TapQueue::of(first)],
            vhost: Vec::new(),
            vhost_use: config.vhost,
        };
        for _ in 1..if several { wanted } else { 1 } {
            let file = open_tun(interface)?;
            attach(&file, name, libc::IFF_MULTI_QUEUE).map_err(refused(interface, name))?;
            tap.queues.push(TapQueue::of(file));
        }
        for queue in &tap.queues {
            let length = libc::c_int::try_from(HEADER_BYTES).unwrap_or(0);
            let request = libc::TUNSETVNETHDRSZ;
            // SAFETY: TUNSETVNETHDRSZ takes a pointer to an int.
            let set = unsafe { libc::ioctl(queue.as_raw_fd(), request, &raw const length) };
            tap.check(set, "set the header size")?;
        }
        tap.set_offloads(0)?;
        tap.use_pairs(1)?;
        tap.open_vhost(interface)?;
        Ok(tap)
    }

    /// What somebody else has attached as [`Self::open`] does, who has the rights for it: one queue.
    pub fn of_descriptor(descriptor: OwnedFd, name: &str) -> Result<Self, TapError> {
        let tap = Self {
            name: name.into(),
            queues: vec![TapQueue::of(descriptor.into())],
            vhost: Vec::new(),
            vhost_use: VhostUse::Off,
        };
        let on: libc::c_int = 1;
        // SAFETY: FIONBIO takes a pointer to an int.
        let set = unsafe { libc::ioctl(tap.first(), libc::FIONBIO, &raw const on) };
        tap.check(set, "set the mode")?;
        tap.set_offloads(0)?;
        Ok(tap)
    }

    fn open_vhost(&mut self, interface: &str) -> Result<(), TapError> {
        if self.vhost_use == VhostUse::Off {
            return Ok(());
        }
        let opened: io::Result<Vec<_>> = (0..self.queues.len())
            .map(|_| VhostDescriptor::open())
            .collect();
        match opened {
            Ok(vhost) => self.vhost = vhost,
            Err(e) if self.vhost_use == VhostUse::Auto => {
                tracing::debug!("{interface}: without vhost-net: {e}");
            }
            Err(source) => {
                let interface = interface.to_owned();
                return Err(TapError::Vhost { interface, source });
            }
        }
        Ok(())
    }

    /// How many queue pairs the interface can have.
    pub fn pairs(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// The queue of pair `index`.
    pub fn queue(&self, index: u16) -> Option<&TapQueue> {
        self.queues.get(usize::from(index))
    }

    /// The kernel's own device for pair `index`, if it is to be used.
    pub fn vhost(&self, index: u16) -> Option<&VhostDescriptor> {
        self.vhost.get(usize::from(index))
    }

    /// Whether the kernel's own device must be used.
    pub fn vhost_is_demanded(&self) -> bool {
        self.vhost_use == VhostUse::On
    }

    /// Whether the kernel writes guest memory for this interface, which no log has.
    pub const fn has_vhost(&self) -> bool {
        !self.vhost.is_empty()
    }

    /// Has the host's stack send on the first `count` queues only.
    pub fn use_pairs(&self, count: u16) -> Result<(), TapError> {
        for (index, queue) in self.queues.iter().enumerate() {
            // A TAP of one queue can't be without it.
            let wanted = index == 0 || index < usize::from(count);
            if queue.attached.load(Ordering::Acquire) == wanted {
                continue;
            }
            let flag = if wanted {
                libc::IFF_ATTACH_QUEUE
            } else {
                libc::IFF_DETACH_QUEUE
            };
            let mut request = interface_request(&self.name);
            request.ifr_ifru.ifru_flags = flags(flag);
            // SAFETY: TUNSETQUEUE takes a pointer to an ifreq.
            let set =
                unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
            self.check(set, "attach or detach a queue")?;
            queue.attached.store(wanted, Ordering::Release);
        }
        Ok(())
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
        let set = unsafe { libc::ioctl(self.first(), libc::TUNSETOFFLOAD, offloads) };
        self.check(set, "set the offloads")
    }

    fn first(&self) -> RawFd {
        // There is always one; -1 is no descriptor.
        self.queues.first().map_or(-1, TapQueue::as_raw_fd)
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

impl TapQueue {
    /// An attached queue; in tests, whatever carries packets.
    pub const fn of(file: File) -> Self {
        Self {
            file,
            attached: AtomicBool::new(true),
        }
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
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for TapQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn open_tun(interface: &str) -> Result<File, TapError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|source| TapError::Open {
            interface: interface.into(),
            source,
        })
}

/// Makes `file` a queue of the TAP.
fn attach(file: &File, name: &str, further: libc::c_int) -> io::Result<()> {
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_flags =
        flags(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | further);
    // SAFETY: TUNSETIFF takes a pointer to an ifreq with a terminated name.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn refused(interface: &str, tap: &str) -> impl FnOnce(io::Error) -> TapError + use<> {
    let (interface, tap) = (interface.to_owned(), tap.to_owned());
    move |source| {
        let hint = match source.raw_os_error() {
            Some(libc::EBUSY) => ": another process has it",
            Some(libc::EPERM) => ": it belongs to another user; CAP_NET_ADMIN is needed",
            Some(libc::E2BIG) => ": all of its queues are taken",
            Some(libc::EINVAL) => ": it is no TAP, or has other flags than tap and vnet_hdr",
            _ => "",
        };
        TapError::Attach {
            interface,
            tap,
            source,
            hint,
        }
    }
}

/// The flags, which fit the field of struct ifreq.
#[allow(clippy::cast_possible_truncation, reason = "they have 16 bits")]
const fn flags(flags: libc::c_int) -> libc::c_short {
    flags as libc::c_short
}

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
