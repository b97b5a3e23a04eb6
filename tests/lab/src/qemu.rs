//! The emulator that a lab runs in.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::error::file;
use crate::time_stamp_counter::frequency_khz;
use crate::tool::locate;
use crate::{KernelFiles, LabError, LabOptions, protocol};

/// Everything that one start of QEMU needs.
pub(crate) struct Machine<'a> {
    pub(crate) options: &'a LabOptions,
    pub(crate) kernel: &'a KernelFiles,
    pub(crate) initramfs: &'a Path,
    pub(crate) root_image: &'a Path,
    pub(crate) modules_image: &'a Path,
    pub(crate) console: &'a Path,
    /// On the loopback interface of this machine, forwarded to [`protocol::PORT`] in the lab.
    pub(crate) port: u16,
}

impl Machine<'_> {
    /// Starts QEMU, with its output and the lab's serial console in the console file.
    pub(crate) fn start(&self) -> Result<Child, LabError> {
        let program = locate("qemu-system-x86_64").ok_or_else(|| LabError::ProgramMissing {
            program: "qemu-system-x86_64".to_owned(),
            reason: "not found".to_owned(),
            remedy: "setup/debian-packages installs qemu-system-x86",
        })?;
        let console = File::create(self.console).map_err(file("write", self.console))?;
        let errors = console.try_clone().map_err(file("write", self.console))?;
        let mut command = Command::new(program);
        command
            .args(self.arguments())
            .stdin(Stdio::null())
            .stdout(console)
            .stderr(errors);
        if self.options.detached {
            // Its own process group: an interrupt at the terminal must not end it.
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
        }
        command
            .spawn()
            .map_err(file("run", Path::new("qemu-system-x86_64")))
    }

    fn arguments(&self) -> Vec<OsString> {
        let memory = format!("{}M", self.options.memory_mib);
        let cpus = self.options.cpus.to_string();
        let network = format!(
            "user,id=control,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:{}-:{}",
            self.port,
            protocol::PORT
        );
        // The lab is thrown away: what its kernel syncs need not reach this machine's disk.
        let root = drive("root", self.root_image, "cache=unsafe,discard=unmap");
        let modules = drive("modules", self.modules_image, "read-only=on");
        let mut arguments: Vec<OsString> = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            // TCG lacks a few features of this processor model and says so; none matters here.
            // Without nested paging: with it the host's first instruction after an exit of a guest with several
            // vCPUs now and then is a page fault, as if the guest's nested page table were still in use; the
            // guest seems to have had a triple fault then (QEMU 7.2), or the lab resets (10.0).
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "EPYC,+svm,-npt",
            "-M",
            "microvm,rtc=on,isa-serial=on",
            "-serial",
            "stdio",
            "-device",
            "virtio-rng-device",
            "-device",
            "virtio-blk-device,drive=root",
            "-device",
            "virtio-blk-device,drive=modules",
            "-device",
            "virtio-net-device,netdev=control",
        ]
        .map(OsString::from)
        .to_vec();
        arguments.extend(["-m", &memory, "-smp", &cpus, "-netdev", &network].map(OsString::from));
        arguments.extend(["-drive".into(), root, "-drive".into(), modules]);
        arguments.extend([
            "-kernel".into(),
            self.kernel.vmlinux.clone().into_os_string(),
        ]);
        arguments.extend(["-initrd".into(), self.initramfs.as_os_str().to_owned()]);
        arguments.extend(["-append".into(), self.command_line().into()]);
        arguments
    }

    fn command_line(&self) -> String {
        let lifetime = self.options.lifetime.as_secs();
        let mut words = vec![
            // A failed lab ends (-no-reboot), and its last words are in the console file.
            "console=ttyS0 panic=-1 oops=panic quiet loglevel=4".to_owned(),
            // Mitigations and audits cost much under emulation and protect nothing here.
            "mitigations=off audit=0 random.trust_cpu=on nowatchdog".to_owned(),
            format!("tsc=reliable tsc_early_khz={}", frequency_khz()),
            format!("keelson.lifetime={lifetime}"),
        ];
        words.extend(self.options.kernel_arguments.iter().cloned());
        words.join(" ")
    }
}

fn drive(id: &str, image: &Path, more: &str) -> OsString {
    let mut drive = OsString::from(format!("id={id},if=none,format=raw,{more},file="));
    // QEMU reads a doubled comma as one.
    drive.push(image.to_string_lossy().replace(',', ",,"));
    drive
}

/// The lab's init: `$KEELSON_LAB_INIT`, else beside the running program or one folder above (where
/// cargo puts it, seen from a test).
pub(crate) fn find_init() -> Result<PathBuf, LabError> {
    const NAME: &str = "keelson-lab-init";
    if let Some(path) = std::env::var_os("KEELSON_LAB_INIT") {
        return Ok(path.into());
    }
    let running = std::env::current_exe().map_err(file("find", Path::new("/proc/self/exe")))?;
    running
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(NAME))
        .find(|path| path.is_file())
        .ok_or_else(|| LabError::ProgramMissing {
            program: NAME.to_owned(),
            reason: format!("not beside {}", running.display()),
            remedy: "build it with cargo build -p keelson-lab, or name it in KEELSON_LAB_INIT",
        })
}
