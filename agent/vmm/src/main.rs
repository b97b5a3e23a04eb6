//! `keelson-vmm`: runs one guest.

fn main() {}
