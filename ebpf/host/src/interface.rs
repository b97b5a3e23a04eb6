//! Names and indexes of network interfaces in the calling thread's network namespace.

use std::ffi::{CStr, CString};
use std::os::fd::AsRawFd as _;

use keelson_ebpf_common::NAME_LENGTH;

use crate::error::DatapathError;

/// The index of the interface called `name`.
pub fn index(name: &str) -> Result<u32, DatapathError> {
    let missing = || DatapathError::InterfaceMissing {
        interface: name.to_owned(),
    };
    let c_name = CString::new(name).map_err(|_| missing())?;
    // SAFETY: the argument is a zero-terminated string that lives through the call.
    match unsafe { libc::if_nametoindex(c_name.as_ptr()) } {
        0 => Err(missing()),
        index => Ok(index),
    }
}

/// The name of the interface with this index, if there is one.
pub fn name(index: u32) -> Option<String> {
    let mut buffer = [0 as libc::c_char; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the IF_NAMESIZE bytes that the function may write.
    let name = unsafe { libc::if_indextoname(index, buffer.as_mut_ptr()) };
    if name.is_null() {
        return None;
    }
    // SAFETY: the function succeeded and so wrote a zero-terminated string into the buffer.
    let name = unsafe { CStr::from_ptr(buffer.as_ptr()) };
    name.to_str().ok().map(str::to_owned)
}

/// Whether the interface has Ethernet headers. False if there is none.
pub fn is_ethernet(name: &str) -> bool {
    let Ok(socket) = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    ) else {
        return false;
    };
    // SAFETY: all bytes zero are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let length = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(length).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: SIOCGIFHWADDR reads and writes one ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    // SAFETY: the call succeeded and so wrote this member.
    result == 0 && unsafe { request.ifr_ifru.ifru_hwaddr.sa_family } == libc::ARPHRD_ETHER
}

/// `name` as policy entries hold it; longer names don't exist.
pub fn to_bytes(name: &str) -> [u8; NAME_LENGTH] {
    let mut bytes = [0; NAME_LENGTH];
    for (to, from) in bytes.iter_mut().take(NAME_LENGTH - 1).zip(name.bytes()) {
        *to = from;
    }
    bytes
}

/// The name in a policy entry.
pub fn from_bytes(bytes: &[u8; NAME_LENGTH]) -> String {
    let length = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(NAME_LENGTH);
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}
