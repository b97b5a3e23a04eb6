//! How a guest ended.

use futures::FutureExt;
use futures::future::{BoxFuture, select_all};
use keelson_vmm::api::{ExitReason, ExitStatus};

use crate::host::Exit;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestExit {
    /// Whether the guest, or a person, wanted that.
    pub clean: bool,
    /// One CamelCase word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl GuestExit {
    /// Puts together what keelson-vmm said before it ended, if that was heard, and how its process
    /// ended.
    pub fn new(said: Option<ExitStatus>, process: &Exit) -> Self {
        match said {
            Some(ExitStatus { reason, message }) => {
                let (clean, reason) = match reason {
                    ExitReason::Shutdown => (true, "GuestShutDown"),
                    ExitReason::Reboot => (true, "GuestRebooted"),
                    ExitReason::Killed => (true, "Killed"),
                    ExitReason::TripleFault => (false, "TripleFault"),
                    ExitReason::GuestPanic => (false, "GuestPanicked"),
                    ExitReason::Watchdog => (false, "WatchdogExpired"),
                    ExitReason::Error => (false, "MachineFailed"),
                };
                Self {
                    clean,
                    reason,
                    message,
                }
            }
            None if process.code == Some(0) => Self {
                clean: true,
                reason: "GuestShutDown",
                message: "the guest shut down".into(),
            },
            None => Self {
                clean: false,
                reason: "MachineEnded",
                message: match process.code {
                    Some(code) => format!("keelson-vmm exited with {code}: {}", process.last_line),
                    None => format!(
                        "keelson-vmm was killed or ended unseen: {}",
                        process.last_line
                    ),
                },
            },
        }
    }
}

/// Waits until the first of several processes has ended; for ever where there is none.
pub fn first_ended(waits: Vec<BoxFuture<'_, ()>>) -> BoxFuture<'_, ()> {
    if waits.is_empty() {
        return futures::future::pending().boxed();
    }
    select_all(waits).map(drop).boxed()
}
