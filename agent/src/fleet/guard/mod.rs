//! Kills the guests that may be started elsewhere, when the host's lease is about to end.
//!
//! The guard is a process of its own, since guests outlive the agent: it depends neither on the agent
//! nor on the state store, but only on a clock and on files in the run directory. The agent tells it
//! each new deadline; when the last one passes, it kills.

mod handle;
mod process;

pub use handle::Guard;
pub use process::{fence, run};

use std::time::Duration;

use super::Instant;

/// How often it looks for processes to kill while its deadline is over.
const AGAIN: Duration = Duration::from_millis(100);
/// How long it stays when its deadline is over and there is nothing left to kill.
const IDLE_LIMIT: Duration = Duration::from_mins(1);

/// What the guard does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It waits until this moment, or until it is told something.
    Wait(Instant),
    /// It kills what there is to kill, and asks again.
    Fence,
    /// Its work is done.
    End,
}

/// The guard's decisions, without a clock or processes of its own.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    /// When it last killed, and when it last found something to kill.
    fenced: Option<(Instant, Instant)>,
}

impl Deadline {
    /// A guard that kills at `at` unless it is told otherwise.
    pub const fn new(at: Instant) -> Self {
        Self { at, fenced: None }
    }

    /// A later deadline; an earlier one, which comes of messages that overtook each other, changes
    /// nothing.
    pub fn extend(&mut self, at: Instant) {
        if at > self.at {
            *self = Self::new(at);
        }
    }

    /// What to do at `now`.
    pub fn step(&self, now: Instant) -> Step {
        if now < self.at {
            return Step::Wait(self.at);
        }
        match self.fenced {
            None => Step::Fence,
            Some((_, found)) if found.plus(IDLE_LIMIT) <= now => Step::End,
            Some((last, _)) if last.plus(AGAIN) <= now => Step::Fence,
            Some((last, _)) => Step::Wait(last.plus(AGAIN)),
        }
    }

    /// Notes that it killed at `now`, and whether there was anything to kill.
    pub fn fenced(&mut self, now: Instant, found: bool) {
        let last_found = match self.fenced {
            Some((_, last)) if !found => last,
            _ => now,
        };
        self.fenced = Some((now, last_found));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Instant {
        Instant::since_boot(Duration::from_millis(milliseconds))
    }

    #[test]
    fn it_kills_when_the_deadline_passes_and_again_until_there_is_a_new_one() {
        let mut deadline = Deadline::new(at(1000));
        assert_eq!(deadline.step(at(0)), Step::Wait(at(1000)));
        deadline.extend(at(2000));
        deadline.extend(at(1500));
        assert_eq!(deadline.step(at(1999)), Step::Wait(at(2000)));
        assert_eq!(deadline.step(at(2000)), Step::Fence);
        deadline.fenced(at(2000), true);
        assert_eq!(deadline.step(at(2001)), Step::Wait(at(2100)));
        assert_eq!(deadline.step(at(2100)), Step::Fence);
        deadline.fenced(at(2100), false);
        deadline.extend(at(5000));
        assert_eq!(deadline.step(at(2200)), Step::Wait(at(5000)));
    }

    #[test]
    fn it_ends_when_there_was_nothing_to_kill_for_a_minute() {
        let mut deadline = Deadline::new(at(0));
        deadline.fenced(at(0), true);
        deadline.fenced(at(59_950), false);
        assert_eq!(deadline.step(at(60_000)), Step::End);
    }
}
