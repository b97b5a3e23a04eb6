//! One boot of the guest: a KVM virtual machine with its memory, devices and vCPUs.
//!
//! A reboot drops the machine and builds another one, so nothing of the old boot is left.

mod hotplug;
mod migration;
mod slots;
mod snapshot;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{self, BootFiles, acpi::AcpiConfig, layout};
use crate::config::GuestConfig;
use crate::console::ConsoleOutput;
use crate::cpuid;
use crate::devices::hotplug::HotplugRegisters;
use crate::devices::legacy::Clock;
use crate::devices::panic::GuestPanic;
use crate::devices::power::Power;
use crate::devices::serial::{SerialPort, SerialState};
use crate::error::VmmError;
use crate::interrupts::{EventWiring, InterruptRouter};
use crate::isolation::seccomp::Mode;
use crate::memory::{self, GuestMemory, Ram};
use crate::migration::DiskIdentity;
use crate::pci::PciBus;
use crate::platform::{EjectReporter, Platform};
use crate::vcpu::{EndReporter, ExitHandler, Vcpu, VcpuThreads};
use crate::virtio::balloon::{BalloonControl, BalloonStatus};
use crate::virtio::block::{DiskEvent, DiskLink, DiskWatcher};
use crate::virtio::console::ConsolePort;
use crate::virtio::net::Tap;
use crate::virtio::vsock::UnixHost;

pub use migration::RunningMemory;
pub use slots::Placement;
use slots::{Functions, SlotBuilder, Wiring};
use snapshot::Base;
pub(crate) use snapshot::check_fits;
pub use snapshot::{Kind, Order};

/// How long a guest may take to tell how it uses its memory; then what it said before is shown.
const STATISTICS_LIMIT: Duration = Duration::from_millis(200);

/// What KVM must offer; all of it is older than any kernel that this crate runs on.
const REQUIRED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// A machine. Dropping it stops the vCPUs and the devices.
pub struct Machine {
    // Fields are dropped in this order: vCPUs first, then the devices, memory last.
    vcpus: VcpuThreads,
    disk_watcher: Option<DiskWatcher>,
    platform: Arc<Platform>,
    functions: Functions,
    balloon: Arc<BalloonControl>,
    kvm: Arc<Kvm>,
    vm: Arc<VmFd>,
    disks: Vec<Arc<DiskLink>>,
    wiring: Wiring,
    /// There was a disk since the boot.
    had_disks: bool,
    /// Other processes can map the memory.
    shared_memory: bool,
    /// The kernel writes memory for interfaces.
    has_vhost: bool,
    base: Option<Base>,
    memory: GuestMemory,
}

/// What of the host outlives a reboot of the guest.
pub struct HostResources {
    /// `/dev/kvm`.
    pub kvm: Arc<Kvm>,
    /// What the guest boots; `None` if it wasn't there when the process started, as a restored
    /// guest doesn't need it.
    pub boot_files: Option<BootFiles>,
    /// The TAPs, in the order of the configuration's interfaces.
    pub taps: Vec<Arc<Tap>>,
    /// The socket device's socket, if there is one.
    pub vsock: Option<UnixHost>,
    /// The balloon's size, if there is one.
    pub balloon: Arc<BalloonControl>,
    /// Where the guest's output goes.
    pub console: Arc<ConsoleOutput>,
    /// The virtio console, if that is the console.
    pub virtio_console: Option<Arc<ConsolePort>>,
    /// What becomes of system calls that no thread has a need for.
    pub seccomp: Mode,
}

/// Whom a machine tells what happens to it.
#[derive(Clone)]
pub struct Reporters {
    /// A vCPU ended.
    pub end: EndReporter,
    /// A disk's backend went away or came back.
    pub disk: Arc<dyn Fn(DiskEvent) + Send + Sync>,
    /// The guest's kernel panicked, or does nothing any more.
    pub distress: Arc<dyn Fn(Distress) + Send + Sync>,
    /// The guest has let go of what was in a slot.
    pub ejected: EjectReporter,
}

/// What a guest's devices say about its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distress {
    /// The panic device was told.
    Panic(GuestPanic),
    /// The watchdog was not fed in time.
    Watchdog,
}

