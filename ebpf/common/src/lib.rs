//! Map types shared by the eBPF programs and the host side.
