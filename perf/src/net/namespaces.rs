//! The network namespaces of the load: two that stand for guests, one between them that stands for the host.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::process::Command;

use anyhow::Context as _;
use keelson_ebpf::MacAddress;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::hosts::{CLIENT, SERVER};

/// The namespaces `host`, `client` and `server`, joined by veth. Dropping it removes them.
#[derive(Debug)]
pub struct Namespaces {
    prefix: String,
}

impl Namespaces {
    /// Makes them, without anything that forwards between the devices `hc` and `hs` of the host.
    pub fn new() -> anyhow::Result<Self> {
        let namespaces = Self {
            prefix: format!("keelson-perf-{}", std::process::id()),
        };
        namespaces.remove();
        namespaces.make()?;
        Ok(namespaces)
    }

    /// Runs `work` on a thread of the namespace with this name.
    pub fn within<T: Send>(
        &self,
        name: &str,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let path = format!("/run/netns/{}-{name}", self.prefix);
        let namespace = File::open(&path).with_context(|| format!("open {path}"))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&namespace),
                    Some(LinkNameSpaceType::Network),
                )
                .with_context(|| format!("enter {path}"))?;
                work()
            });
            thread
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread in {path} panicked")))
        })
    }

    fn make(&self) -> anyhow::Result<()> {
        for name in ["host", "client", "server"] {
            ip(&format!("netns add {}-{name}", self.prefix))?;
        }
        self.within("host", || {
            without_ipv6()?;
            for (inner, outer, guest, end) in [
                ("c0", "hc", "client", CLIENT),
                ("s0", "hs", "server", SERVER),
            ] {
                let mac = MacAddress(end.mac);
                ip(&format!(
                    "link add {outer} type veth peer name {inner} address {mac}"
                ))?;
                ip(&format!("link set {inner} netns {}-{guest}", self.prefix))?;
                ip(&format!("link set {outer} up"))?;
            }
            Ok(())
        })?;
        for (guest, device, end) in [("client", "c0", CLIENT), ("server", "s0", SERVER)] {
            self.within(guest, || {
                without_ipv6()?;
                ip("link set lo up")?;
                ip(&format!("addr add {}/24 dev {device}", end.address))?;
                ip(&format!("link set {device} up"))
            })?;
        }
        Ok(())
    }

    fn remove(&self) {
        for name in ["client", "server", "host"] {
            let _ = Command::new("ip")
                .args(["netns", "delete", &format!("{}-{name}", self.prefix)])
                .stderr(std::process::Stdio::null())
                .status();
        }
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Makes the bridge of the calling thread's namespace, with the guests' devices as its ports.
pub fn add_bridge() -> anyhow::Result<()> {
    ip("link add br0 type bridge")?;
    ip("link set br0 up")?;
    for device in ["hc", "hs"] {
        ip(&format!("link set {device} master br0"))?;
    }
    Ok(())
}

/// The index of a device of the calling thread's namespace.
pub fn device_index(device: &str) -> io::Result<u32> {
    let name = CString::new(device)?;
    // SAFETY: the argument is a zero-terminated string that lives through the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// No router solicitations and the like beside the load.
fn without_ipv6() -> anyhow::Result<()> {
    for devices in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{devices}/disable_ipv6");
        std::fs::write(&path, "1").with_context(|| format!("write {path}"))?;
    }
    Ok(())
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let status = Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .context("start ip (Debian's package iproute2)")?;
    anyhow::ensure!(status.success(), "ip {arguments} failed");
    Ok(())
}
