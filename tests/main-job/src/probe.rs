//! Whether the host's own KVM runs stock kernels: found by trying one.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

/// How long a stock kernel may take to its user space; on hardware it takes about a second.
const LIMIT: Duration = Duration::from_secs(20);
const INTERVAL: Duration = Duration::from_millis(20);

/// Boots the kernel as a guest of this host; the line that it says in user space.
///
/// # Errors
/// Why it did not get there.
pub fn stock_kernel(programs: &Path, kernel: &Path, initrd: &Path) -> Result<String> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        bail!("/dev/kvm: {error}");
    }
    let folder = tempfile::Builder::new()
        .prefix("keelson-probe-")
        .tempdir()?;
    let log = folder.path().join("console.log");
    let config = folder.path().join("guest.json");
    let guest = json!({
        "name": "probe",
        "vcpus": 1,
        "memory": {"size_mib": 256},
        "kernel": {"image": kernel, "initrd": initrd, "command_line": "console=ttyS0 quiet"},
        "console": {"socket": folder.path().join("console.sock"), "log": log},
        "disks": [],
        "interfaces": [],
    });
    fs::write(&config, guest.to_string()).context("write the guest's configuration")?;
    let errors = folder.path().join("errors");
    let mut vmm = Command::new(programs.join("keelson-vmm"))
        .args(["--log-level", "warn", "--config"])
        .arg(&config)
        .arg("--api-socket")
        .arg(folder.path().join("api.sock"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&errors)?)
        .spawn()
        .context("start keelson-vmm")?;
    let started = Instant::now();
    let outcome = loop {
        let said = fs::read(&log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        if let Some((_, line)) = said.split_once("keelson-guest: ")
            && let Some((line, _)) = line.split_once(['\r', '\n'])
        {
            break Ok(line.to_owned());
        }
        if vmm.try_wait()?.is_some() {
            let errors = fs::read_to_string(&errors).unwrap_or_default();
            break Err(errors
                .lines()
                .last()
                .unwrap_or("it said nothing")
                .to_owned());
        }
        if started.elapsed() > LIMIT {
            break Err(format!("no user space within {} s", LIMIT.as_secs()));
        }
        std::thread::sleep(INTERVAL);
    };
    // It may have ended by itself.
    let _ = vmm.kill();
    vmm.wait().context("wait for keelson-vmm")?;
    outcome.map_err(anyhow::Error::msg)
}
