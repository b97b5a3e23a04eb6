//! keelson-vmm and QEMU with the same kernels.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;

use super::first_instruction;
use crate::report::Sample;

const POLL: Duration = Duration::from_micros(200);
const PATIENCE: Duration = Duration::from_mins(2);
const MEMORY_MIB: u64 = 256;
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1";

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// keelson-vmm.
    Keelson,
    /// QEMU with its smallest machine.
    Microvm,
    /// QEMU with its PC.
    Q35,
}

impl Peer {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Keelson, Self::Microvm, Self::Q35];

    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keelson => "keelson-vmm",
            Self::Microvm => "QEMU microvm",
            Self::Q35 => "QEMU q35",
        }
    }

    /// Starts a guest whose serial console goes to `folder/console.log`; QEMU with this processor model.
    fn start(
        self,
        folder: &Path,
        processor: &str,
        kernel: &Path,
        initrd: Option<&Path>,
    ) -> anyhow::Result<Running> {
        let log = folder.join("console.log");
        let mut command = match self {
            Self::Keelson => keelson(folder, &log, kernel, initrd)?,
            Self::Microvm => qemu("microvm", processor, &log, kernel, initrd),
            Self::Q35 => qemu("q35", processor, &log, kernel, initrd),
        };
        let errors = File::create(folder.join("errors"))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        let begun = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("start {}", self.name()))?;
        Ok(Running { child, begun, log })
    }
}

fn keelson(
    folder: &Path,
    log: &Path,
    kernel: &Path,
    initrd: Option<&Path>,
) -> anyhow::Result<Command> {
    let config = json!({
        "name": "perf",
        "vcpus": 1,
        "memory": {"size_mib": MEMORY_MIB},
        "kernel": {"image": kernel, "initrd": initrd, "command_line": COMMAND_LINE},
        "console": {"socket": folder.join("console.sock"), "log": log},
    });
    let path = folder.join("guest.json");
    fs::write(&path, config.to_string())?;
    let mut command = Command::new(keelson_vmm_tests::binary("keelson-vmm"));
    command
        .arg("--config")
        .arg(path)
        .arg("--api-socket")
        .arg(folder.join("api.sock"));
    Ok(command)
}

/// As QEMU's documentation of microvm recommends it (docs/system/i386/microvm.rst), but for
/// `-nographic`, which would have the firmware print as well.
fn qemu(
    machine: &str,
    processor: &str,
    log: &Path,
    kernel: &Path,
    initrd: Option<&Path>,
) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", machine, "-accel", "kvm", "-cpu", processor])
        .args(["-smp", "1", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot"])
        .args(["-m", &format!("{MEMORY_MIB}M"), "-append", COMMAND_LINE])
        .arg("-serial")
        .arg(format!("file:{}", log.display()))
        .arg("-kernel")
        .arg(kernel);
    if let Some(initrd) = initrd {
        command.arg("-initrd").arg(initrd);
    }
    command
}

/// A guest, which is killed in the end.
struct Running {
    child: Child,
    begun: Instant,
    log: PathBuf,
}

impl Running {
    /// Milliseconds from the start until `sign` is on the console.
    fn until(&mut self, sign: &[u8]) -> anyhow::Result<f64> {
        loop {
            let log = fs::read(&self.log).unwrap_or_default();
            if log.windows(sign.len()).any(|window| window == sign) {
                return Ok(self.begun.elapsed().as_secs_f64() * 1e3);
            }
            if let Some(status) = self.child.try_wait()? {
                anyhow::bail!(
                    "it ended ({status}) before {:?}",
                    String::from_utf8_lossy(sign)
                );
            }
            anyhow::ensure!(
                self.begun.elapsed() < PATIENCE,
                "no {:?} within {PATIENCE:?}",
                String::from_utf8_lossy(sign)
            );
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the peers are measured with.
pub struct Setting<'a> {
    /// Who.
    pub peers: &'a [Peer],
    /// What names of work end with: where it is done.
    pub place: &'a str,
    /// A stock kernel and its initrd, booted as well.
    pub stock: Option<(&'a Path, &'a Path)>,
}

/// Measures the peers in turn.
pub fn measure(rounds: u32, setting: &Setting<'_>) -> anyhow::Result<Vec<Sample>> {
    let folder = tempfile::tempdir()?;
    let tiny = folder.path().join("first-instruction");
    fs::write(&tiny, first_instruction::image())?;
    let processor = processor_model(&tiny)?;
    let mut samples = Vec::new();
    for round in 1..=rounds {
        let first = usize::try_from(round)? % setting.peers.len();
        let mut order = setting.peers.to_vec();
        order.rotate_left(first);
        let mut add = |peer: Peer, work: &str, figures: &[(&'static str, f64)]| {
            samples.push(Sample {
                peer: peer.name(),
                work: format!("{work}{}", setting.place),
                round,
                figures: figures.iter().copied().collect(),
            });
        };
        for peer in &order {
            let (first, exits) = first_instruction_of(*peer, processor, &tiny)?;
            add(*peer, "start to first instruction", &[("ms", first)]);
            add(*peer, "exits", &[("exits_per_s", exits)]);
        }
        let Some((kernel, initrd)) = setting.stock else {
            continue;
        };
        for peer in &order {
            let place = tempfile::tempdir()?;
            let mut guest = peer.start(place.path(), processor, kernel, Some(initrd))?;
            let took = guest.until(b"keelson-guest: userspace up");
            let took = took.with_context(|| told(*peer, place.path()))?;
            add(*peer, "start to init", &[("ms", took)]);
        }
    }
    Ok(samples)
}

/// Milliseconds to the first instruction, and exits per second after it.
fn first_instruction_of(peer: Peer, processor: &str, kernel: &Path) -> anyhow::Result<(f64, f64)> {
    let place = tempfile::tempdir()?;
    let measured = || -> anyhow::Result<(f64, f64)> {
        let mut guest = peer.start(place.path(), processor, kernel, None)?;
        let first = guest.until(&[first_instruction::SIGN])?;
        let end = guest.until(&[first_instruction::END])?;
        let exits = f64::from(first_instruction::EXITS);
        Ok((first, exits / (end - first) * 1e3))
    };
    measured().with_context(|| told(peer, place.path()))
}

/// The host's processor, without a register that some KVMs offer and don't take where that is so.
fn processor_model(kernel: &Path) -> anyhow::Result<&'static str> {
    const MODELS: [&str; 2] = ["host", "host,-arch-capabilities"];
    let works = |model: &&str| first_instruction_of(Peer::Microvm, model, kernel).is_ok();
    let found = MODELS.into_iter().find(works);
    found.context("QEMU microvm doesn't start on this KVM")
}

/// What a peer printed as errors.
fn told(peer: Peer, place: &Path) -> String {
    let errors = fs::read_to_string(place.join("errors"));
    format!("{}: {}", peer.name(), errors.unwrap_or_default())
}
