//! A simulation that finds nothing proves nothing: each planted bug has to be found, within these
//! seeds.

use keelson_simulation::{Plant, run};

/// The first seed that fails with this bug, of the first `seeds`.
fn find(plant: Plant, seeds: u64) -> Option<(u64, String)> {
    (1..=seeds).find_map(|seed| {
        // What is wrong may also end in a panic, as it would in a server.
        let outcome = std::panic::catch_unwind(|| run(seed, Some(plant), false).failure);
        let failure = outcome.unwrap_or_else(|_| Some("a panic".to_owned()));
        failure.map(|failure| (seed, failure))
    })
}

macro_rules! planted {
    ($($test:ident: $plant:ident within $seeds:literal seeds;)*) => {
        $(
            #[test]
            fn $test() {
                let (seed, failure) = find(Plant::$plant, $seeds).expect("it was not found");
                println!("seed {seed}: {failure}");
            }
        )*
    };
}

planted! {
    a_skipped_log_sync: SkipLogSync within 100 seeds;
    an_acknowledgement_before_the_sync: AcknowledgeBeforeSync within 200 seeds;
    a_read_without_a_quorum: ReadWithoutQuorum within 100 seeds;
    leases_revoked_by_an_election: RevokeLeasesOnElection within 100 seeds;
    a_forgotten_applied_index: ForgetAppliedIndex within 100 seeds;
    an_entry_applied_twice: ApplyTwice within 100 seeds;
    a_watch_that_skips_an_event: WatchSkipsEvent within 100 seeds;
    a_snapshot_without_its_last_record: SnapshotWithoutLastRecord within 100 seeds;
    a_damaged_log_that_is_cut: CutDamagedLog within 150 seeds;
}
