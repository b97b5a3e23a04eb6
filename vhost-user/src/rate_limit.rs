//! Token buckets on bytes and operations, for one disk or shared fairly by several.
//!
//! A bucket is kept as a point in time: the moment at which all that was taken is paid for. A
//! request may start as soon as the bucket isn't empty, and what it takes beyond that is a debt
//! that later ones wait for; so a request larger than the bucket passes too. Time that passes
//! while somebody waits is never lost, even if the bucket would have overflowed meanwhile: a timer
//! that fires late doesn't cost the average that was promised.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The most that a bucket may owe to those who wait, so that a stall isn't followed by a flood.
const MOST_OWED: Duration = Duration::from_secs(1);
/// The bucket's size where none is given: what the rate yields in this time.
const DEFAULT_BURST: Duration = Duration::from_millis(100);
/// How long others are held back for a disk that has taken less, until it asks for its next.
const NEXT_CLAIM: Duration = Duration::from_millis(2);
const SECOND: u128 = 1_000_000_000;

/// A promised average.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Bytes or operations in a second, at least 1.
    pub per_second: u64,
    /// The bucket's size: what may be taken at once after idle time, on top of the average. A
    /// tenth of a second's worth if it isn't given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
}

/// What is limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes read and written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Rate>,
    /// Requests of any kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations: Option<Rate>,
}

impl Limits {
    /// Whether anything is limited.
    pub fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }
}

/// What may be done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may start.
    Granted,
    /// Ask again then, or when woken.
    WaitUntil(Instant),
}

/// Wakes who waits, from any thread.
pub type Wake = Box<dyn Fn() + Send>;

/// One request that wants to start, the first one in line of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// The queue: each has at most one claim at a time.
    pub queue: u64,
    /// Whose queue it is: the limit is shared evenly by these.
    pub disk: u64,
    /// Its bytes.
    pub bytes: u64,
    /// Whether it has waited for others of its queue.
    pub waited: bool,
    /// Whether others of its queue wait for it.
    pub more: bool,
}

/// The buckets of a disk, or of a group of disks.
pub struct Limiter {
    unlimited: AtomicBool,
    state: Mutex<State>,
}

struct State {
    limits: Limits,
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    waiters: Vec<Waiter>,
    /// What each disk has taken, in nanoseconds of the limit's time.
    taken: HashMap<u64, u128>,
    /// What the disk that was served last had taken before.
    served: u128,
}

struct Waiter {
    claim: Claim,
    granted: Option<Instant>,
    wake: Wake,
}

#[derive(Debug)]
struct Bucket {
    rate: Rate,
    start: Instant,
    /// When all that was taken is paid for, in nanoseconds after `start`.
    paid_at: u128,
    /// What is left of the last division, in nanoseconds times the rate.
    remainder: u128,
}

impl Limiter {
    /// One that limits so from now on.
    pub fn new(limits: Limits, now: Instant) -> Self {
        let limiter = Self {
            unlimited: AtomicBool::new(true),
            state: Mutex::new(State {
                limits: Limits::default(),
                bytes: None,
                operations: None,
                waiters: Vec::new(),
                taken: HashMap::new(),
                served: 0,
            }),
        };
        limiter.set(limits, now);
        limiter
    }

    /// Changes the limits. Who waits is woken to ask again.
    pub fn set(&self, limits: Limits, now: Instant) {
        let mut state = self.state();
        state.limits = limits;
        state.bytes = limits.bytes.map(|rate| Bucket::new(rate, now));
        state.operations = limits.operations.map(|rate| Bucket::new(rate, now));
        state.taken.clear();
        state.served = 0;
        self.unlimited
            .store(limits.is_unlimited(), Ordering::Release);
        for waiter in &state.waiters {
            (waiter.wake)();
        }
    }

    /// The limits now.
    pub fn limits(&self) -> Limits {
        self.state().limits
    }

    /// Whether every claim is granted at once.
    pub fn is_unlimited(&self) -> bool {
        self.unlimited.load(Ordering::Acquire)
    }

    /// Claims for the first request of a queue. Once granted, the claim is used up. `wake` is
    /// called when another's claim leads to this one being granted.
    pub fn claim(&self, claim: Claim, now: Instant, wake: impl FnOnce() -> Wake) -> Decision {
        let mut state = self.state();
        let known = state
            .waiters
            .iter()
            .position(|waiter| waiter.claim.queue == claim.queue);
        if known.is_none() {
            if state.waiters.is_empty() && state.earliest().is_none_or(|earliest| earliest <= now) {
                state.join(claim.disk);
                state.take(claim, now);
                return Decision::Granted;
            }
            state.join(claim.disk);
            state.waiters.push(Waiter {
                claim,
                granted: None,
                wake: wake(),
            });
        }
        let next = state.grant(now, claim.queue);
        let granted =
            |waiter: &Waiter| waiter.claim.queue == claim.queue && waiter.granted.is_some();
        if let Some(place) = state.waiters.iter().position(granted) {
            state.waiters.swap_remove(place);
            return Decision::Granted;
        }
        Decision::WaitUntil(next)
    }

