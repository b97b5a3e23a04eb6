//! The programs stay well within what the kernel's verifier checks.

mod network;

use keelson_ebpf::{Direction, HookChoice};
use network::Network;

/// Half of what it gives up after: other kernels' verifiers need more for the same program.
const LIMIT: u32 = 500_000;

#[test]
fn the_verifier_is_far_from_giving_up() {
    let network = Network::new(HookChoice::Auto);
    let mut datapath = network.open();
    for direction in [Direction::FromGuest, Direction::ToGuest] {
        let count = datapath.verified_instructions(direction).expect("known");
        let count = count.expect("Linux 5.16 and later say it");
        println!("{direction:?}: {count} instructions");
        assert!(count < LIMIT, "{direction:?}: {count}");
    }
}
