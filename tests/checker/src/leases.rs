//! How long leases live.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::report::{Verdict, Violation};

/// What is known of one lease's life. Times are of the history's clock, time-to-live is in its unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseTimes {
    /// Its ID.
    pub id: i64,
    /// The grant, then all keep-alives; those that failed or whose answer was lost as well.
    pub keep_alives: Vec<KeepAlive>,
    /// When it was first asked to be revoked.
    pub revoked: Option<u64>,
    /// When it was first known to be gone: its keys were deleted, a keep-alive or a question for its
    /// time-to-live said so.
    pub gone: Option<u64>,
    /// When it was last known to be there.
    pub alive: Option<u64>,
    /// By how much later than its time a lease may end: for elections (a new leader gives every lease
    /// its whole time again), and for the store to get to it.
    pub allowance: u64,
}

/// A request that makes a lease live on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepAlive {
    /// When it was sent.
    pub call: u64,
    /// When it was answered.
    pub end: u64,
    /// The time-to-live that was promised; None if it is not known what came of it.
    pub promised: Option<u64>,
    /// The time-to-live that was asked for.
    pub asked: u64,
}

/// The verdicts on both rules.
pub fn check(leases: &[LeaseTimes]) -> Vec<(&'static str, Verdict)> {
    let first = |rule: fn(&LeaseTimes) -> Option<Violation>| {
        let broken = leases.iter().find_map(rule);
        broken.map_or(Verdict::Holds, Verdict::from)
    };
    vec![
        ("no lease ends early", first(ends_early)),
        ("every lease ends", first(outlives)),
    ]
}

/// It lives for the promised time, counted from when the last promise was asked for at the earliest.
fn ends_early(lease: &LeaseTimes) -> Option<Violation> {
    let gone = lease.gone?;
    if lease.revoked.is_some_and(|revoked| revoked <= gone) {
        return None;
    }
    let promises = lease.keep_alives.iter();
    let until = promises.filter_map(|kept| Some(kept.call.saturating_add(kept.promised?)));
    let until = until.max()?;
    (gone < until).then(|| {
        Violation::new(
            format!(
                "lease {:x} was gone at {gone}, promised until {until}",
                lease.id
            ),
            vec![lease.to_string()],
        )
    })
}

/// It ends when the last promise that may have been made is over.
fn outlives(lease: &LeaseTimes) -> Option<Violation> {
    let alive = lease.alive?;
    let promises = lease.keep_alives.iter();
    let until = promises.map(|kept| {
        let ttl = kept.promised.unwrap_or(kept.asked);
        kept.end.saturating_add(ttl)
    });
    let until = until.max()?.saturating_add(lease.allowance);
    (alive > until).then(|| {
        Violation::new(
            format!(
                "lease {:x} was there at {alive}, due to end by {until}",
                lease.id
            ),
            vec![lease.to_string()],
        )
    })
}

impl fmt::Display for LeaseTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// The last ones decide.
        const SHOWN: usize = 3;
        write!(f, "lease {:x}:", self.id)?;
        let skipped = self.keep_alives.len().saturating_sub(SHOWN);
        for kept in self.keep_alives.iter().skip(skipped) {
            write!(f, " kept alive [{}, {}] for ", kept.call, kept.end)?;
            match kept.promised {
                Some(promised) => write!(f, "{promised};")?,
                None => write!(f, "{} if at all;", kept.asked)?,
            }
        }
        for (name, at) in [
            ("revoked", self.revoked),
            ("gone", self.gone),
            ("alive", self.alive),
        ] {
            if let Some(at) = at {
                write!(f, " {name} at {at};")?;
            }
        }
        Ok(())
    }
}
