//! Stock kernels boot with the guest initramfs, see their disk and network, obey the shell on their
//! console and the ACPI power button. Here the machine under them is QEMU's emulation.

#![allow(clippy::unwrap_used)] // A test ends where its steps, functions here, fail.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use keelson_lab::{KernelFiles, guest_initrd};

#[test]
fn kernel_6_12_is_a_test_guest() {
    guest("6.12");
}

#[test]
fn kernel_6_1_is_a_test_guest() {
    guest("6.1");
}

fn guest(series: &str) {
    let folder = tempfile::tempdir().unwrap();
    let kernel = KernelFiles::find(series).unwrap();
    let initrd = folder.path().join("initrd");
    guest_initrd::write(&kernel, &initrd).unwrap();
    let disk = folder.path().join("disk.img");
    disk_with_file(&folder.path().join("content"), &disk);

    let monitor = folder.path().join("monitor");
    let mut qemu = Killed(start(&kernel, &initrd, &disk, &monitor));
    let mut input = qemu.0.stdin.take().unwrap();
    let output = BufReader::new(qemu.0.stdout.take().unwrap());
    let mut lines = output
        .split(b'\n')
        .map(|line| String::from_utf8_lossy(&line.unwrap()).into_owned());
    let mut until = |word: &str| {
        lines
            .find(|line| line.contains(word))
            .unwrap_or_else(|| panic!("no {word:?} before the end"))
    };

    until("keelson-guest: userspace up after ");
    until("keelson-guest: ready");
    // The arithmetic keeps the echo of a command from being taken for its answer.
    input
        .write_all(b"echo sum$((20 + 22)) $(cat /data/file) $(hostname)\n")
        .unwrap();
    assert_eq!(until("sum42").trim_end(), "sum42 from the host web");
    input
        .write_all(b"echo net$((1 + 1)) $(ip -4 -o addr show eth0) $(ip route | head -n 1)\n")
        .unwrap();
    let network = until("net2");
    assert!(
        network.contains("10.9.0.2/24") && network.contains("default via 10.9.0.1"),
        "{network}"
    );
    input
        .write_all(b"echo written by the guest > /data/answer; echo done$((1 + 2))\n")
        .unwrap();
    until("done3");

    let mut monitor = std::os::unix::net::UnixStream::connect(&monitor).unwrap();
    monitor.write_all(b"system_powerdown\n").unwrap();
    until("keelson-guest: power button");
    until("reboot: Power down");
    assert!(qemu.0.wait().unwrap().success());

    // Unmounted cleanly: the file is there without replaying the journal.
    let cat = Command::new("/usr/sbin/debugfs")
        .args(["-R", "cat /answer"])
        .arg(&disk)
        .output()
        .unwrap();
    assert_eq!(cat.stdout, b"written by the guest\n");
}

/// Ends its process, whatever the test did.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _status = self.0.wait();
    }
}

fn disk_with_file(content: &Path, disk: &Path) {
    std::fs::create_dir(content).unwrap();
    std::fs::write(content.join("file"), "from the host").unwrap();
    let made = Command::new("/usr/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([content.as_os_str(), disk.as_os_str(), "64M".as_ref()])
        .status()
        .unwrap();
    assert!(made.success());
}

fn start(kernel: &KernelFiles, initrd: &Path, disk: &Path, monitor: &Path) -> Child {
    Command::new("qemu-system-x86_64")
        .args("-nodefaults -no-user-config -display none -no-reboot -accel tcg -cpu EPYC -M q35 -m 512".split(' '))
        .args(["-serial", "stdio", "-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n"])
        .args(["-device", "virtio-blk-pci,drive=d", "-drive"])
        .arg(format!("id=d,if=none,format=raw,file={}", disk.display()))
        .arg("-monitor")
        .arg(format!("unix:{},server=on,wait=off", monitor.display()))
        .args(["-kernel".as_ref(), kernel.bz_image.as_os_str(), "-initrd".as_ref(), initrd.as_os_str()])
        .args(["-append", "console=ttyS0 panic=-1 ip=10.9.0.2::10.9.0.1:255.255.255.0:web:eth0:off"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}
