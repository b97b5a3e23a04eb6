//! The devices of a PC that the guest needs: serial port, clock, power and reset ports.

pub mod legacy;
pub mod power;
pub mod serial;
