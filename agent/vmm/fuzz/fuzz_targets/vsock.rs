//! The socket device's virtqueues and packets, and the host's streams.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| keelson_vmm::fuzzing::vsock(input));
