//! A virtual CPU: its state at the kernel's entry point, and the loop that runs it.

use kvm_bindings::{
    CpuId, KVM_MP_STATE_RUNNABLE, Msrs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use crate::boot::{Entry, configure_segments_and_paging, layout};

mod exits;
mod state;
mod threads;

pub use exits::{ExitHandler, VcpuEnd};
pub use state::{VcpuState, msr_indexes};
pub use threads::{EndReporter, VcpuThreads, install_kick_signal};

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs enabled, everything write-back: the guest's RAM is.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets of the local APIC's LVT registers (Intel SDM volume 3, table 11-1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const LVT_MASKED: u32 = 1 << 16;
const LVT_DELIVERY_NMI: u32 = 4 << 8;
const LVT_DELIVERY_EXTINT: u32 = 7 << 8;

const RFLAGS_RESERVED: u64 = 2;

/// Why a vCPU can't be set up.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused to {step} of vCPU {index}: {source}")]
pub struct VcpuError {
    index: u8,
    step: &'static str,
    source: kvm_ioctls::Error,
}

/// More parts than any access has: the largest repeats a string instruction over a page.
const MAX_PARTS: usize = 1 << 14;

/// What KVM came back with.
enum Entered {
    /// An exit, which is handled.
    Exit,
    /// A signal, or the wish to exit at once.
    Interrupted,
    /// The guest's end.
    End(VcpuEnd),
}

/// One virtual CPU.
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
    /// As it was set: some KVMs answer with what the processor has besides.
    cpuid: CpuId,
}

impl Vcpu {
    /// Creates vCPU `index`; the first starts at `entry`, the others wait for INIT and SIPI.
    pub fn new(
        vm: &VmFd,
        index: u8,
        apic_id: u32,
        cpuid: &CpuId,
        entry: Entry,
    ) -> Result<Self, VcpuError> {
        let vcpu = Self::create(vm, index, apic_id, cpuid)?;
        vcpu.set_msrs();
        vcpu.set_local_interrupts()
            .map_err(vcpu.failed("set the local APIC"))?;
        if index == 0 {
            vcpu.set_registers(entry)
                .map_err(vcpu.failed("set the registers"))?;
            vcpu.set_fpu().map_err(vcpu.failed("set the FPU"))?;
            let state = kvm_mp_state {
                mp_state: KVM_MP_STATE_RUNNABLE,
            };
            vcpu.fd
                .set_mp_state(state)
                .map_err(vcpu.failed("set the run state"))?;
        }
        Ok(vcpu)
    }

    /// Creates vCPU `index` in its reset state, for [`Self::restore`].
    pub fn create(vm: &VmFd, index: u8, apic_id: u32, cpuid: &CpuId) -> Result<Self, VcpuError> {
        let failed = |step| {
            move |source| VcpuError {
                index,
                step,
                source,
            }
        };
        let fd = vm
            .create_vcpu(u64::from(apic_id))
            .map_err(failed("create the file descriptor"))?;
        fd.set_cpuid2(cpuid).map_err(failed("set the CPUID"))?;
        Ok(Self {
            index,
            fd,
            cpuid: cpuid.clone(),
        })
    }

    /// This vCPU's index.
    pub const fn index(&self) -> u8 {
        self.index
    }

    fn set_registers(&self, entry: Entry) -> Result<(), kvm_ioctls::Error> {
        let mut sregs = self.fd.get_sregs()?;
        configure_segments_and_paging(&mut sregs);
        self.fd.set_sregs(&sregs)?;
        self.fd.set_regs(&kvm_regs {
            rip: entry.instruction_pointer,
            rsi: entry.zero_page,
            rsp: layout::BOOT_STACK,
            rbp: layout::BOOT_STACK,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        })
    }

    fn set_fpu(&self) -> Result<(), kvm_ioctls::Error> {
        // The values after `finit` and at reset of MXCSR (Intel SDM volume 1, 8.1.5 and 10.2.3).
        self.fd.set_fpu(&kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        })
    }

    /// Sets each register by itself: one that a KVM doesn't have must not hide the others, and a
    /// guest boots without them.
    fn set_msrs(&self) {
        for (index, data) in [
            (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            (MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE_WRITE_BACK),
        ] {
            let entry = kvm_msr_entry {
                index,
                data,
                ..Default::default()
            };
            let set = Msrs::from_entries(&[entry])
                .ok()
                .map(|msrs| self.fd.set_msrs(&msrs));
            if !matches!(set, Some(Ok(1))) {
                tracing::debug!(
                    vcpu = self.index,
                    msr = format_args!("{index:#x}"),
                    "KVM keeps MSR"
                );
            }
        }
    }

    /// LINT0 is where the PIC would be, which nothing is routed to, and LINT1 the NMI, as PC
    /// firmware leaves them (MultiProcessor Specification 1.4, 3.6.2).
    fn set_local_interrupts(&self) -> Result<(), kvm_ioctls::Error> {
        let mut apic = self.fd.get_lapic()?;
        set_apic_register(&mut apic, APIC_LVT_LINT0, LVT_DELIVERY_EXTINT | LVT_MASKED);
        set_apic_register(&mut apic, APIC_LVT_LINT1, LVT_DELIVERY_NMI);
        self.fd.set_lapic(&apic)
    }

    /// Runs the guest until `handler` or KVM ends it, or until the thread is told to stop.
    fn run(&mut self, handler: &dyn ExitHandler, stop: &dyn Fn() -> bool) -> VcpuEnd {
        while !stop() {
            if let Entered::End(end) = self.enter(handler) {
                return self.with_registers(end);
            }
        }
        // KVM takes a read's answer, and leaves the instruction, only when it is entered again; an
        // access that it splits in parts comes in several exits.
        self.fd.set_kvm_immediate_exit(1);
        let end = (0..MAX_PARTS).find_map(|_| match self.enter(handler) {
            Entered::Exit => None,
            Entered::Interrupted => Some(VcpuEnd::Stopped),
            Entered::End(end) => Some(self.with_registers(end)),
        });
        self.fd.set_kvm_immediate_exit(0);
        end.unwrap_or_else(|| VcpuEnd::Error("KVM doesn't leave an access".to_owned()))
    }

    fn enter(&mut self, handler: &dyn ExitHandler) -> Entered {
        let end = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => handler.io_write(port, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                handler.io_read(port, data);
                None
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                handler.mmio_read(address, data);
                None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                handler.mmio_write(address, data);
                None
            }
            Ok(exit) => exits::unusual(&exit),
            Err(e) => match e.errno() {
                // EINTR: the kick signal. EAGAIN: an AP that is still waiting for its SIPI.
                libc::EINTR | libc::EAGAIN => return Entered::Interrupted,
                _ => Some(VcpuEnd::Error(format!("KVM_RUN failed: {e}"))),
            },
        };
        end.map_or(Entered::Exit, Entered::End)
    }

    /// Where the guest is, for messages.
    fn place(&self) -> String {
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return format!("vCPU {}", self.index);
        };
        format!(
            "vCPU {} at RIP {:#x}, RSP {:#x}, CR0 {:#x}, CR2 {:#x}, CR3 {:#x}, CR4 {:#x}, EFER {:#x}",
            self.index, regs.rip, regs.rsp, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer
        )
    }

    /// Adds where the guest was to an error's message.
    fn with_registers(&self, end: VcpuEnd) -> VcpuEnd {
        match end {
            VcpuEnd::TripleFault(_) => {
                VcpuEnd::TripleFault(format!("triple fault of {}", self.place()))
            }
            VcpuEnd::Error(message) => VcpuEnd::Error(format!("{message} ({})", self.place())),
            other => other,
        }
    }
}

fn set_apic_register(apic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in apic.regs[offset..offset + 4]
        .iter_mut()
        .zip(value.to_le_bytes())
    {
        *register = byte.cast_signed();
    }
}