/// Opens `/dev/kvm` and checks what it can do.
pub fn open_kvm() -> Result<Kvm, VmmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => VmmError::KvmMissing,
        libc::EACCES | libc::EPERM => VmmError::KvmPermission,
        _ => VmmError::KvmUnusable(format!("it can't be opened: {e}")),
    })?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(VmmError::KvmUnusable(format!(
            "its API has version {version}, not 12"
        )));
    }
    for (capability, name) in REQUIRED {
        if !kvm.check_extension(capability) {
            return Err(VmmError::KvmUnusable(format!(
                "this kernel's KVM lacks {name}"
            )));
        }
    }
    Ok(kvm)
}

impl Machine {
    /// Builds the machine, loads the kernel, and starts the vCPUs. Devices that an earlier boot had
    /// are in the slots where they were.
    pub fn start(
        host: &HostResources,
        config: &GuestConfig,
        placement: &Placement,
        reporters: &Reporters,
    ) -> Result<Self, VmmError> {
        let memory = memory::allocate(&config.memory, config.shares_memory())?;
        let start = Start {
            placement: placement.clone(),
            ..Start::default()
        };
        let board = Board::assemble(host, config, memory, &start, reporters)?;
        let topology = config.cpu.topology(config.vcpus);
        let acpi = AcpiConfig {
            vcpus: config.vcpus,
            topology,
            fixed_slots: board.functions.fixed_slots(),
        };
        let opened;
        let files = if let Some(files) = &host.boot_files {
            files
        } else {
            opened = BootFiles::open(&config.kernel)?;
            &opened
        };
        let command_line = &config.kernel.command_line;
        let entry = boot::load(&board.memory, files, command_line, acpi)?;
        write_generation_id(&board.memory)?;
        let template = cpuid::template(&host.kvm, config.cpu.template)?;
        let mut vcpus = Vec::with_capacity(usize::from(config.vcpus));
        for index in 0..config.vcpus {
            let apic_id = topology.apic_id(index);
            let cpuid = cpuid::for_vcpu(&template, apic_id, topology);
            vcpus.push(Vcpu::new(&board.vm, index, apic_id, &cpuid, entry)?);
        }
        let machine = board.finish(host, vcpus, reporters, &config.cpu.pinning, None)?;
        machine.vcpus.resume();
        Ok(machine)
    }

    /// COM1, for input.
    pub fn serial(&self) -> SerialPort {
        self.platform.serial.clone()
    }

    /// Whether others than this process's threads and vCPUs have written memory, which no log has unless
    /// it is asked for.
    const fn has_unlogged_writers(&self) -> bool {
        self.had_disks || self.has_vhost
    }

    /// Presses the power button.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        self.platform.power.press_button()
    }

    /// What is known of the balloon, after the guest was asked how it uses its memory. A paused one
    /// isn't asked.
    pub fn balloon(&self, paused: bool) -> BalloonStatus {
        if !paused {
            self.balloon.await_statistics(STATISTICS_LIMIT, || {
                for function in self.functions.virtio.values() {
                    let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
                    function.ask_for_statistics();
                }
            });
        }
        self.balloon.status()
    }
}

/// What a machine begins with.
#[derive(Default)]
struct Start<'a> {
    /// The pages that are written are noted.
    log: bool,
    /// COM1's state.
    serial: Option<&'a SerialState>,
    /// What the driver knows of disks whose backends come later.
    disks: Option<&'a [DiskIdentity]>,
    /// The slots of devices that were there before.
    placement: Placement,
}

/// A machine without vCPUs.
struct Board {
    vm: Arc<VmFd>,
    wiring: Wiring,
    shared_memory: bool,
    memory: GuestMemory,
    platform: Arc<Platform>,
    functions: Functions,
    disks: Vec<Arc<DiskLink>>,
}

