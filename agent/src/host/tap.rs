//! TAP devices (Linux, Documentation/networking/tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use crate::{AgentError, error::Result};

/// Creates the persistent TAP device `name`, with the header that carries virtio-net's offloads, unless
/// it exists. A guest's VMM opens it by its name, as many times as it needs queues if it has several.
pub fn create(name: &str, several_queues: bool) -> Result<()> {
    let context = || AgentError::io(format!("create the TAP device {name}"));
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(AgentError::io(
            "open /dev/net/tun (is the kernel module tun loaded?)",
        ))?;
    match set_interface(&tun, name, several_queues) {
        Ok(()) => {}
        // A VMM has it open, so that it exists already.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
        Err(error) => return Err(context()(error)),
    }
    // SAFETY: TUNSETPERSIST takes an integer, on a descriptor that this function owns.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1) };
    if result < 0 {
        Err(context()(io::Error::last_os_error()))
    } else {
        Ok(())
    }
}

fn set_interface(tun: &File, name: &str, several_queues: bool) -> io::Result<()> {
    // The kernel makes all of the 256 queues that it knows, so only where they are of use.
    let several = if several_queues {
        libc::IFF_MULTI_QUEUE
    } else {
        0
    };
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            // The kernel reads the low 16 bits: TAP, no packet information, virtio-net header.
            ifru_flags: i16::try_from(
                libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several,
            )
            .map_err(io::Error::other)?,
        },
    };
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::other("the name is longer than 15 bytes"));
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = libc::c_char::from_ne_bytes([byte]);
    }
    // SAFETY: `request` is a valid ifreq with a terminated name, and outlives the call.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
