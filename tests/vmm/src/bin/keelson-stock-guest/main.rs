//! Stock Debian guests on a host's KVM: what only a real kernel shows. Run in the lab by the test
//! `lab_stock_guest`, or on a machine with VT-x or SVM, with the kernel and the initramfs of
//! `keelson-lab` as arguments. Prints a line for each step, and panics where one fails.

mod hotplug;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use keelson_vmm::api::{AfterSnapshot, SnapshotKind, SnapshotRequest};
use keelson_vmm_tests::{Backend, Guest, GuestBuilder, be_patient, wait_until};
use serde_json::json;

const CLONES: usize = 10;
/// How long a step of a guest may take whose processors are emulated, on a busy machine.
const PATIENCE: Duration = Duration::from_mins(3);
/// The host's address, and the guest's.
const HOST: &str = "10.79.0.1";
const GUEST: &str = "10.79.0.2";
/// Bytes that go there and back.
const ECHOED: usize = 2 << 20;
const STEPS: [&str; 5] = ["disk", "clones", "devices", "processors", "hotplug"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, chosen @ ..] = &arguments[..] else {
        panic!("usage: keelson-stock-guest KERNEL INITRD [STEP…]");
    };
    be_patient(PATIENCE);
    tell("starts");
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
            "network" => self.has_a_queue_for_each_processor_which_the_kernel_serves(),
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

    /// The same with its shell on a virtio console.
    fn virtio_console(&self, vcpus: u8, memory_mib: u64) -> GuestBuilder {
        let command_line = "console=ttyS0 console=hvc0 quiet panic=-1";
        self.builder(vcpus, memory_mib)
            .set("/kernel/command_line", command_line)
            .set("/console/device", "virtio")
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

    /// Two vCPUs, two queue pairs, vhost-net by itself where the host has it; a snapshot under traffic.
    fn has_a_queue_for_each_processor_which_the_kernel_serves(&self) {
        let vhost = Path::new("/dev/vhost-net").exists();
        let tap = "ip tuntap add dev stock0 mode tap vnet_hdr multi_queue && \
                   ip address add 10.79.0.1/24 dev stock0 && ip link set stock0 up";
        run(Command::new("sh").args(["-c", tap]));
        let place = tempfile::TempDir::new().expect("there is a place for temporary files");
        let interface = || {
            let builder = self.builder(2, 128);
            let vhost = json!({"vhost": "auto"});
            builder.interface_with("eth0", "stock0", "52:54:00:00:00:09", &vhost)
        };
        let mut guest = interface().start();
        guest.wait_for_line("keelson-guest: ready");
        guest.shell(&format!("ip link set eth0 up; ifconfig eth0 {GUEST}"));
        let queues = "ls /sys/class/net/eth0/queues | tr '\\n' ' '";
        say(
            "two queue pairs",
            &guest.shell(queues),
            "rx-0 rx-1 tx-0 tx-1",
        );
        let queues = fs::read_dir("/sys/class/net/stock0/queues").expect("the TAP is there");
        say("two queues of the TAP", &queues.count().to_string(), "4");
        let open = descriptors(guest.process_id(), "/dev/vhost-net");
        let (pairs, threads) = (open.to_string(), net_threads(guest.process_id()));
        if vhost {
            say("vhost-net serves both", &pairs, "2");
            say("and no thread of the VMM", &threads.to_string(), "0");
        } else {
            println!("stock-guest: this host has no /dev/vhost-net; threads serve both");
            assert_eq!(threads, 2);
        }
        let ping = format!("ping -q -c 20 -i 0.05 -s 1400 {HOST} | grep -c ' 0% packet loss'");
        say("packets pass", &guest.shell(&ping), "1");

        let listener = TcpListener::bind((HOST, 7)).expect("the echo's port is free");
        let echo = std::thread::spawn(move || echo(&listener));
        guest.shell(&format!("head -c {ECHOED} /dev/urandom > /tmp/sent"));
        guest.type_line(&format!("nc {HOST} 7 < /tmp/sent > /tmp/came"));
        let snapshot = place.path().join("snapshot");
        take(&guest, &snapshot, AfterSnapshot::Resume);
        let difference = place.path().join("difference");
        take_differential(&guest, &difference);
        let came = echo.join().expect("the echo doesn't panic");
        say(
            "a stream goes on over two snapshots",
            &came.to_string(),
            &ECHOED.to_string(),
        );
        say("whole", &guest.shell("cmp /tmp/sent /tmp/came"), "");
        guest.client().kill().expect("it can be killed");
        guest.wait();
        for snapshot in [&snapshot, &difference] {
            let mut clone = interface().restore(snapshot, &[]).start();
            clone.wait_for_running();
            let ping = format!("for c in 0 1; do taskset -c $c {ping}; done | tr '\\n' ' '");
            say("and from each, on both", &clone.shell(&ping), "1 1");
            clone.client().kill().expect("it can be killed");
            clone.wait();
        }
        run(Command::new("ip").args(["link", "delete", "stock0"]));
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
            "pinning": [[0], [0], [0], [0]],
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

/// Takes what comes on one connection, and sends it back.
fn echo(listener: &TcpListener) -> usize {
    let (mut stream, _) = listener.accept().expect("the guest connects");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("the guest sends");
    stream.write_all(&bytes).expect("the guest takes it back");
    bytes.len()
}

/// How many descriptors of a process are open to a file.
fn descriptors(process: u32, file: &str) -> usize {
    let all = fs::read_dir(format!("/proc/{process}/fd")).expect("the process runs");
    all.flatten()
        .filter(|one| fs::read_link(one.path()).is_ok_and(|to| to == Path::new(file)))
        .count()
}

/// The process's own threads that move packets.
fn net_threads(process: u32) -> usize {
    let all = fs::read_dir(format!("/proc/{process}/task")).expect("the process runs");
    all.flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .filter(|name| name.starts_with("net"))
        .count()
}

fn take(guest: &Guest, directory: &Path, then: AfterSnapshot) {
    take_kind(guest, directory, SnapshotKind::Full, then);
}

fn take_differential(guest: &Guest, directory: &Path) {
    take_kind(
        guest,
        directory,
        SnapshotKind::Differential,
        AfterSnapshot::Resume,
    );
}

fn take_kind(guest: &Guest, directory: &Path, kind: SnapshotKind, then: AfterSnapshot) {
    let taken = guest.client().snapshot(SnapshotRequest {
        directory: directory.to_owned(),
        kind,
        then,
    });
    println!("stock-guest: snapshot {:?}", taken.expect("a snapshot"));
}

fn say(what: &str, found: &str, wanted: &str) {
    assert_eq!(found, wanted, "{what}");
    tell(what);
}

/// Says what was seen, and how long after the program's start: what takes long in the lab is to be seen.
fn tell(what: &str) {
    static START: OnceLock<Instant> = OnceLock::new();
    let seconds = START.get_or_init(Instant::now).elapsed().as_secs();
    println!("stock-guest: {seconds:3} s: {what}");
}

fn run(command: &mut Command) {
    let status = command.status().expect("the program is there");
    assert!(status.success(), "{command:?}: {status}");
}
