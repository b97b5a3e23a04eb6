//! A stock guest with four vCPUs that takes a disk and an interface while it runs, and its clones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use keelson_vmm::api::{AfterSnapshot, RemovalRequest};
use keelson_vmm::config::{DiskConfig, InterfaceConfig};
use keelson_vmm_tests::{Backend, Guest, GuestBuilder, wait_until};
use serde_json::json;

use super::{CLONES, Stock, run, say, take, tell};

const VCPUS: u8 = 4;
const MEMORY_MIB: u64 = 128;
/// Until a device is there; the guest's shell has no seconds with fractions to wait for.
const MOUNT: &str = "n=0; while [ ! -b /dev/vda ] && [ $n -lt 300 ]; do usleep 100000; n=$((n+1)); done; \
                     mount -t ext4 /dev/vda /data";
const NO_DISK: &str = "ls /dev/vda 2>/dev/null | wc -l";
const NO_INTERFACE: &str = "ls /sys/class/net | grep -c eth0 || true";

impl Stock<'_> {
    /// Adds a disk and an interface, takes them away, adds them again, and clones the guest.
    pub(super) fn takes_devices_while_it_runs(&self) {
        let place = tempfile::TempDir::new().expect("there is a place for temporary files");
        let image = place.path().join("disk");
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4"])
            .arg(&image)
            .arg("8M"));
        tap();
        let builder = self.virtio_console(VCPUS, MEMORY_MIB);
        let mut guest = builder.set("/memory/shared", true).start();
        guest.wait_for_line("keelson-guest: ready");
        say("four vCPUs boot", &guest.shell("nproc"), "4");
        say("its shell is on hvc0", &guest.shell("tty"), "/dev/hvc0");
        say("which knows its size", &guest.shell("stty size"), "24 80");
        let resized = guest.client().resize_console(132, 43);
        resized.expect("it can be resized");
        wait_until("another size of the terminal", || {
            (guest.shell("stty size") == "43 132").then_some(())
        });
        let socket = guest.directory().join("data.sock");
        let backend = Backend::start(&image, &socket, &[]);
        add_disk(&guest, &socket);
        let write = format!("{MOUNT} && echo plugged > /data/file && sync && cat /data/file");
        say(
            "it finds a new disk by itself",
            &guest.shell(&write),
            "plugged",
        );
        guest.shell("umount /data");
        remove(&guest, "data");
        say("and lets go of it", &guest.shell(NO_DISK), "0");
        drop(backend);
        run(Command::new("e2fsck").arg("-fn").arg(&image));
        let _ = fs::remove_file(&socket);
        let backend = Backend::start(&image, &socket, &[]);
        add_disk(&guest, &socket);
        let read = format!("{MOUNT} && cat /data/file");
        say("and finds it again", &guest.shell(&read), "plugged");
        let interface: InterfaceConfig = serde_json::from_value(interface()).expect("one");
        let added = guest.client().add_interface(interface.clone());
        added.expect("the interface is added");
        let up = "n=0; while [ ! -e /sys/class/net/eth0 ] && [ $n -lt 300 ]; do usleep 100000; n=$((n+1)); done; \
                  ifconfig eth0 10.99.0.2 netmask 255.255.255.0";
        guest.shell(up);
        let ping = "ping -c 3 -W 20 10.99.0.1 | grep -c 'bytes from'";
        say(
            "it finds a new interface by itself, and pings",
            &guest.shell(ping),
            "3",
        );
        remove(&guest, "eth1");
        say("and lets go of it", &guest.shell(NO_INTERFACE), "0");
        let added = guest.client().add_interface(interface);
        added.expect("the interface is added again");
        guest.shell(up);
        say("and finds it again", &guest.shell(ping), "3");

        let snapshot = place.path().join("snapshot");
        guest.shell("sync; echo 3 > /proc/sys/vm/drop_caches");
        take(&guest, &snapshot, AfterSnapshot::Pause);
        guest.client().kill().expect("it can be killed");
        guest.wait();
        drop(backend);
        for number in 0..=CLONES {
            self.clone_of(&snapshot, &image, place.path(), number);
        }
        println!("stock-guest: it was restored once and cloned {CLONES} times, with both devices");
    }

    fn clone_of(&self, snapshot: &Path, image: &Path, place: &Path, number: usize) {
        let began = Instant::now();
        let copy = place.join("copy");
        fs::copy(image, &copy).expect("the image can be copied");
        let builder = self.virtio_console(VCPUS, MEMORY_MIB);
        let socket = builder.directory().join("data.sock");
        let backend = Backend::start(&copy, &socket, &[]);
        let builder: GuestBuilder = builder
            .set("/disks", json!([{"id": "data", "socket": socket}]))
            .set("/interfaces", json!([interface()]));
        let mut clone = builder.restore(snapshot, &[]).start();
        clone.wait_for_running();
        let running = began.elapsed();
        let check = "cat /data/file; ping -c 1 -W 20 10.99.0.1 | grep -c 'bytes from'; \
                     for c in 0 1 2 3; do taskset -c $c echo $c; done | wc -l";
        say(
            "a clone has disk, network and vCPUs",
            &clone.shell(check),
            "plugged\n1\n4",
        );
        if number == 0 {
            clone.shell("umount /data");
            remove(&clone, "data");
            remove(&clone, "eth1");
            say("it lets go of its disk", &clone.shell(NO_DISK), "0");
            say(
                "it lets go of its interface",
                &clone.shell(NO_INTERFACE),
                "0",
            );
        }
        clone.client().kill().expect("it can be killed");
        clone.wait();
        drop(backend);
        tell(&format!(
            "clone {number} ran after {} ms and was checked after {} ms",
            running.as_millis(),
            began.elapsed().as_millis()
        ));
    }
}

fn tap() {
    for arguments in [
        "tuntap add dev plug0 mode tap vnet_hdr",
        "address add 10.99.0.1/24 dev plug0",
        "link set dev plug0 up",
    ] {
        run(Command::new("ip").args(arguments.split(' ')));
    }
}

fn interface() -> serde_json::Value {
    json!({"id": "eth1", "tap": "plug0", "mac": "52:54:00:99:00:02"})
}

fn add_disk(guest: &Guest, socket: &PathBuf) {
    let disk: DiskConfig =
        serde_json::from_value(json!({"id": "data", "socket": socket})).expect("a disk");
    guest.client().add_disk(disk).expect("the disk is added");
}

fn remove(guest: &Guest, id: &str) {
    let removal = RemovalRequest {
        timeout_ms: 60_000,
        ..RemovalRequest::of(id)
    };
    let removed = guest.client().remove_device(removal);
    removed.unwrap_or_else(|error| panic!("{id}: {error}"));
}