    /// Gives up a queue's claim.
    pub fn cancel(&self, queue: u64) {
        let mut state = self.state();
        state.waiters.retain(|waiter| waiter.claim.queue != queue);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits = self.limits();
        f.debug_struct("Limiter").field("limits", &limits).finish()
    }
}

impl State {
    // From when on the next request may start; nothing if it always may.
    fn earliest(&self) -> Option<Instant> {
        let buckets = [self.bytes.as_ref(), self.operations.as_ref()];
        buckets.into_iter().flatten().map(Bucket::earliest).max()
    }

    // A disk that comes back after idle time has saved nothing up against the others.
    fn join(&mut self, disk: u64) {
        if self.taken.len() > 1024 {
            // Who has taken less counts as if it were new.
            let served = self.served;
            self.taken.retain(|_, taken| *taken > served);
        }
        let taken = self.taken.entry(disk).or_default();
        *taken = (*taken).max(self.served);
    }

    // Grants claims in order of what their disks have taken, as far as the buckets go. Returns
    // when to look again.
    fn grant(&mut self, now: Instant, asking: u64) -> Instant {
        loop {
            if let Some(earliest) = self.earliest().filter(|earliest| *earliest > now) {
                for waiter in &mut self.waiters {
                    waiter.claim.waited = true;
                }
                return earliest;
            }
            let waiting = self.waiters.iter().enumerate();
            let next = waiting
                .filter(|(_, waiter)| waiter.may_be_next(now))
                .min_by_key(|(_, waiter)| self.taken.get(&waiter.claim.disk).copied())
                .map(|(place, waiter)| (place, waiter.claim, waiter.granted));
            match next {
                None => return now,
                // Its next claim comes before those of disks that have taken more.
                Some((_, _, Some(granted))) => return granted + NEXT_CLAIM,
                Some((place, claim, None)) => {
                    self.take(claim, now);
                    if let Some(waiter) = self.waiters.get_mut(place) {
                        waiter.granted = Some(now);
                        if claim.queue != asking {
                            (waiter.wake)();
                        }
                    }
                }
            }
        }
    }

    fn take(&mut self, claim: Claim, now: Instant) {
        let mut cost = 0;
        if let Some(bucket) = &mut self.bytes {
            cost = cost.max(bucket.take(claim.bytes, now, claim.waited));
        }
        if let Some(bucket) = &mut self.operations {
            cost = cost.max(bucket.take(1, now, claim.waited));
        }
        let taken = self.taken.entry(claim.disk).or_default();
        self.served = self.served.max(*taken);
        *taken += cost;
    }
}

