//! The PCI bus: one segment, one bus, configuration by ECAM and by ports 0xcf8 and 0xcfc.

mod bus;
mod config_space;
pub mod msix;

pub use bus::{BarWindow, PciBus, PciFunction, SLOTS};
pub use config_space::{ConfigSpace, Identity};
