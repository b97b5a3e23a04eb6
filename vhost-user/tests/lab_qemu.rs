//! QEMU as the client: a stock Debian kernel with ext4 on `vhost-user-blk-pci`, whose backend is
//! killed in the middle of its I/O, then grows. The machine is emulated, so any host can do it.

#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

mod harness;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use harness::Scene;
use keelson_lab::{KernelFiles, guest_initrd};

/// Longer than anything takes under emulation, on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

#[test]
fn a_stock_guest_keeps_its_files_while_its_backend_is_killed_and_its_disk_grows() {
    let scene = Scene::new(64 << 20);
    make_file_system(&scene.image);
    let backend = scene.start(&["--queues", "2"]);
    let mut guest = Guest::start(&scene);
    guest.until("keelson-guest: ready");

    // Data of which the guest has a copy elsewhere.
    guest.say("dd if=/dev/urandom of=/tmp/big bs=64k count=320 2>/dev/null; echo made$((1 + 1))");
    guest.until("made2");
    guest.say("(cp /tmp/big /data/big && sync && echo copied$((1 + 2)) || echo fail$((1 + 2))) &");
    std::thread::sleep(Duration::from_millis(300));
    backend.kill();
    std::thread::sleep(Duration::from_millis(500));
    let backend = scene.start(&["--queues", "2"]);
    let copied = guest.until_any(&["copied3", "fail3"]);
    assert!(copied.contains("copied3"), "{copied}");
    guest.say("echo 3 > /proc/sys/vm/drop_caches; cmp /tmp/big /data/big && echo same$((2 + 2))");
    guest.until("same4");

    // Discard gives space back to the host.
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&scene.image.metadata().unwrap());
    guest.say("rm /data/big; sync; echo removed$((1 + 4))");
    guest.until("removed5");
    let before = blocks();
    guest.say("fstrim /data; sync; echo trimmed$((3 + 3))");
    guest.until("trimmed6");
    assert!(
        blocks() < before,
        "{} of {before} blocks are left",
        blocks()
    );

    // The guest sees a new size while it runs.
    let image = std::fs::File::options()
        .write(true)
        .open(&scene.image)
        .unwrap();
    image.set_len(96 << 20).unwrap();
    backend.signal(rustix::process::Signal::HUP);
    guest.say(
        "while [ $(cat /sys/block/vda/size) != 196608 ]; do sleep 0.1; done; echo grown$((3 + 4))",
    );
    guest.until("grown7");
    guest.say("cat /sys/block/vda/queue/write_cache; echo kept > /data/kept; poweroff -f; echo");
    guest.until("write back");
    guest.qemu.wait().unwrap();
    drop(guest);
    assert_eq!(backend.terminate().code(), Some(0));

    // Not unmounted, so by replaying the journal; then there is nothing to repair.
    let check = |flag| {
        let mut command = Command::new("/usr/sbin/e2fsck");
        command
            .args([flag, "-f"])
            .arg(&scene.image)
            .output()
            .unwrap()
    };
    let repaired = check("-p");
    assert!(repaired.status.code() < Some(2), "{repaired:?}");
    assert!(check("-n").status.success());
}

fn make_file_system(image: &Path) {
    let made = Command::new("/usr/sbin/mke2fs")
        .args(["-q", "-t", "ext4"])
        .arg(image)
        .status();
    assert!(made.unwrap().success());
}

/// A machine with a shell on its console. Ends with this.
struct Guest {
    qemu: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Guest {
    fn start(scene: &Scene) -> Self {
        let kernel = KernelFiles::find("6.12").unwrap();
        let initrd = scene.directory.path().join("initrd");
        guest_initrd::write(&kernel, &initrd).unwrap();
        let mut qemu = Command::new("qemu-system-x86_64")
            .args("-nodefaults -no-user-config -display none -no-reboot -accel tcg".split(' '))
            .args("-cpu EPYC -m 512 -smp 2 -serial stdio".split(' '))
            .args([
                "-object",
                "memory-backend-memfd,id=memory,size=512M,share=on",
            ])
            .args(["-M", "q35,memory-backend=memory", "-chardev"])
            .arg(format!(
                "socket,id=disk,reconnect=1,path={}",
                scene.socket_path()
            ))
            .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=2"])
            .args(["-kernel".as_ref(), kernel.bz_image.as_os_str()])
            .args(["-initrd".as_ref(), initrd.as_os_str()])
            .args(["-append", "console=ttyS0 panic=-1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = qemu.stdin.take().unwrap();
        let output = BufReader::new(qemu.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                eprintln!("{line}");
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { qemu, input, lines }
    }

    fn say(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    fn until(&self, word: &str) -> String {
        self.until_any(&[word])
    }

    fn until_any(&self, words: &[&str]) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|error| panic!("no {words:?}: {error}"));
            if words.iter().any(|word| line.contains(word)) {
                return line;
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
