//! A virtio function's state in a snapshot.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| keelson_vmm::fuzzing::function_state(input));
