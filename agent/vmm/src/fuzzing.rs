//! What a guest or a file can send, as bytes: the entry points of the fuzz targets (`agent/vmm/fuzz`),
//! which property tests call as well. Each lets the real devices and loaders take the bytes, without
//! KVM, and asserts what must hold whatever they are.

mod bench;
mod files;
mod input;
mod migration;
mod platform;
mod rings;
mod virtqueues;

pub use files::{config, kernel, snapshot};
pub use migration::migration;
pub use platform::{function_state, platform};
pub use virtqueues::{balloon, console, net, rng, vsock};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn any_accesses_are_taken(input in prop::collection::vec(any::<u8>(), 0..1024)) {
            super::platform(&input);
        }

        #[test]
        fn any_function_state_is_refused_or_works(input in prop::collection::vec(any::<u8>(), 0..512)) {
            super::function_state(&input);
        }

        #[test]
        fn any_rings_of_any_device_are_taken(input in prop::collection::vec(any::<u8>(), 0..1024)) {
            super::rng(&input);
            super::balloon(&input);
            super::console(&input);
            super::net(&input);
            super::vsock(&input);
        }

        #[test]
        fn any_file_is_refused_or_loaded(input in prop::collection::vec(any::<u8>(), 0..2048)) {
            super::kernel(&input);
            super::config(&input);
            super::snapshot(&input);
        }
    }
}
