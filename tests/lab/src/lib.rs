//! A Debian kernel as a KVM host under emulation, for machines without VT-x or SVM.
