//! The virtual machine monitor: one process per guest on /dev/kvm.
