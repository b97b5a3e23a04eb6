//! The virtual machine monitor: one process per guest on /dev/kvm.
//!
//! The binary `keelson-vmm` runs one guest from a [`config::GuestConfig`]; programs that manage
//! guests talk to it with [`client::VmmClient`].
//!
//! From outside in: [`guest`] owns the guest's life and the API; a machine (one boot) has memory,
//! vCPUs and a platform; the platform sends each vCPU exit to its device; virtio devices sit on
//! the PCI bus, and their queues reach them by ioeventfd and irqfd without this process's help.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("keelson-vmm runs on x86-64 Linux only");

pub mod api;
pub mod client;
pub mod config;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod guest;
pub mod isolation;
pub mod migration;
pub mod snapshot;

mod boot;
mod console;
mod cpuid;
mod devices;
mod error;
mod interrupts;
mod machine;
mod memory;
mod pci;
mod platform;
mod signals;
mod vcpu;
mod virtio;

pub use error::VmmError;
