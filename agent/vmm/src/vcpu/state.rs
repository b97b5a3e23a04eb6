//! A vCPU's state, taken while it doesn't run and given to another one.

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::{Vcpu, VcpuError};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Where clocks of the same nominal speed differ by less, a guest's time keeping corrects it
/// (`tsc_tolerance_ppm` of KVM).
const TSC_TOLERANCE_PPM: u64 = 250;

/// All that KVM keeps of a vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// The CPUID that the guest was given.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }
}

/// The model-specific registers that this host's KVM keeps for a vCPU, in the order in which they
/// are set: the time stamp counter before its deadline.
pub fn msr_indexes(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let mut indexes = kvm.get_msr_index_list()?.as_slice().to_vec();
    indexes.sort_by_key(|index| match *index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(indexes)
}

impl Vcpu {
    /// Takes the state; the vCPU doesn't run meanwhile.
    pub fn save(&self, msrs: &[u32]) -> Result<VcpuState, VcpuError> {
        let fd = &self.fd;
        // KVM's guest sees that it was stopped, and doesn't take it for a lockup. One that has no
        // kvm-clock yet makes this fail.
        let _ = fd.kvmclock_ctrl();
        // Reading the run state may change the local APIC's (pending INITs), so it comes first.
        Ok(VcpuState {
            mp_state: fd
                .get_mp_state()
                .map_err(self.failed("tell the run state"))?,
            regs: fd.get_regs().map_err(self.failed("tell the registers"))?,
            sregs: fd
                .get_sregs()
                .map_err(self.failed("tell the special registers"))?,
            xsave: fd
                .get_xsave()
                .map_err(self.failed("tell the extended state"))?,
            xcrs: fd
                .get_xcrs()
                .map_err(self.failed("tell the extended control registers"))?,
            debug_regs: fd
                .get_debug_regs()
                .map_err(self.failed("tell the debug registers"))?,
            lapic: fd.get_lapic().map_err(self.failed("tell the local APIC"))?,
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            msrs: self.read_msrs(msrs)?,
            cpuid: self.cpuid.as_slice().to_vec(),
            events: fd
                .get_vcpu_events()
                .map_err(self.failed("tell the pending events"))?,
        })
    }

    /// Gives a new vCPU the state of another one.
    pub fn restore(&self, state: &VcpuState) -> Result<(), VcpuError> {
        let fd = &self.fd;
        self.match_tsc(fd, state.tsc_khz)?;
        fd.set_mp_state(state.mp_state)
            .map_err(self.failed("set the run state"))?;
        fd.set_regs(&state.regs)
            .map_err(self.failed("set the registers"))?;
        fd.set_sregs(&state.sregs)
            .map_err(self.failed("set the special registers"))?;
        // SAFETY: KVM reads at most the 4096 bytes of kvm_xsave for a vCPU without features that
        // must be asked for (arch_prctl), which this process never does.
        unsafe { fd.set_xsave(&state.xsave) }.map_err(self.failed("set the extended state"))?;
        fd.set_xcrs(&state.xcrs)
            .map_err(self.failed("set the extended control registers"))?;
        fd.set_debug_regs(&state.debug_regs)
            .map_err(self.failed("set the debug registers"))?;
        fd.set_lapic(&state.lapic)
            .map_err(self.failed("set the local APIC"))?;
        self.write_msrs(&state.msrs)?;
        fd.set_vcpu_events(&state.events)
            .map_err(self.failed("set the pending events"))
    }

    /// The CPUID of a state as KVM takes it.
    pub fn cpuid_of(index: u8, state: &VcpuState) -> Result<CpuId, VcpuError> {
        CpuId::from_entries(&state.cpuid).map_err(|_| VcpuError {
            index,
            step: "take so many CPUID entries",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })
    }

    fn match_tsc(&self, fd: &VcpuFd, khz: u32) -> Result<(), VcpuError> {
        let here = u64::from(fd.get_tsc_khz().unwrap_or(0));
        let wanted = u64::from(khz);
        if wanted == 0 || here.abs_diff(wanted) <= wanted * TSC_TOLERANCE_PPM / 1_000_000 {
            return Ok(());
        }
        fd.set_tsc_khz(khz)
            .map_err(self.failed("scale the time stamp counter to the snapshot's frequency"))
    }

    fn read_msrs(&self, indexes: &[u32]) -> Result<Vec<kvm_msr_entry>, VcpuError> {
        let mut read = Vec::with_capacity(indexes.len());
        let mut left = indexes;
        while !left.is_empty() {
            let wanted: Vec<kvm_msr_entry> = left
                .iter()
                .map(|&index| kvm_msr_entry {
                    index,
                    ..Default::default()
                })
                .collect();
            let mut msrs = self.msr_list(&wanted)?;
            let count = self
                .fd
                .get_msrs(&mut msrs)
                .map_err(self.failed("tell the model-specific registers"))?;
            read.extend_from_slice(msrs.as_slice().get(..count).unwrap_or_default());
            // KVM stops at the first that this vCPU doesn't have.
            left = left.get(count + 1..).unwrap_or_default();
        }
        Ok(read)
    }

    fn write_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), VcpuError> {
        let mut left = entries;
        while !left.is_empty() {
            let msrs = self.msr_list(left)?;
            let count = self
                .fd
                .set_msrs(&msrs)
                .map_err(self.failed("set the model-specific registers"))?;
            let Some(refused) = left.get(count) else {
                return Ok(());
            };
            // One that this host's KVM doesn't have matters only if it says anything.
            if refused.data != 0 {
                tracing::warn!(
                    vcpu = self.index,
                    msr = format_args!("{:#x}", refused.index),
                    "KVM refuses a register of the snapshot"
                );
                return Err(self.failed("set a model-specific register")(
                    kvm_ioctls::Error::new(libc::EINVAL),
                ));
            }
            left = left.get(count + 1..).unwrap_or_default();
        }
        Ok(())
    }

    fn msr_list(&self, entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuError> {
        Msrs::from_entries(entries).map_err(|_| {
            self.failed("take so many model-specific registers")(kvm_ioctls::Error::new(
                libc::E2BIG,
            ))
        })
    }

    pub(super) fn failed(
        &self,
        step: &'static str,
    ) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError + use<> {
        let index = self.index;
        move |source| VcpuError {
            index,
            step,
            source,
        }
    }
}
