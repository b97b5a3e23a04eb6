//! Random correct histories hold; the same histories with one thing changed are refused.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap
)]
#![allow(clippy::cast_sign_loss, missing_docs)]

mod generated;

use generated::{Generated, generate};
use keelson_checker::*;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn correct_histories_hold(seed in any::<u64>(), count in 1..150_usize) {
        let Generated { history, .. } = generate(seed, count);
        let report = check(&history, &Limits::default());
        prop_assert!(report.holds(), "{report}");
    }

    /// Without what watches saw, outcomes that are unknown have to be guessed.
    #[test]
    fn correct_histories_hold_without_watches(seed in any::<u64>(), count in 1..100_usize) {
        let Generated { mut history, .. } = generate(seed, count);
        history.watches.clear();
        let report = check(&history, &Limits::default());
        prop_assert!(report.holds(), "{report}");
    }

    #[test]
    fn a_changed_answer_is_refused(seed in any::<u64>(), count in 10..150_usize) {
        let Generated { mut history, mut random } = generate(seed, count);
        let changes: Vec<usize> = (0..history.operations.len()).collect();
        let at = changes[random.below(changes.len() as u64) as usize];
        let Outcome::Ok(response) = &mut history.operations[at].outcome else {
            return Ok(());
        };
        if falsify(response, random.number()) {
            let report = check(&history, &Limits::default());
            prop_assert!(report.broken().next().is_some(), "{}\n{report}", history.operations[at]);
        }
    }

    #[test]
    fn a_lost_write_is_refused(seed in any::<u64>(), count in 10..150_usize) {
        let Generated { mut history, mut random } = generate(seed, count);
        // A write that took effect is said to have failed for certain.
        let made = |operation: &Operation| {
            matches!(&operation.outcome, Outcome::Ok(Response::Put { .. }))
        };
        let writes: Vec<usize> = (0..history.operations.len())
            .filter(|at| made(&history.operations[*at]))
            .collect();
        if !writes.is_empty() {
            let at = writes[random.below(writes.len() as u64) as usize];
            history.operations[at].outcome = Outcome::Failed;
            let report = check(&history, &Limits::default());
            prop_assert!(report.broken().next().is_some(), "{}\n{report}", history.operations[at]);
        }
    }

    #[test]
    fn a_changed_watch_is_refused(seed in any::<u64>(), count in 30..150_usize) {
        let Generated { mut history, mut random } = generate(seed, count);
        let watch = &mut history.watches[random.below(4) as usize];
        if let Some(rule) = break_watch(watch, &mut random) {
            let report = check(&history, &Limits::default());
            let broken: Vec<_> = report.broken().map(|(rule, _)| rule).collect();
            // Where no answer tells what made a revision, it is the order that can't be found.
            let told = broken.contains(&rule) || broken.contains(&"linearizability");
            prop_assert!(told, "{rule} should be broken\n{report}");
        }
    }

    #[test]
    fn histories_are_stored_and_read_again(seed in any::<u64>()) {
        let Generated { history, .. } = generate(seed, 50);
        let json = serde_json::to_string(&history).unwrap();
        prop_assert_eq!(serde_json::from_str::<History>(&json).unwrap(), history);
    }
}

/// Makes an answer wrong; false if there is nothing in it that could be.
fn falsify(response: &mut Response, number: u64) -> bool {
    match response {
        Response::Range { result, .. } => match result.kvs.first_mut() {
            Some(kv) if number.is_multiple_of(2) => kv.value = "made up".into(),
            Some(kv) => kv.version += 1,
            None => result.count += 1,
        },
        Response::Put {
            prev_kv: Some(kv), ..
        } => kv.mod_revision -= 1,
        Response::Put { revision, .. } => *revision += 1000,
        Response::Delete { deleted, .. } => *deleted += 1,
        Response::Txn { succeeded, .. } => *succeeded = !*succeeded,
        Response::Done => return false,
    }
    true
}

/// Breaks one guarantee: which.
fn break_watch(watch: &mut Watch, random: &mut generated::Random) -> Option<&'static str> {
    let with_events: Vec<usize> = (0..watch.responses.len())
        .filter(|at| matches!(watch.responses[*at].body, WatchBody::Events(_)))
        .collect();
    let at = *with_events.get(random.below(with_events.len().max(1) as u64) as usize)?;
    let WatchBody::Events(events) = &mut watch.responses[at].body else {
        return None;
    };
    let which = random.below(events.len() as u64) as usize;
    let first = at == with_events[0];
    match random.below(6) {
        0 => {
            events.push(events[which].clone());
            Some("watch: unique")
        }
        1 if events.first()?.revision() != events.last()?.revision() => {
            events.reverse();
            Some("watch: ordered")
        }
        2 => {
            let begins = first && which == 0 && events.len() > 1;
            let split = begins && events[0].revision() != events[1].revision();
            events.remove(which);
            // The last one of all is known to be missing by the time that there was for it.
            Some(if split {
                "watch: resumable"
            } else {
                "watch: reliable"
            })
            .filter(|_| !first || which > 0 || split)
        }
        3 => {
            events[which].kv.value = "made up".into();
            Some("watch: reliable")
        }
        4 if events[which].prev_kv.is_some() => {
            events[which].prev_kv.as_mut()?.value = "made up".into();
            Some("watch: prev-kv")
        }
        5 => {
            events[which].kv.key = "other".into();
            Some("watch: filter").filter(|_| !watch.request.keys.contains(b"other"))
        }
        _ => None,
    }
}
