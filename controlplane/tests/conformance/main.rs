//! What every backend does alike: each case runs on each.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use keelson_controlplane::etcd::Server;

mod backend;
mod closing;
mod compaction;
#[path = "../etcd_server/mod.rs"]
#[allow(dead_code)] // Other tests use the rest.
mod etcd_server;
mod leases;
mod limits;
mod races;
mod ranges;
mod txns;
mod watches;
mod writes;

macro_rules! conformance {
    ($($topic:ident { $($case:ident,)+ })+) => {
        mod embedded {
            $(mod $topic {
                $(#[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    let backend = crate::backend::Embedded::start().await;
                    crate::$topic::$case(&backend.store).await;
                })+
            })+
        }
        mod etcd {
            $(mod $topic {
                $(#[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    let backend = crate::backend::Etcd::start(crate::Server::Etcd).await;
                    crate::$topic::$case(&backend.store).await;
                })+
            })+
        }
        mod cluster {
            $(mod $topic {
                $(#[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    let backend = crate::backend::Etcd::start(crate::Server::KeelsonState).await;
                    crate::$topic::$case(&backend.store).await;
                })+
            })+
        }
    };
}

conformance! {
    ranges {
        kinds_of_ranges,
        empty_ranges_hold_nothing,
        limit_counts_what_it_leaves_out,
        keys_only_and_count_only,
        state_at_an_old_revision,
        keys_are_bytes,
        pages_of_one_revision,
    }
    writes {
        revisions_and_versions,
        put_returns_the_pair_before,
        delete_returns_the_pairs_before,
        delete_of_nothing_takes_no_revision,
    }
    txns {
        every_target_and_operator,
        compare_of_a_missing_key,
        compare_of_a_range,
        one_revision_for_all,
        reads_see_what_precedes_them,
        one_key_twice_is_refused,
        branches_may_share_keys,
        nested,
        refused_whole,
        reading_takes_no_revision,
    }
    races {
        one_of_many_wins,
        no_increment_is_lost,
    }
    watches {
        from_now,
        from_the_past,
        from_the_future,
        only_the_range,
        pairs_before,
        a_transaction_is_one_batch,
        slow_reader_misses_nothing,
        progress,
        empty_range_is_refused,
    }
    compaction {
        old_revisions_are_gone,
        watches_of_the_past_end,
        refused_revisions,
    }
    leases {
        revoke_deletes_its_keys_at_once,
        expiry_deletes_its_keys,
        keep_alive_gives_full_time,
        status_names_keys,
        unknown_leases_are_refused,
        chosen_ids,
        a_put_changes_the_lease,
    }
    limits {
        keys,
        values,
        operations,
    }
    closing {
        nothing_works_afterwards,
    }
}
