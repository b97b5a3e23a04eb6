//! Namespaces of the run's own: what it makes of networks, mounts and processes ends with it.
//!
//! The program starts itself a second time, as the first process of new namespaces. When that ends,
//! however it ends, the kernel kills every process in there, and with the last of them go network
//! devices and mounts. The first process stays outside to thaw what is frozen, for a process that
//! waits for a frozen file system can't even be killed, and to remove the files.

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, bail};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};

/// Names the run's folder to the program inside.
const FOLDER: &str = "KEELSON_NEMESIS_FOLDER";

/// Where the program is.
pub enum Side {
    /// In namespaces of its own, with a folder for everything.
    Inside(PathBuf),
    /// Outside, and what the program inside ended with.
    Outside(ExitCode),
}

/// Goes inside. Must be called before any thread is started.
pub fn enter() -> anyhow::Result<Side> {
    match std::env::var_os(FOLDER) {
        Some(folder) => {
            settle()?;
            Ok(Side::Inside(folder.into()))
        }
        None => Ok(Side::Outside(stay_outside()?)),
    }
}

fn settle() -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    rustix::mount::mount(
        "proc",
        "/proc",
        "proc",
        MountFlags::empty(),
        None::<&std::ffi::CStr>,
    )
    .context("mount /proc for the new processes")?;
    run("ip", &["link", "set", "dev", "lo", "up"])
}

fn stay_outside() -> anyhow::Result<ExitCode> {
    let namespaces = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWPID;
    // SAFETY: there is one thread yet; new namespaces leave memory and descriptors shared.
    unsafe { unshare_unsafe(namespaces) }
        .context("make namespaces: this needs root (CAP_SYS_ADMIN)")?;
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .context("make mounts private")?;
    let folder = tempfile::Builder::new()
        .prefix("keelson-nemesis-")
        .tempdir()?;
    let (alive, held_inside) = std::io::pipe()?;
    let mut inside = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(FOLDER, folder.path())
        .stdin(Stdio::from(held_inside))
        .spawn()
        .context("start the program inside its namespaces")?;
    // No threads: a process whose children are in another namespace of processes may have none.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        // Its end of the pipe is closed when it ends, before what it started is waited for.
        let alive = pipe::Receiver::from_owned_fd(alive.into())?;
        tokio::select! {
            ended = alive.readable() => ended?,
            _ = interrupt.recv() => inside.kill()?,
            _ = terminate.recv() => inside.kill()?,
        }
        anyhow::Ok(())
    })?;
    thaw_all(folder.path());
    let status = inside.wait().context("wait for the program inside")?;
    unmount_all(folder.path());
    remove(folder)?;
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    Ok(u8::try_from(code.unwrap_or(1)).map_or(ExitCode::FAILURE, ExitCode::from))
}

fn thaw_all(folder: &Path) {
    for mount in mounts(folder) {
        let _ = Command::new("fsfreeze")
            .arg("--unfreeze")
            .arg(mount)
            .stderr(Stdio::null())
            .status();
    }
}

fn unmount_all(folder: &Path) {
    for mount in mounts(folder) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(mount)
            .stderr(Stdio::null())
            .status();
    }
}

/// Mounts may need some time to go: what a full and slow disk has cached is written first.
fn remove(folder: tempfile::TempDir) -> anyhow::Result<()> {
    let path = folder.keep();
    for _ in 0..600 {
        if std::fs::remove_dir_all(&path).is_ok() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    std::fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))
}

fn mounts(folder: &Path) -> Vec<PathBuf> {
    // The program inside has replaced /proc; this process is known there by no number.
    let mounts = std::fs::read_to_string(folder.join("mounts")).unwrap_or_default();
    mounts.lines().map(PathBuf::from).collect()
}

/// Notes a mount, so that it is thawed and unmounted whatever happens.
pub fn note_mount(folder: &Path, mount: &Path) -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut notes = std::fs::File::options()
        .create(true)
        .append(true)
        .open(folder.join("mounts"))?;
    writeln!(notes, "{}", mount.display())?;
    Ok(())
}

/// Runs a program that has nothing to say but errors.
pub fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {program}: is it installed?"))?;
    if !output.status.success() {
        bail!(
            "`{program} {}` failed: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
