//! What is fetched when: in any order of demands, failures and ends, each who waits is told once,
//! nothing is fetched twice at a time, and what is read ahead has a limit.
#![no_main]

use std::collections::HashSet;
use std::time::{Duration, Instant};

use keelson_blk::remote::fetch_plan::{Failure, FetchPlan, Run};
use libfuzzer_sys::fuzz_target;

const CHUNKS: u64 = 256;

fuzz_target!(|input: &[u8]| {
    let start = Instant::now();
    let mut now = start;
    let mut plan = FetchPlan::new(CHUNKS, 256 << 10);
    let mut running: Vec<Run> = Vec::new();
    let (mut waiting, mut next) = (HashSet::new(), 0_u32);
    for [action, value] in input.as_chunks::<2>().0 {
        let chunk = u64::from(*value);
        let mut told = Vec::new();
        match action % 6 {
            0 | 1 => {
                let ahead = plan.demand(chunk, next, now + Duration::from_secs(30));
                waiting.insert(next);
                next += 1;
                assert!(ahead.end <= CHUNKS && ahead.end - ahead.start.min(ahead.end) <= 32);
                plan.ahead(ahead, |chunk| chunk % 7 != 3);
            }
            2 => {
                if let Some(run) = plan.start_next() {
                    assert!(!run.chunks.is_empty() && run.chunks.end <= CHUNKS);
                    for other in &running {
                        let apart = run.chunks.end <= other.chunks.start
                            || other.chunks.end <= run.chunks.start;
                        assert!(apart, "{run:?} {other:?}");
                    }
                    running.push(run);
                }
            }
            3 => now += Duration::from_millis(u64::from(*value) * 100),
            4 if !running.is_empty() => {
                let run = running.swap_remove(usize::from(*value) % running.len());
                let left = run.chunks.start + (chunk / 8) % (run.chunks.end - run.chunks.start);
                for chunk in run.chunks.start..left {
                    told.extend(plan.settle(chunk));
                }
                let failure = match value % 3 {
                    0 => Failure::Temporary,
                    1 => Failure::Corrupt,
                    _ => Failure::Final,
                };
                told.extend(plan.end(&run, left..run.chunks.end, failure, now).0);
            }
            _ if !running.is_empty() => {
                let run = running.swap_remove(usize::from(*value) % running.len());
                for chunk in run.chunks.clone() {
                    told.extend(plan.settle(chunk));
                }
                plan.end(&run, 0..0, Failure::Final, now);
            }
            _ => {}
        }
        for waiter in told {
            assert!(waiting.remove(&waiter), "{waiter} is told twice");
        }
    }
    // The server is fine again, and all that is left is fetched.
    for run in running.drain(..) {
        for waiter in plan.end(&run, run.chunks.clone(), Failure::Temporary, now).0 {
            assert!(waiting.remove(&waiter));
        }
    }
    while let Some(run) = plan.start_next() {
        for chunk in run.chunks.clone() {
            for waiter in plan.settle(chunk) {
                assert!(waiting.remove(&waiter));
            }
        }
        plan.end(&run, 0..0, Failure::Final, now);
    }
    assert!(waiting.is_empty(), "{waiting:?} wait for ever");
});