impl Waiter {
    fn may_be_next(&self, now: Instant) -> bool {
        self.granted
            .is_none_or(|granted| self.claim.more && now < granted + NEXT_CLAIM)
    }
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        let rate = Rate {
            per_second: rate.per_second.max(1),
            ..rate
        };
        Self {
            rate,
            start: now,
            paid_at: 0,
            remainder: 0,
        }
    }

    fn burst_time(&self) -> u128 {
        match self.rate.burst {
            Some(burst) => u128::from(burst) * SECOND / u128::from(self.rate.per_second),
            None => DEFAULT_BURST.as_nanos(),
        }
    }

    fn earliest(&self) -> Instant {
        let wait = self.paid_at.saturating_sub(self.burst_time());
        self.start + Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX / 4))
    }

    // Returns what it costs in nanoseconds.
    fn take(&mut self, amount: u64, now: Instant, waited: bool) -> u128 {
        let now = now.saturating_duration_since(self.start).as_nanos();
        // An idle bucket is full and no more; one that is waited for is owed the time since.
        let floor = if waited {
            now.saturating_sub(MOST_OWED.as_nanos())
        } else {
            now
        };
        self.paid_at = self.paid_at.max(floor);
        let rate = u128::from(self.rate.per_second);
        let owed = u128::from(amount) * SECOND + self.remainder;
        self.remainder = owed % rate;
        self.paid_at += owed / rate;
        owed / rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Queues that always have the next request, on a machine whose timers are late.
    struct Load {
        now: Instant,
        limiter: Limiter,
        queues: Vec<(Claim, Option<Instant>, u64)>,
    }

    impl Load {
        fn new(limits: Limits, queues: &[(u64, u64)]) -> Self {
            let now = Instant::now();
            let queues = queues.iter().enumerate().map(|(queue, (disk, bytes))| {
                let claim = Claim {
                    queue: queue as u64,
                    disk: *disk,
                    bytes: *bytes,
                    waited: false,
                    more: true,
                };
                (claim, Some(now), 0)
            });
            Self {
                now,
                limiter: Limiter::new(limits, now),
                queues: queues.collect(),
            }
        }

        // Grants by others are noticed at once, by asking everybody.
        fn run(&mut self, time: Duration, late: Duration) {
            let end = self.now + time;
            while self.now < end {
                let mut next = end;
                for (claim, _, granted) in &mut self.queues {
                    loop {
                        let wake = || -> Wake { Box::new(|| {}) };
                        match self.limiter.claim(*claim, self.now, wake) {
                            Decision::Granted => *granted += 1,
                            Decision::WaitUntil(at) => {
                                claim.waited = true;
                                next = next.min(at.max(self.now) + late);
                                break;
                            }
                        }
                    }
                }
                self.now = next;
            }
        }

        fn granted(&self, queue: usize) -> u64 {
            self.queues[queue].2
        }
    }

    fn operations(per_second: u64, burst: Option<u64>) -> Limits {
        Limits {
            operations: Some(Rate { per_second, burst }),
            bytes: None,
        }
    }

    #[test]
    fn the_average_is_kept_whatever_the_bucket_and_however_late_the_timer() {
        for burst in [Some(0), Some(1), Some(100), Some(5000), None] {
            for late in [0, 50, 3_000, 20_000].map(Duration::from_micros) {
                for rate in [3, 1000, 7_777] {
                    let mut load = Load::new(operations(rate, burst), &[(0, 4096)]);
                    load.run(Duration::from_secs(5), late);
                    let least = rate * 5;
                    let most = least + burst.unwrap_or(rate / 10) + 2 + rate / 40;
                    let granted = load.granted(0);
                    assert!(
                        granted + 1 + rate / 40 >= least && granted <= most,
                        "{granted} of {least}, burst {burst:?}, {late:?} late"
                    );
                }
            }
        }
    }

    #[test]
    fn bytes_count_also_where_a_request_is_larger_than_the_bucket() {
        let limits = Limits {
            bytes: Some(Rate {
                per_second: 10 << 20,
                burst: Some(4096),
            }),
            operations: None,
        };
        let mut load = Load::new(limits, &[(0, 1 << 20)]);
        load.run(Duration::from_secs(10), Duration::from_millis(1));
        assert!((99..=102).contains(&load.granted(0)), "{}", load.granted(0));
    }

    #[test]
    fn idle_time_is_saved_up_to_the_bucket_and_no_further() {
        let mut load = Load::new(operations(100, Some(10)), &[(0, 0)]);
        load.now += Duration::from_hours(1);
        load.run(Duration::from_micros(1), Duration::ZERO);
        assert!((10..=11).contains(&load.granted(0)), "{}", load.granted(0));
    }

    #[test]
    fn a_group_is_shared_evenly_by_disks_whatever_their_queues_and_sizes() {
        let limits = Limits {
            bytes: Some(Rate {
                per_second: 100 << 20,
                burst: None,
            }),
            operations: None,
        };
        // One disk with four queues of large requests, two with one of small ones.
        let queues = [
            (1, 1 << 20),
            (1, 1 << 20),
            (1, 1 << 20),
            (1, 1 << 20),
            (2, 4096),
            (3, 65536),
        ];
        let mut load = Load::new(limits, &queues);
        load.run(Duration::from_secs(10), Duration::from_micros(100));
        let bytes = |range: std::ops::Range<usize>| -> u64 {
            range
                .map(|queue| load.granted(queue) * load.queues[queue].0.bytes)
                .sum()
        };
        let shares = [bytes(0..4), bytes(4..5), bytes(5..6)];
        let third = (1000 << 20) / 3;
        for share in shares {
            assert!(share.abs_diff(third) < third / 20, "{shares:?}");
        }
    }

    #[test]
    fn changed_limits_hold_from_then_on_and_wake_who_waits() {
        let now = Instant::now();
        let limiter = Limiter::new(operations(1, Some(0)), now);
        let claim = Claim {
            queue: 1,
            disk: 1,
            bytes: 0,
            waited: false,
            more: false,
        };
        let (sender, woken) = std::sync::mpsc::channel();
        let ask = |now| {
            let sender = sender.clone();
            limiter.claim(claim, now, move || {
                Box::new(move || sender.send(()).unwrap())
            })
        };
        assert_eq!(ask(now), Decision::Granted);
        assert_eq!(ask(now), Decision::WaitUntil(now + Duration::from_secs(1)));
        limiter.set(Limits::default(), now);
        assert!(woken.try_recv().is_ok());
        assert_eq!(ask(now), Decision::Granted);
        assert!(limiter.is_unlimited());
    }

    #[test]
    fn a_queue_that_is_gone_holds_nobody_up() {
        let mut load = Load::new(operations(100, None), &[(0, 0), (1, 0)]);
        load.run(Duration::from_secs(1), Duration::ZERO);
        load.limiter.cancel(0);
        load.queues.remove(0);
        let before = load.granted(0);
        load.run(Duration::from_secs(1), Duration::ZERO);
        assert!((95..=105).contains(&(load.granted(0) - before)));
    }
}
