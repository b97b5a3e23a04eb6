//! What happens in a simulated fleet, in the order of time.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::migration::Passage;
use super::schedule::Write;
use super::store::{Answer, Request};

/// What happens at some time. Hosts and guests are given by their index, in this order.
#[derive(Debug)]
pub enum Event {
    /// The agent sends a renewal, and looks at what it is to run.
    Agent(usize),
    /// A renewal of the lease that the agent knows, sent at this local time in microseconds, is at the store.
    Renewal(usize, Option<u64>, u64),
    /// The answer is at the agent: the lease.
    Renewed(usize, u64, u64),
    /// The agent is told that a guest's object was written, and looks at it.
    Told(usize, usize),
    /// What the agent asks of the store for a guest is there, as a piece of work of this number.
    Request(usize, usize, u64, Request),
    /// The answer is at the agent.
    Answer(usize, usize, u64, Answer),
    /// The agent has done something on its host.
    Done(usize, usize, u64, Task),
    /// All of a guest that moves has been sent.
    Sent(Passage),
    Guard(usize),
    /// A process that was killed is gone: that of this number.
    Dead(usize, usize, u64),
    /// The scheduler on a host looks at what it knows, which may be old.
    Schedule(usize),
    /// Its decision is at the store.
    Write(usize, Box<Write>),
    /// Somebody wants a guest to move, or to stay.
    Operator,
    Fault,
}

/// What takes an agent's time on its own host.
#[derive(Clone, Copy, Debug)]
pub enum Task {
    /// Disk images are opened and devices made, and the guest's process begins to run.
    Start,
    /// The same for a process that waits for its guest.
    Prepare,
    /// A guest that has come goes on.
    Land,
    /// A guest that was released goes on where it is.
    TakeBack,
}

/// Events to come.
#[derive(Debug, Default)]
pub struct Queue {
    events: BinaryHeap<Scheduled>,
    pushed: u64,
}

impl Queue {
    pub fn push(&mut self, at: u64, event: Event) {
        self.pushed += 1;
        let number = self.pushed;
        self.events.push(Scheduled { at, number, event });
    }

    pub fn pop(&mut self) -> Option<(u64, Event)> {
        let next = self.events.pop()?;
        Some((next.at, next.event))
    }
}

#[derive(Debug)]
struct Scheduled {
    at: u64,
    /// Of two at one time, the one that was scheduled first comes first.
    number: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the greatest.
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}