impl Board {
    /// Builds it around `memory`.
    fn assemble(
        host: &HostResources,
        config: &GuestConfig,
        memory: GuestMemory,
        start: &Start<'_>,
        reporters: &Reporters,
    ) -> Result<Self, VmmError> {
        let vm = host
            .kvm
            .create_vm()
            .map_err(VmmError::kvm("create a virtual machine"))?;
        let vm = Arc::new(vm);
        memory::register(&vm, &memory, start.log)?;
        create_interrupt_controllers(&vm)?;
        let events: Arc<dyn EventWiring> = Arc::clone(&vm) as _;
        let router = Arc::new(InterruptRouter::new(Arc::clone(&events))?);
        let platform = Arc::new(Platform {
            serial: SerialPort::new(&router, &host.console, start.serial)?,
            power: Power::new(&router)?,
            pci: PciBus::new(),
            clock: Mutex::new(Clock::default()),
            hotplug: HotplugRegisters::default(),
            ejected: Arc::clone(&reporters.ejected),
        });
        let wiring = Wiring {
            events,
            router,
            memory: Arc::clone(&memory),
        };
        let mut slots = SlotBuilder::new(&platform.pci, &wiring, &start.placement);
        let disks = slots.add_all(host, config, start.disks, reporters)?;
        let functions = slots.finish();
        Ok(Self {
            vm,
            wiring,
            // Hugepages are the pool's, which is a file.
            shared_memory: config.shares_memory() || config.memory.hugepages.is_some(),
            memory,
            platform,
            functions,
            disks,
        })
    }

    /// Adds the vCPUs, which don't run yet.
    fn finish(
        self,
        host: &HostResources,
        vcpus: Vec<Vcpu>,
        reporters: &Reporters,
        pinning: &[Vec<u16>],
        base: Option<Base>,
    ) -> Result<Machine, VmmError> {
        let disk_watcher = watch_disks(self.disks.clone(), reporters, host.seccomp)?;
        let has_vhost = host.taps.iter().any(|tap| tap.has_vhost());
        let handler: Arc<dyn ExitHandler> = Arc::clone(&self.platform) as _;
        let vcpus = VcpuThreads::start(vcpus, &handler, &reporters.end, pinning, host.seccomp)
            .map_err(VmmError::os("start the vCPU threads"))?;
        Ok(Machine {
            vcpus,
            disk_watcher,
            platform: self.platform,
            functions: self.functions,
            balloon: Arc::clone(&host.balloon),
            kvm: Arc::clone(&host.kvm),
            vm: self.vm,
            had_disks: !self.disks.is_empty(),
            disks: self.disks,
            wiring: self.wiring,
            shared_memory: self.shared_memory,
            has_vhost,
            base,
            memory: self.memory,
        })
    }
}

/// Gives the guest a new generation ID, by which it knows that it isn't another one.
fn write_generation_id(memory: &Ram) -> Result<(), VmmError> {
    let mut id = [0; 16];
    random(&mut id)?;
    memory
        .write_slice(&id, GuestAddress(layout::GENERATION_ID))
        .map_err(|e| VmmError::os("write the generation ID")(std::io::Error::other(e)))
}

/// Fills `bytes`; the host's generator is seeded long before guests run.
fn random(bytes: &mut [u8]) -> Result<(), VmmError> {
    // SAFETY: the pointer and length are those of `bytes`.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(filled) == Ok(bytes.len()) {
        return Ok(());
    }
    Err(VmmError::os("get random bytes")(
        std::io::Error::last_os_error(),
    ))
}

fn create_interrupt_controllers(vm: &VmFd) -> Result<(), VmmError> {
    // Only Intel's processors need these two, and not every KVM knows them.
    if let Err(e) = vm.set_identity_map_address(layout::IDENTITY_MAP) {
        tracing::debug!("KVM_SET_IDENTITY_MAP_ADDR: {e}");
    }
    if let Err(e) = vm.set_tss_address(layout::TSS) {
        tracing::debug!("KVM_SET_TSS_ADDR: {e}");
    }
    vm.create_irq_chip()
        .map_err(VmmError::kvm("create the interrupt controllers"))
}

fn watch_disks(
    links: Vec<Arc<DiskLink>>,
    reporters: &Reporters,
    seccomp: Mode,
) -> Result<Option<DiskWatcher>, VmmError> {
    if links.is_empty() {
        return Ok(None);
    }
    let report = Arc::clone(&reporters.disk);
    DiskWatcher::start(links, move |event| report(event), seccomp)
        .map(Some)
        .map_err(VmmError::os("start the thread that watches the disks"))
}
