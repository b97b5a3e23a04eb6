use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context as _, ensure};

use super::Network;
use crate::sandbox::run;

/// Bytes of a packet. Jumbo frames, so that the switch has less to do.
pub const MTU: usize = 9000;

/// Makes a TAP device in the calling thread's network namespace; it is there as long as the file is.
pub fn open(name: &str) -> anyhow::Result<File> {
    ensure!(
        name.len() < libc::IFNAMSIZ,
        "{name} is longer than 15 bytes"
    );
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("open /dev/net/tun: is the kernel's tun driver there?")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI)?,
        },
    };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = libc::c_char::from_ne_bytes([byte]);
    }
    // SAFETY: `request` is a valid ifreq with a terminated name, and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if result < 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("make the TAP device {name}"));
    }
    Ok(file)
}

/// Gives it its address, and the addresses of all others, so that nobody has to ask for them.
pub fn configure(device: &str, host: usize, count: usize) -> anyhow::Result<()> {
    let mtu = MTU.to_string();
    let address = format!("{}/24", Network::address(host));
    run("ip", &["link", "set", "dev", device, "addrgenmode", "none"])?;
    run(
        "ip",
        &[
            "link",
            "set",
            "dev",
            device,
            "mtu",
            &mtu,
            "address",
            &mac(host),
        ],
    )?;
    run("ip", &["address", "add", &address, "dev", device])?;
    run("ip", &["link", "set", "dev", device, "up"])?;
    for other in (0..count).filter(|other| *other != host) {
        let address = Network::address(other).to_string();
        run(
            "ip",
            &[
                "neighbour",
                "add",
                &address,
                "lladdr",
                &mac(other),
                "dev",
                device,
            ],
        )?;
    }
    Ok(())
}

/// Its last byte is the host's number.
fn mac(host: usize) -> String {
    format!("02:00:00:00:00:{host:02x}")
}
