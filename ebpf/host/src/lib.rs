//! Loads and attaches the eBPF programs and compiles policy to their maps.
