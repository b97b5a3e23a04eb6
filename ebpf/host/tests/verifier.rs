//! The programs stay well within what the kernel's verifier checks.

mod network;

use keelson_ebpf::HookChoice;
use network::Network;

/// Half of what it gives up after: other kernels' verifiers need more for the same program.
const LIMIT: u32 = 500_000;

#[test]
fn the_verifier_is_far_from_giving_up() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    for (name, count) in datapath.verified_instructions().expect("known") {
        let count = count.expect("Linux 5.16 and later say it");
        println!("{name}: {count} instructions");
        assert!(count < LIMIT, "{name}: {count}");
    }
}
