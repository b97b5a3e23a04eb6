//! Why a guest can't be run, and the process's exit code for it.

use std::io;
use std::path::PathBuf;

use crate::boot::BootError;
use crate::config::ConfigError;
use crate::isolation::IsolationError;
use crate::memory::MemoryError;
use crate::migration::MigrationError;
use crate::snapshot::SnapshotError;
use crate::vcpu::VcpuError;
use crate::virtio::block::BackendError;
use crate::virtio::net::TapError;

/// Why the guest can't be run.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The configuration is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kernel or the initrd can't be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// `/dev/kvm` is not there.
    #[error(
        "there is no /dev/kvm: load the module kvm_intel or kvm_amd, enable VT-x or AMD-V in the \
         firmware, or, in a virtual machine, ask for nested virtualization"
    )]
    KvmMissing,
    /// `/dev/kvm` may not be opened.
    #[error(
        "no permission to open /dev/kvm: add this user to the group that owns it (often `kvm`), \
         or run as root"
    )]
    KvmPermission,
    /// `/dev/kvm` is not usable.
    #[error("/dev/kvm is not usable: {0}")]
    KvmUnusable(String),
    /// KVM refused a step of setting up the virtual machine.
    #[error("KVM refused to {step}: {source}")]
    Kvm {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// Guest memory can't be allocated.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A vCPU can't be set up.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A disk's backend can't be used.
    #[error(transparent)]
    Disk(#[from] BackendError),
    /// An interface's TAP can't be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// All slots of the PCI bus are taken.
    #[error("the PCI bus has no free slot: remove a disk or an interface first")]
    NoFreeSlot,
    /// A disk's backend could not map the guest's memory.
    #[error(
        "the guest's memory is its process's own, which no disk's backend can map: start or restore it \
         with a disk, or with `memory.shared` true"
    )]
    MemoryNotShared,
    /// A socket can't be bound.
    #[error("can't listen on the {what} socket {path}: {source}")]
    Socket {
        /// `API` or `console`.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The console log can't be opened.
    #[error("can't open the console log {path}: {source}")]
    Log {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A snapshot can't be taken or restored.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The guest can't come from another process.
    #[error(transparent)]
    Migration(#[from] MigrationError),
    /// The process can't be isolated.
    #[error(transparent)]
    Isolation(#[from] IsolationError),
    /// The host lacks what a CPU template has.
    #[error(
        "cpu.template: this host lacks features of {template}: CPUID leaf {leaf:#x}, {register} bits \
         {bits:#x}"
    )]
    CpuTemplate {
        /// The template.
        template: &'static str,
        /// CPUID's leaf.
        leaf: u32,
        /// The register of its answer.
        register: &'static str,
        /// The bits that are missing.
        bits: u32,
    },
    /// An operating system resource can't be had.
    #[error("can't {step}: {source}")]
    Os {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl VmmError {
    /// The exit code of the process for this error: 1 runtime failure, 2 bad configuration, 3
    /// kernel, initrd, snapshot or migration, 4 `/dev/kvm`, 5 disk backend or TAP.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::CpuTemplate { .. } | Self::NoFreeSlot => 2,
            Self::Boot(_) | Self::Snapshot(_) | Self::Migration(_) => 3,
            Self::KvmMissing | Self::KvmPermission | Self::KvmUnusable(_) => 4,
            Self::Disk(_) | Self::Tap(_) => 5,
            Self::Kvm { .. }
            | Self::Memory(_)
            | Self::Vcpu(_)
            | Self::Isolation(_)
            | Self::MemoryNotShared
            | Self::Socket { .. }
            | Self::Log { .. }
            | Self::Os { .. } => 1,
        }
    }

    /// For `map_err` on KVM's ioctls.
    pub(crate) fn kvm(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { step, source }
    }

    /// For `map_err` on system calls.
    pub(crate) fn os(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { step, source }
    }
}
