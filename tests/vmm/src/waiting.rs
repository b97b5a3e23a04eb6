//! Waiting for what another process does.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// In seconds, far beyond what anything here takes: only a hang reaches it.
static PATIENCE: AtomicU64 = AtomicU64::new(USUAL);
const USUAL: u64 = 60;
const PAUSE: Duration = Duration::from_millis(5);

/// Lets everything take longer, where the machine under the tests is emulated itself, and looks more seldom: a look
/// may start a program, and what is waited for would have to share the processor with that.
pub fn be_patient(limit: Duration) {
    PATIENCE.store(limit.as_secs(), Ordering::Relaxed);
}

/// Calls `ready` until it gives something.
///
/// # Panics
/// If that takes a minute, or what [`be_patient`] was told; `what` says what was waited for.
pub fn wait_until<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    let patience = Duration::from_secs(PATIENCE.load(Ordering::Relaxed));
    loop {
        let began = Instant::now();
        if let Some(value) = ready() {
            return value;
        }
        let look = began.elapsed();
        assert!(start.elapsed() < patience, "no {what} within {patience:?}");
        let pause = if patience.as_secs() > USUAL {
            PAUSE.max(look * 3)
        } else {
            PAUSE
        };
        std::thread::sleep(pause);
    }
}
