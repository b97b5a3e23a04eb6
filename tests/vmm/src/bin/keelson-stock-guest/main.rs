//! Stock Debian guests on a host's KVM: what only a real kernel shows. Run in the lab by the test
//! `lab_stock_guest`, or on a machine with VT-x or SVM, with the kernel and the initramfs of
//! `keelson-lab` as arguments. Prints a line for each step, and panics where one fails.

mod hotplug;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use keelson_vmm::api::{AfterSnapshot, SnapshotKind, SnapshotRequest};
use keelson_vmm_tests::{Backend, Guest, GuestBuilder, wait_until};
use serde_json::json;

const CLONES: usize = 10;
const STEPS: [&str; 5] = ["disk", "clones", "devices", "processors", "hotplug"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, chosen @ ..] = &arguments[..] else {
        panic!("usage: keelson-stock-guest KERNEL INITRD [STEP…]");
    };
    let stock = Stock { kernel, initrd };
    for step in STEPS {
        if chosen.is_empty() || chosen.iter().any(|chosen| chosen == step) {
            stock.take(step);
        }
    }
    println!("stock-guest: all passed");
}

struct Stock<'a> {
    kernel: &'a str,
    initrd: &'a str,
}

impl Stock<'_> {
    fn take(&self, step: &str) {
        match step {
            "disk" => self.goes_on_from_a_snapshot_with_its_disk(),
            "clones" => self.clones_draw_different_random_numbers(),
            "devices" => self.finds_its_devices(),
            "hotplug" => self.takes_devices_while_it_runs(),
            _ => self.comes_up_with_what_its_processors_are_to_be(),
        }
    }

    fn builder(&self, vcpus: u8, memory_mib: u64) -> GuestBuilder {
        GuestBuilder::new("")
            .set("/kernel/image", self.kernel)
            .set("/kernel/initrd", self.initrd)
            .set("/kernel/command_line", "console=ttyS0 quiet panic=-1")
            .set("/vcpus", vcpus)
            .set("/memory/size_mib", memory_mib)
    }

    fn goes_on_from_a_snapshot_with_its_disk(&self) {
        let place = tempfile::TempDir::new().expect("there is a place for temporary files");
        let (image, copy) = (place.path().join("disk"), place.path().join("copy"));
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4"])
            .arg(&image)
            .arg("16M"));
        let builder = self.builder(4, 256);
        let backend = Backend::start(&image, &builder.directory().join("blk.sock"), &[]);
        let mut guest = builder.disk("disk", &backend, false, 1).start();
        guest.wait_for_line("keelson-guest: ready");
        say("four vCPUs boot", &guest.shell("nproc"), "4");
        guest.shell("echo before > /data/file; sync; sleep 1000 & echo $! > /run/sleeper");
        let snapshot = place.path().join("snapshot");
        take(&guest, &snapshot, AfterSnapshot::Pause);
        fs::copy(&image, &copy).expect("the image can be copied");
        guest.client().resume().expect("it can go on");
        let alive = "cat /data/file; kill -0 $(cat /run/sleeper) && echo alive";
        say("it goes on", &guest.shell(alive), "before\nalive");
        guest
            .client()
            .power_button()
            .expect("the button can be pressed");
        assert_eq!(guest.wait().code, Some(0));
        drop(backend);

        let builder = self.builder(4, 256);
        let backend = Backend::start(&copy, &builder.directory().join("blk.sock"), &[]);
        let mut clone = builder
            .disk("disk", &backend, false, 1)
            .restore(&snapshot, &[])
            .start();
        clone.wait_for_running();
        say("so does its clone", &clone.shell(alive), "before\nalive");
        say(
            "on all vCPUs",
            &clone.shell("for c in 0 1 2 3; do taskset -c $c echo $c; done | wc -l"),
            "4",
        );
        say(
            "and its disk",
            &clone.shell("echo after > /data/file; sync; cat /data/file"),
            "after",
        );
        clone
            .client()
            .power_button()
            .expect("the button can be pressed");
        let ended = clone.wait();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        run(Command::new("e2fsck").arg("-fn").arg(&copy));
    }

    /// The kernel's own drivers of balloon, sockets, watchdog and panic device.
    fn finds_its_devices(&self) {
        let builder = self.builder(1, 256);
        let socket = builder.directory().join("vsock.sock");
        let mut guest = builder
            .set("/balloon", json!({}))
            .set("/vsock", json!({"socket": socket}))
            .set("/watchdog", json!({}))
            .set("/panic", json!({"action": "exit"}))
            .start();
        guest.wait_for_line("keelson-guest: ready");
        guest.shell("load-devices");
        let balloon = || guest.client().balloon().expect("it has a balloon");
        let total = wait_until("statistics", || balloon().statistics?.total_bytes);
        assert!((200 << 20..=256 << 20).contains(&total), "{total}");
        guest
            .client()
            .resize_balloon(32)
            .expect("it can be resized");
        wait_until("full balloon", || {
            (balloon().actual_bytes == 32 << 20).then_some(())
        });
        let reported = wait_until("reported memory", || {
            Some(balloon().reported_bytes).filter(|bytes| *bytes > 16 << 20)
        });
        println!("stock-guest: it gives memory back, and reports {reported} bytes that are free");
        // Nobody listens in the guest: its kernel refuses.
        let mut stream = UnixStream::connect(&socket).expect("the device listens");
        writeln!(stream, "CONNECT 52").expect("it takes a line");
        assert_eq!(stream.read(&mut [0]).expect("an end"), 0);
        say(
            "its kernel answers sockets",
            &guest.shell("ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport | grep -c virtio"),
            "1",
        );
        // Fed once, and then no more for long.
        guest.type_line("watchdog -T 2 -t 1000 /dev/watchdog");
        wait_until("second boot", || {
            let ready = guest.log().matches("keelson-guest: ready").count();
            (ready == 2).then_some(())
        });
        println!("stock-guest: its watchdog resets it");
        guest.shell("load-devices");
        guest.type_line("echo c > /proc/sysrq-trigger");
        let ended = guest.wait();
        ended.assert_refused(1, &["panicked"]);
        println!("stock-guest: its panic is told");
    }

    /// Topology, a CPU template and pinning together.
    fn comes_up_with_what_its_processors_are_to_be(&self) {
        let cpu = json!({
            "topology": {"sockets": 1, "cores": 2, "threads": 2},
            "template": "x86-64-v2",
            "pinning": [[0], [1], [0], [1]],
        });
        let mut guest = self.builder(4, 128).set("/cpu", cpu).start();
        guest.wait_for_line("keelson-guest: ready");
        let siblings = "cat /sys/devices/system/cpu/cpu0/topology/thread_siblings_list";
        say("its threads are siblings", &guest.shell(siblings), "0-1");
        let features = "grep -c -w -e xsave -e avx /proc/cpuinfo || true";
        say("a template hides features", &guest.shell(features), "0");
    }

    fn clones_draw_different_random_numbers(&self) {
        let place = tempfile::TempDir::new().expect("there is a place for temporary files");
        let snapshot = place.path().join("snapshot");
        let mut guest = self.builder(1, 128).start();
        guest.wait_for_line("keelson-guest: ready");
        guest.shell("true");
        take(&guest, &snapshot, AfterSnapshot::Resume);
        let random = "sleep 1; head -c 16 /dev/urandom | md5sum | cut -c 1-32; dmesg | grep -c 'virtual machine fork'";
        let mut seen = vec![guest.shell("head -c 16 /dev/urandom | md5sum | cut -c 1-32")];
        guest.client().kill().expect("it can be killed");
        let mut clones: Vec<Guest> = (0..CLONES)
            .map(|_| self.builder(1, 128).restore(&snapshot, &[]).start())
            .collect();
        for clone in &mut clones {
            clone.wait_for_running();
            let said = clone.shell(random);
            let (number, forks) = said.split_once('\n').expect("two lines");
            assert_eq!(forks, "1", "the kernel has not noticed: {said}");
            seen.push(number.to_owned());
        }
        seen.sort();
        seen.dedup();
        say("ten clones reseed", &seen.len().to_string(), "11");
    }
}

fn take(guest: &Guest, directory: &Path, then: AfterSnapshot) {
    let taken = guest.client().snapshot(SnapshotRequest {
        directory: directory.to_owned(),
        kind: SnapshotKind::Full,
        then,
    });
    println!("stock-guest: snapshot {:?}", taken.expect("a snapshot"));
}

fn say(what: &str, found: &str, wanted: &str) {
    assert_eq!(found, wanted, "{what}");
    println!("stock-guest: {what}");
}

fn run(command: &mut Command) {
    let status = command.status().expect("the program is there");
    assert!(status.success(), "{command:?}: {status}");
}
