//! What a vCPU asks of the VMM.

use kvm_ioctls::VcpuExit;

/// `KVM_SYSTEM_EVENT_*` of linux/kvm.h.
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;

/// The devices as a vCPU reaches them. Called from all vCPUs' threads at once.
///
/// `data` has 1 to 8 bytes (MMIO) or a multiple of 1, 2 or 4 bytes (string I/O).
pub trait ExitHandler: Send + Sync {
    /// An `in` from `port`.
    fn io_read(&self, port: u16, data: &mut [u8]);
    /// An `out` to `port`; may end the guest.
    fn io_write(&self, port: u16, data: &[u8]) -> Option<VcpuEnd>;
    /// A load from a guest-physical address that is no RAM.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A store to a guest-physical address that is no RAM.
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// Why a vCPU no longer runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEnd {
    /// The VMM stopped it.
    Stopped,
    /// The guest entered S5.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// The guest triple-faulted, where the message says.
    TripleFault(String),
    /// KVM can't go on; the message says why.
    Error(String),
}

/// The end that an exit other than port and memory access means, if any.
pub(super) fn unusual(exit: &VcpuExit<'_>) -> Option<VcpuEnd> {
    match exit {
        VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr => None,
        VcpuExit::Shutdown => Some(VcpuEnd::TripleFault(String::new())),
        VcpuExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN, _) => Some(VcpuEnd::Shutdown),
        VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _) => Some(VcpuEnd::Reset),
        VcpuExit::InternalError => Some(VcpuEnd::Error(
            "KVM internal error: an instruction that this KVM can't emulate".to_owned(),
        )),
        VcpuExit::FailEntry(reason, cpu) => Some(VcpuEnd::Error(format!(
            "the processor refused to enter the guest (reason {reason:#x} on host CPU {cpu})"
        ))),
        other => Some(VcpuEnd::Error(format!(
            "unexpected exit from KVM: {other:?}"
        ))),
    }
}
