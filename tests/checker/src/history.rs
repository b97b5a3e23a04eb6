use serde::{Deserialize, Serialize};

use crate::operation::Operation;
use crate::watch::Watch;
use crate::{KeyValue, LeaseTimes};

/// What clients of one store did and saw.
///
/// Times are any clock's that all of its clients share and that never goes back: nanoseconds of
/// `CLOCK_MONOTONIC`, ticks of a simulation. Only their order counts, save for leases.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// What the store held before the first operation.
    pub initial: Initial,
    /// Requests with their outcomes, in any order.
    pub operations: Vec<Operation>,
    /// Watches with what they were sent.
    pub watches: Vec<Watch>,
    /// What is known of each lease's life. Empty where leases are not to be checked.
    pub leases: Vec<LeaseTimes>,
}

/// What a store holds when its history begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Initial {
    /// Its revision; 1 for a new store.
    pub revision: i64,
    /// The revision it is compacted at; 0 if it never was.
    pub compacted: i64,
    /// Its keys.
    pub keys: Vec<KeyValue>,
    /// Its leases.
    pub leases: Vec<i64>,
}

impl Default for Initial {
    fn default() -> Self {
        Self {
            revision: 1,
            compacted: 0,
            keys: Vec::new(),
            leases: Vec::new(),
        }
    }
}
