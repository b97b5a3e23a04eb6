//! A Debian kernel as a KVM *host* under QEMU's emulation, for machines without VT-x or SVM.
//!
//! [`Lab::boot`] starts `qemu-system-x86_64` with an emulated AMD processor that has SVM. In it runs
//! a stock Debian cloud kernel with `kvm-amd`, so `/dev/kvm` there is the real thing and stock
//! kernels boot as its guests. The lab's root file system is an ext4 image on a virtio disk, made
//! for each lab from busybox, a few tools of the machine it runs on, and the caller's files. Commands run in
//! it over a TCP connection that QEMU forwards from a loopback port; see [`protocol`].
//!
//! The crate also builds the initramfs of stock *guests* ([`guest_initrd`]), inside the lab or on
//! a host's own KVM.
//!
//! Kernels come from `setup/kernels`; the packages needed, from `setup/debian-packages`.

pub mod client;
mod error;
pub mod guest_initrd;
mod initramfs;
mod kernel;
mod lab;
mod lab_initramfs;
mod modules;
mod options;
pub mod protocol;
mod qemu;
mod root_image;
mod state;
mod time_stamp_counter;
mod tool;

pub use client::{Running, StreamFrame};
pub use error::LabError;
pub use kernel::{KernelFiles, cache_folder};
pub use lab::{Lab, Output};
pub use options::{FileCopy, LabOptions};
pub use protocol::{Exec, ExitStatus};
pub use state::LabState;
