//! One boot of the guest: a KVM virtual machine with its memory, devices and vCPUs.
//!
//! A reboot drops the machine and builds another one, so nothing of the old boot is left.

use std::sync::{Arc, Mutex};

use kvm_ioctls::{Cap, Kvm};

use crate::boot::{self, acpi::AcpiConfig, layout};
use crate::config::GuestConfig;
use crate::console::ConsoleOutput;
use crate::cpuid;
use crate::devices::legacy::Clock;
use crate::devices::power::Power;
use crate::devices::serial::SerialPort;
use crate::error::VmmError;
use crate::interrupts::InterruptRouter;
use crate::memory::{self, GuestMemory};
use crate::pci::PciBus;
use crate::platform::Platform;
use crate::vcpu::{EndReporter, ExitHandler, Vcpu, VcpuThreads};

/// What KVM must offer; all of it is older than any kernel that this crate runs on.
const REQUIRED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// A running machine. Dropping it stops the vCPUs and the devices.
pub struct Machine {
    // Fields are dropped in this order: vCPUs first, memory last.
    _vcpus: VcpuThreads,
    platform: Arc<Platform>,
    _memory: GuestMemory,
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
    /// Builds the machine, loads the kernel, and starts the vCPUs, which tell `report` when they end.
    pub fn start(
        kvm: &Kvm,
        config: &GuestConfig,
        console: &Arc<ConsoleOutput>,
        report: EndReporter,
    ) -> Result<Self, VmmError> {
        let vm = Arc::new(
            kvm.create_vm()
                .map_err(VmmError::kvm("create a virtual machine"))?,
        );
        let memory = memory::allocate(&config.memory)?;
        memory::register(&vm, &memory)?;
        // Only Intel's processors need these two, and not every KVM knows them.
        if let Err(e) = vm.set_identity_map_address(layout::IDENTITY_MAP) {
            tracing::debug!("KVM_SET_IDENTITY_MAP_ADDR: {e}");
        }
        if let Err(e) = vm.set_tss_address(layout::TSS) {
            tracing::debug!("KVM_SET_TSS_ADDR: {e}");
        }
        vm.create_irq_chip()
            .map_err(VmmError::kvm("create the interrupt controllers"))?;
        let router = Arc::new(InterruptRouter::new(Arc::clone(&vm))?);

        let platform = Arc::new(Platform {
            serial: SerialPort::new(&router, console)?,
            power: Power::new(&router)?,
            pci: PciBus::new(),
            clock: Mutex::new(Clock::default()),
        });

        let acpi = AcpiConfig {
            vcpus: config.vcpus,
        };
        let entry = boot::load(&memory, &config.kernel, &acpi)?;
        let template = cpuid::template(kvm)?;
        let mut vcpus = Vec::with_capacity(usize::from(config.vcpus));
        for index in 0..config.vcpus {
            let cpuid = cpuid::for_vcpu(&template, index, config.vcpus);
            vcpus.push(Vcpu::new(&vm, index, &cpuid, entry)?);
        }
        let handler: Arc<dyn ExitHandler> = Arc::clone(&platform) as _;
        let threads = VcpuThreads::start(vcpus, &handler, &report)
            .map_err(VmmError::os("start the vCPU threads"))?;
        Ok(Self {
            _vcpus: threads,
            platform,
            _memory: memory,
        })
    }

    /// COM1, for the console's input.
    pub fn serial(&self) -> SerialPort {
        self.platform.serial.clone()
    }

    /// Presses the power button.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        self.platform.power.press_button()
    }
}
