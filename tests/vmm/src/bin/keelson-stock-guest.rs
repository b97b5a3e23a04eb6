//! Stock Debian guests on a host's KVM: what only a real kernel shows. Run in the lab by the test
//! `lab_stock_guest`, or on a machine with VT-x or SVM, with the kernel and the initramfs of
//! `keelson-lab` as arguments. Prints a line for each step, and panics where one fails.

use std::fs;
use std::path::Path;
use std::process::Command;

use keelson_vmm::api::{AfterSnapshot, SnapshotKind, SnapshotRequest};
use keelson_vmm_tests::{Backend, Guest, GuestBuilder};

const CLONES: usize = 10;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd] = &arguments[..] else {
        panic!("usage: keelson-stock-guest KERNEL INITRD");
    };
    let stock = Stock { kernel, initrd };
    stock.goes_on_from_a_snapshot_with_its_disk();
    stock.clones_draw_different_random_numbers();
    println!("stock-guest: all passed");
}

struct Stock<'a> {
    kernel: &'a str,
    initrd: &'a str,
}

impl Stock<'_> {
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
