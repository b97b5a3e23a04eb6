//! The console's virtqueues.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| keelson_vmm::fuzzing::console(input));
