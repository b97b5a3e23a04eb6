//! Waiting for what another process does.

use std::time::{Duration, Instant};

/// Far beyond what anything here takes: only a hang reaches it.
const PATIENCE: Duration = Duration::from_mins(1);
const PAUSE: Duration = Duration::from_millis(5);

/// Calls `ready` until it gives something.
///
/// # Panics
/// If that takes a minute; `what` says what was waited for.
pub fn wait_until<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "no {what} within {PATIENCE:?}");
        std::thread::sleep(PAUSE);
    }
}
