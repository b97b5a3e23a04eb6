//! Virtual machines that keep the lab's kernel from patching its own code.
//!
//! Some properties of virtual machines are static keys of the kernel's: with the first vCPU that has one, and
//! with the end of the last, jumps in its scheduler and in KVM's entry into guests are patched, by way of an
//! `int3`. QEMU 7.2 with several processors now and then goes on executing that one from a translation that is
//! out of date, when nobody expects it any more, and the kernel panics. With machines that have all of these
//! properties held from the start, those of tests come and go without any patching.

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// `MSR_IA32_APICBASE_ENABLE`.
const APIC_ENABLED: u64 = 1 << 11;

/// Machines that nobody runs, for as long as this is held.
pub struct HeldMachines {
    _vcpus: Vec<VcpuFd>,
    _machines: Vec<VmFd>,
}

impl HeldMachines {
    /// `None`, and a word of why, without KVM.
    pub fn hold() -> Option<Self> {
        let made = Self::make();
        if let Err(error) = &made {
            eprintln!("keelson-lab-init: no virtual machines to hold: {error}");
        }
        made.ok()
    }

    fn make() -> Result<Self, kvm_ioctls::Error> {
        let kvm = Kvm::new()?;
        // `preempt_notifier_key`, and `kvm_has_noapic_vcpu`.
        let without_apic = kvm.create_vm()?;
        let plain = without_apic.create_vcpu(0)?;
        // `apic_sw_disabled`: as it is before a guest enables it.
        let with_apic = kvm.create_vm()?;
        with_apic.create_irq_chip()?;
        let disabled_by_software = with_apic.create_vcpu(0)?;
        // `apic_hw_disabled`.
        let disabled_by_hardware = with_apic.create_vcpu(1)?;
        let mut registers = disabled_by_hardware.get_sregs()?;
        registers.apic_base &= !APIC_ENABLED;
        disabled_by_hardware.set_sregs(&registers)?;
        Ok(Self {
            _vcpus: vec![plain, disabled_by_software, disabled_by_hardware],
            _machines: vec![without_apic, with_apic],
        })
    }
}
