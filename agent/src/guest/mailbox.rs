//! Wakes the actor of one guest.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Wakes the actor of one guest. The actor ends with it.
#[derive(Debug)]
pub struct GuestMailbox {
    bell: Arc<Bell>,
    task: JoinHandle<()>,
}

/// What the actor waits at.
#[derive(Debug, Default)]
pub(super) struct Bell {
    notify: Notify,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Quiet,
    /// It rang, and the actor has not looked since.
    Rang,
    /// The actor has ended and hears nothing.
    Closed,
}

impl GuestMailbox {
    pub(super) fn new(bell: Arc<Bell>, task: JoinHandle<()>) -> Self {
        Self { bell, task }
    }

    /// Makes the actor look at its guest's object again; `false` if it has ended, so that it takes another
    /// one.
    #[must_use]
    pub fn wake(&self) -> bool {
        self.bell.ring()
    }

    /// Whether the actor's work is over.
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }
}

impl Drop for GuestMailbox {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Bell {
    /// Rings; `false` if the actor has ended.
    pub fn ring(&self) -> bool {
        let mut state = self.state.lock();
        if *state == State::Closed {
            return false;
        }
        *state = State::Rang;
        self.notify.notify_one();
        true
    }

    /// Waits until it rings.
    pub async fn rang(&self) {
        self.notify.notified().await;
    }

    /// From here on the actor looks at everything anew.
    pub fn looking(&self) {
        let mut state = self.state.lock();
        if *state == State::Rang {
            *state = State::Quiet;
        }
    }

    /// Ends the actor, unless it rang since the actor began to look: then it has to look again.
    pub fn close(&self) -> bool {
        let mut state = self.state.lock();
        if *state == State::Rang {
            return false;
        }
        *state = State::Closed;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_actor_that_is_woken_while_it_ends_looks_again() {
        let bell = Arc::new(Bell::default());
        let mailbox = GuestMailbox::new(Arc::clone(&bell), tokio::spawn(std::future::ready(())));
        bell.looking();
        assert!(mailbox.wake());
        assert!(!bell.close());
        bell.looking();
        assert!(bell.close());
        assert!(!mailbox.wake());
    }
}
