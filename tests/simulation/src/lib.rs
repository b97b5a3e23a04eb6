//! Clusters of keelson-state's members in one process, on simulated network, disks and clocks.
//!
//! A run follows from its seed alone: what the cluster is like, what clients do, and what goes wrong.
//! Afterwards everything is healed, and the cluster has to become whole again: it answers, all
//! members hold the same, every lease has ended in time, and what clients saw is what such a store
//! may show ([`keelson_checker`]).

mod admin;
mod client;
mod clock;
pub mod disk;
mod faults;
mod holder;
mod machine;
mod network;
pub mod random;
mod rebuild;
mod server;
mod settings;
mod trace;
mod translate;
mod verdict;
mod watcher;
mod world;

pub use self::settings::{Fault, Plant, Settings};
pub use self::world::Counts;

use self::random::Random;
use self::world::World;

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The run's seed.
    pub seed: u64,
    /// A hash of everything that happened.
    pub trace: u64,
    /// Events that happened.
    pub events: u64,
    /// Requests of clients.
    pub requests: usize,
    /// Simulated time, in microseconds.
    pub time: u64,
    /// What the run went through.
    pub counts: Counts,
    /// Why the run failed, if it did.
    pub failure: Option<String>,
    /// The checker's limits did not suffice to decide.
    pub undecided: bool,
}

/// Runs a seed. With `print`, every event is written to the standard output.
pub fn run(seed: u64, plant: Option<Plant>, print: bool) -> Outcome {
    keelson_member::plant(plant.and_then(Plant::in_member));
    let mut random = Random::new(seed);
    let settings = Settings::draw(&mut random, plant);
    let mut world = World::new(seed, settings, random, print);
    world.run();
    world.judge();
    world.shut_down();
    keelson_member::plant(None);
    Outcome {
        seed,
        trace: world.trace.hash(),
        events: world.trace.events(),
        requests: world.history.operations.len(),
        time: world.now,
        counts: world.counts,
        failure: world.failure,
        undecided: world.undecided,
    }
}
