//! PID 1 of the lab, its control server, and a check of the lab's KVM.
//!
//! As `/init` of the initramfs it loads the disk's drivers, makes the root disk `/` and starts itself
//! again from there. Then it is two processes: PID 1 only reaps what was orphaned, so that the server, its
//! child, may wait for its own children; when the server ends, PID 1 powers the machine off.

mod commands;
mod files;
mod held_machines;
mod kvm_check;
mod mounts;
mod server;

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use rustix::process::WaitOptions;
use rustix::system::RebootCommand;

/// What the first stage hands to the second, in the environment.
const TOKEN: &str = "KEELSON_LAB_TOKEN";
const LATE_MODULES: &str = "KEELSON_LAB_MODULES";

fn main() -> ExitCode {
    let argument = std::env::args().nth(1).unwrap_or_default();
    let is_init = rustix::process::getpid().is_init();
    let result = match argument.as_str() {
        "second-stage" if is_init => second_stage(),
        _ if is_init => first_stage(),
        "serve" => server::serve(),
        "check-kvm" => kvm_check::check_kvm().map(|report| println!("{report}")),
        _ => Err(anyhow::anyhow!("usage: keelson-lab-init check-kvm")),
    };
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    eprintln!("keelson-lab-init: {error:#}");
    if is_init {
        // The end of the machine is the clearest sign for whoever waits outside.
        let _cannot_fail_as_root = rustix::system::reboot(RebootCommand::PowerOff);
    }
    ExitCode::FAILURE
}

/// In the initramfs: from nothing to the root disk.
fn first_stage() -> Result<()> {
    mounts::mount_first()?;
    let token = std::fs::read_to_string("/token").context("reading the token")?;
    let late = std::fs::read_to_string("/late").context("reading the module list")?;
    for path in std::fs::read_to_string("/early")?.lines() {
        mounts::load_module(path)?;
    }
    mounts::switch_to_root_disk()?;
    let error = Command::new("/sbin/keelson-lab-init")
        .arg("second-stage")
        .env_clear()
        .env(TOKEN, token)
        .env(LATE_MODULES, late)
        .exec();
    Err(error).context("starting the second stage from the root disk")
}

/// On the root disk: everything else, then reap until the server ends.
fn second_stage() -> Result<()> {
    let late = std::env::var(LATE_MODULES).unwrap_or_default();
    mounts::mount_rest(&late)?;
    let _machines = held_machines::HeldMachines::hold();
    let token = std::env::var(TOKEN).context("the first stage gave no token")?;
    let server = Command::new("/proc/self/exe")
        .arg("serve")
        .env_clear()
        .env(TOKEN, token)
        .spawn()
        .context("starting the control server")?;
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status)))
                if pid.as_raw_nonzero().get().cast_unsigned() == server.id() =>
            {
                rustix::fs::sync();
                if status.exit_status() == Some(0) {
                    rustix::system::reboot(RebootCommand::PowerOff)?;
                }
                bail!("the control server ended: {status:?}");
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => bail!("waiting for children: {error}"),
        }
    }
}
