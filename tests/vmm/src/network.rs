//! A network namespace with a TAP device.

use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// The calling thread's own network namespace. Processes that the thread starts and sockets that it opens
/// are in it; it ends with them.
pub struct NetworkNamespace {
    _private: (),
}

impl NetworkNamespace {
    /// Moves the calling thread into a new, empty network namespace.
    ///
    /// # Panics
    /// Without the right to, which root has.
    pub fn enter() -> Self {
        // SAFETY: a new network namespace for this thread leaves memory, files and descriptors shared.
        let entered = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
        assert!(
            entered.is_ok(),
            "this test makes a network namespace and needs root (CAP_SYS_ADMIN): {entered:?}"
        );
        Self { _private: () }
    }

    /// Makes a TAP device that is up and has `address` (`10.0.0.1/24`).
    ///
    /// # Panics
    /// If iproute2 or the kernel's tun driver is missing.
    pub fn tap(&self, name: &str, address: &str) {
        self.ip(&["tuntap", "add", "dev", name, "mode", "tap"]);
        // Nothing but what the test sends: no IPv6 neighbour discovery.
        self.ip(&["link", "set", "dev", name, "addrgenmode", "none"]);
        self.ip(&["address", "add", address, "dev", name]);
        self.ip(&["link", "set", "dev", name, "up"]);
    }

    /// Runs `ip` in the namespace.
    ///
    /// # Panics
    /// If it fails.
    pub fn ip(&self, arguments: &[&str]) {
        let status = Command::new("ip").args(arguments).status();
        let status = status.expect("this test needs iproute2's `ip`");
        assert!(status.success(), "`ip {}` failed", arguments.join(" "));
    }
}
