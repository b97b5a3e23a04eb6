//! The first seeds, two at a time, and the proof that a seed is a run.

use keelson_simulation::run;

fn pass(seeds: std::ops::RangeInclusive<u64>) {
    for seed in seeds {
        let outcome = run(seed, None, false);
        assert_eq!(
            outcome.failure, None,
            "seed {seed}; replay: cargo run --release -p keelson-simulation -- --seeds {seed} --trace"
        );
    }
}

#[test]
fn seeds_pass() {
    pass(1..=60);
}

#[test]
fn more_seeds_pass() {
    pass(61..=120);
}

/// Two runs of one seed are the same run, event for event.
#[test]
fn a_seed_replays_exactly() {
    for seed in 1..=8 {
        assert_eq!(run(seed, None, false), run(seed, None, false));
    }
    assert_ne!(run(1, None, false).trace, run(2, None, false).trace);
}
