use std::ffi::CStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount, mount_move};

/// The lab's disks. Which is which is told by the modules disk being read-only: the order in which
/// the kernel finds them is not fixed.
const DISKS: [&str; 2] = ["vda", "vdb"];

/// What the first stage needs to see devices.
pub fn mount_first() -> Result<()> {
    mount_one("proc", "/proc", c"")?;
    mount_one("sysfs", "/sys", c"")?;
    mount_one("devtmpfs", "/dev", c"")
}

/// Makes the root disk `/`.
pub fn switch_to_root_disk() -> Result<()> {
    let disk = disk(ReadOnly(false))?;
    mount(&disk, "/root", "ext4", MountFlags::empty(), None)
        .with_context(|| format!("mounting {disk} at /root"))?;
    for folder in ["/dev", "/proc", "/sys"] {
        mount_move(folder, format!("/root{folder}")).with_context(|| format!("moving {folder}"))?;
    }
    std::env::set_current_dir("/root").context("entering the root disk")?;
    mount_move(".", "/").context("making the root disk /")?;
    rustix::process::chroot(".").context("entering the root disk")?;
    std::env::set_current_dir("/").context("entering the root disk")
}

#[derive(Clone, Copy)]
struct ReadOnly(bool);

/// Waits for one of the lab's disks.
fn disk(read_only: ReadOnly) -> Result<String> {
    let is_it = |disk: &&str| {
        let flag = std::fs::read_to_string(format!("/sys/block/{disk}/ro")).unwrap_or_default();
        flag.trim() == if read_only.0 { "1" } else { "0" } && Path::new("/dev").join(disk).exists()
    };
    let started = Instant::now();
    loop {
        if let Some(disk) = DISKS.iter().find(|disk| is_it(disk)) {
            return Ok(format!("/dev/{disk}"));
        }
        if started.elapsed() > Duration::from_secs(10) {
            bail!("the lab's disks did not appear within 10 s");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// All a host has mounted, and the modules it works with. `late_modules` are paths below the
/// kernel's module folder, one a line.
pub fn mount_rest(late_modules: &str) -> Result<()> {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let modules = format!("/usr/lib/modules/{release}");
    let disk = disk(ReadOnly(true))?;
    mount(&disk, &modules, "ext4", MountFlags::RDONLY, Some(c"noload"))
        .with_context(|| format!("mounting {disk} at {modules}"))?;
    for path in late_modules.lines() {
        load_module(&format!("{modules}/{path}"))?;
    }
    for (kind, target, data) in [
        ("tmpfs", "/run", c"mode=755"),
        ("tmpfs", "/tmp", c"mode=1777"),
        ("devpts", "/dev/pts", c"gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", c"mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", c""),
        ("bpf", "/sys/fs/bpf", c"mode=700"),
        ("tracefs", "/sys/kernel/tracing", c""),
        ("debugfs", "/sys/kernel/debug", c""),
        ("securityfs", "/sys/kernel/security", c""),
        ("hugetlbfs", "/dev/hugepages", c""),
    ] {
        if target.starts_with("/dev/") {
            std::fs::create_dir_all(target).with_context(|| format!("making {target}"))?;
        }
        mount_one(kind, target, data)?;
    }
    std::fs::write(
        "/sys/fs/cgroup/cgroup.subtree_control",
        "+cpu +memory +io +pids",
    )
    .context("delegating cgroup controllers")?;
    rustix::system::sethostname(b"keelson-lab").context("setting the host name")?;
    set_up_network()
}

/// The control network has a name of its own, so that `eth0` stays free.
fn set_up_network() -> Result<()> {
    for words in [
        "link set lo up",
        "link set eth0 name lab0",
        "address add 10.0.2.15/24 dev lab0",
        "link set lab0 up",
    ] {
        let status = Command::new("/usr/bin/busybox")
            .arg("ip")
            .args(words.split(' '))
            .stdin(Stdio::null())
            .status()
            .context("running busybox")?;
        if !status.success() {
            bail!("ip {words}: {status}");
        }
    }
    Ok(())
}

/// Loads a module from a file; one that is loaded already is fine.
pub fn load_module(path: &str) -> Result<()> {
    let image = std::fs::read(path).with_context(|| format!("reading the module {path}"))?;
    match rustix::system::init_module(&image, c"") {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("loading the module {path}")),
    }
}

fn mount_one(kind: &str, target: &str, data: &CStr) -> Result<()> {
    mount(kind, target, kind, MountFlags::empty(), Some(data))
        .with_context(|| format!("mounting {kind} at {target}"))
}
