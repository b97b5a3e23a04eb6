//! The virtual machine monitor: one process per guest on /dev/kvm.
//!
//! The binary `keelson-vmm` runs one guest from a [`config::GuestConfig`]; programs that manage
//! guests talk to it with [`client::VmmClient`].

pub mod api;
pub mod client;
pub mod config;
