//! Accesses of a guest to ports, configuration space and device registers, with queues in memory.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| keelson_vmm::fuzzing::platform(input));
