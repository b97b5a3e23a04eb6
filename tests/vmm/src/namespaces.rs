//! Namespaces of a test's own, so that what it changes of the host is seen by nobody else.

use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// The calling thread's own network and mount namespace. Processes that the thread starts and sockets that
/// it opens are in them; they end with the last of these.
#[derive(Clone, Copy, Debug)]
pub struct Namespaces {
    _private: (),
}

impl Namespaces {
    /// Moves the calling thread into a new, empty network namespace and a copy of its mounts.
    ///
    /// # Panics
    /// Without the right to, which root has.
    pub fn enter() -> Self {
        let namespaces = Self::enter_with_host_sysfs();
        // As `ip netns exec` does: /sys/class/net shows the namespace of the process that mounted it.
        run("mount", &["-t", "sysfs", "sysfs", "/sys"]);
        namespaces
    }

    /// As [`Self::enter`], with the host's `/sys` and the control groups in it, and with loopback up
    /// and a BPF file system of its own.
    ///
    /// # Panics
    /// Without the right to, which root has.
    pub fn enter_for_agent() -> Self {
        let namespaces = Self::enter_with_host_sysfs();
        run("mount", &["-t", "bpf", "bpf", "/sys/fs/bpf"]);
        namespaces.ip(&["link", "set", "dev", "lo", "up"]);
        namespaces
    }

    fn enter_with_host_sysfs() -> Self {
        // SAFETY: new network and mount namespaces for this thread leave memory and descriptors shared.
        let entered = unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) };
        assert!(
            entered.is_ok(),
            "this test makes namespaces and needs root (CAP_SYS_ADMIN): {entered:?}"
        );
        run("mount", &["--make-rslave", "/"]);
        Self { _private: () }
    }

    /// Makes a TAP device that is up and has `address` (`10.0.0.1/24`).
    ///
    /// # Panics
    /// If iproute2 or the kernel's tun driver is missing.
    pub fn tap(&self, name: &str, address: &str) {
        self.ip(&["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"]);
        self.bring_up(name, address);
    }

    /// As [`Self::tap`], with room for several queues.
    ///
    /// # Panics
    /// If iproute2 or the kernel's tun driver is missing.
    pub fn tap_of_several_queues(&self, name: &str, address: &str) {
        let mode = ["mode", "tap", "vnet_hdr", "multi_queue"];
        self.ip(&[&["tuntap", "add", "dev", name][..], &mode].concat());
        self.bring_up(name, address);
    }

    fn bring_up(self, name: &str, address: &str) {
        // Nothing but what the test sends: no IPv6 neighbour discovery.
        self.ip(&["link", "set", "dev", name, "addrgenmode", "none"]);
        self.ip(&["address", "add", address, "dev", name]);
        self.ip(&["link", "set", "dev", name, "up"]);
    }

    /// Takes `/dev/kvm` away, with all other devices but `/dev/null`.
    ///
    /// # Panics
    /// Without the right to.
    pub fn hide_kvm(&self) {
        run("mount", &["-t", "tmpfs", "tmpfs", "/dev"]);
        run("mknod", &["-m", "666", "/dev/null", "c", "1", "3"]);
    }

    /// Runs `ip` in the namespace.
    ///
    /// # Panics
    /// If it fails.
    pub fn ip(&self, arguments: &[&str]) {
        run("ip", arguments);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status();
    let status = status.unwrap_or_else(|error| panic!("this test needs `{program}`: {error}"));
    assert!(
        status.success(),
        "`{program} {}` failed",
        arguments.join(" ")
    );
}
