//! The devices of a PC that the guest needs: serial port, clock, power and reset ports; and the PCI
//! functions that are not virtio: panic device and watchdog.

pub mod hotplug;
pub mod legacy;
pub mod panic;
pub mod power;
pub mod serial;
pub mod watchdog;
