use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

/// `mov al, 42; out 0x10, al; hlt`, in real mode.
const CODE: [u8; 5] = [0xb0, 42, 0xe6, 0x10, 0xf4];
const PAGE: usize = 4096;

/// Runs three instructions in a real KVM guest, and says what it saw.
pub fn check_kvm() -> Result<String> {
    let kvm = Kvm::new().context("opening /dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    // SAFETY: a fresh private anonymous mapping, at an address that the kernel chooses.
    let memory = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            PAGE,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE,
        )
    }
    .context("mapping guest memory")?;
    // SAFETY: the mapping has a page, the code is shorter, and nothing else refers to it yet.
    unsafe { std::ptr::copy_nonoverlapping(CODE.as_ptr(), memory.cast(), CODE.len()) };
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0x1000,
        memory_size: PAGE as u64,
        userspace_addr: memory as u64,
    };
    // SAFETY: the mapping stays until this process ends, which is longer than the VM lives.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;

    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let mut special = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special).context("KVM_SET_SREGS")?;
    let mut registers = vcpu.get_regs().context("KVM_GET_REGS")?;
    registers.rip = 0x1000;
    registers.rflags = 2;
    vcpu.set_regs(&registers).context("KVM_SET_REGS")?;

    match vcpu.run().context("KVM_RUN")? {
        VcpuExit::IoOut(0x10, [42]) => {}
        other => bail!("the guest's first exit is {other:?} instead of its port write"),
    }
    match vcpu.run().context("KVM_RUN")? {
        VcpuExit::Hlt => {}
        other => bail!("the guest's second exit is {other:?} instead of its halt"),
    }
    Ok(format!(
        "kvm api {}: a guest ran, wrote a port and halted",
        kvm.get_api_version()
    ))
}
