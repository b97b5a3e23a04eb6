//! Automatic compaction: history that is older, or longer, than wanted is given up, as etcd does with
//! `--auto-compaction-mode` and `--auto-compaction-retention`.

use std::collections::VecDeque;
use std::time::Duration;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::RequestError;
use keelson_member::command::Operation;
use tokio::time::Instant;

use crate::node::Node;

/// How often the length of history is looked at.
const REVISION_INTERVAL: Duration = Duration::from_secs(5);
/// Parts of the retention that are told apart: history is between one and one and a tenth of it.
const SAMPLES: u32 = 10;
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

/// How much history is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// Of this time.
    Time(Duration),
    /// This many revisions.
    Revisions(i64),
}

/// Compacts for as long as the node runs, while it leads.
pub async fn run(node: Node, retention: Retention) {
    let mut samples = VecDeque::new();
    let interval = match retention {
        Retention::Time(time) => (time / SAMPLES).max(SHORTEST_INTERVAL),
        Retention::Revisions(_) => REVISION_INTERVAL,
    };
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (revision, compacted) = node.keyspace().revisions();
        let target = match retention {
            // Every member takes samples: the next leader goes on where this one was.
            Retention::Time(time) => oldest(&mut samples, revision, Instant::now(), time),
            Retention::Revisions(count) => Some(revision - count),
        };
        let Some(target) = target.filter(|target| *target > compacted.max(0)) else {
            continue;
        };
        if !node.status().is_leader {
            continue;
        }
        let request = pb::CompactionRequest {
            revision: target,
            physical: false,
        };
        match node.propose(Operation::Compact(request), None).await {
            Ok(_) => tracing::info!(revision = target, "compacted"),
            Err(RequestError::Compacted) => {}
            Err(error) => tracing::warn!(%error, revision = target, "cannot compact"),
        }
    }
}

/// Notes the current revision; the newest one that is older than `time`.
fn oldest(
    samples: &mut VecDeque<(Instant, i64)>,
    revision: i64,
    now: Instant,
    time: Duration,
) -> Option<i64> {
    samples.push_back((now, revision));
    let mut found = None;
    while let Some((at, revision)) = samples.front()
        && now.duration_since(*at) >= time
    {
        found = Some(*revision);
        samples.pop_front();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_of_the_wanted_time_is_kept() {
        let begin = Instant::now();
        let mut samples = VecDeque::new();
        let hour = Duration::from_hours(1);
        let found: Vec<_> = (0..25)
            .map(|step| {
                oldest(
                    &mut samples,
                    i64::from(step),
                    begin + hour * step / 10,
                    hour,
                )
            })
            .collect();
        assert!(found[..10].iter().all(Option::is_none), "{found:?}");
        let expected: Vec<_> = (0..15).map(Some).collect();
        assert_eq!(found[10..], expected);
        // After a pause, only the newest of what is too old counts.
        assert_eq!(oldest(&mut samples, 99, begin + hour * 10, hour), Some(24));
    }
}
