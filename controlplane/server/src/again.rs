//! Rebuilds in a row: a member that is found damaged again soon after it was rebuilt waits longer and
//! longer, for each rebuild costs the others a copy of everything.

use std::time::Duration;

/// Tells a process that starts anew how often that was in a row.
pub const IN_A_ROW: &str = "KEELSON_STATE_REBUILDS_IN_A_ROW";
/// A member that has served this long before it was found damaged is not one that can't be rebuilt.
const FORGET: Duration = Duration::from_mins(10);
const LONGEST_WAIT: Duration = Duration::from_mins(5);

/// How often it is in a row for a process that starts anew after this one, which ran for `served`.
pub fn next(served: Duration) -> u32 {
    after(in_a_row(), served)
}

/// How long to wait before this process begins a rebuild.
pub fn wait() -> Duration {
    wait_before(in_a_row())
}

fn in_a_row() -> u32 {
    let text = std::env::var(IN_A_ROW).unwrap_or_default();
    text.parse().unwrap_or(0)
}

fn after(before: u32, served: Duration) -> u32 {
    if served >= FORGET {
        return 1;
    }
    before.saturating_add(1)
}

/// Nothing for the first one, then seconds that double.
fn wait_before(in_a_row: u32) -> Duration {
    match in_a_row {
        0 | 1 => Duration::ZERO,
        again => Duration::from_secs(1 << (again - 1).min(16)).min(LONGEST_WAIT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_until_a_member_has_served() {
        let soon = Duration::from_secs(3);
        let mut in_a_row = 0;
        let mut waits = Vec::new();
        for _ in 0..12 {
            in_a_row = after(in_a_row, soon);
            waits.push(wait_before(in_a_row).as_secs());
        }
        assert_eq!(waits, [0, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        assert_eq!(wait_before(u32::MAX), LONGEST_WAIT);
        assert_eq!(wait_before(after(u32::MAX, soon)), LONGEST_WAIT);
        assert_eq!(wait_before(after(in_a_row, FORGET)), Duration::ZERO);
    }
}
