//! Decides whether what clients of an etcd-like store saw is something that such a store may show.
//!
//! It does no I/O and knows no clock: a simulation and a run against real processes record a
//! [`History`] and have it checked.
//!
//! - [`linearizability`]: operations took effect one at a time, each between its call and its end
//!   (the search of Wing and Gong, with Lowe's memory of states, as in Porcupine). Serializable
//!   reads are of a state that was, at any time before their end.
//! - [`guarantees`]: what etcd promises of watches: ordered, unique, atomic, reliable, resumable,
//!   bookmarkable, with the previous value, with creations marked, filtered.
//! - [`leases`]: no lease ends before its time, every lease ends after it.
//!
//! ```
//! use keelson_checker::*;
//!
//! let put = |value: &'static str| {
//!     Request::Put(Put { key: "k".into(), value: value.into(), lease: 0, prev_kv: false })
//! };
//! let mut history = History::default(); // of a new store: it begins at revision 1
//! history.operations.push(Operation {
//!     client: 0, call: 10, end: 20,
//!     request: put("a"),
//!     outcome: Outcome::Ok(Response::Put { revision: 2, prev_kv: None }),
//! });
//! history.operations.push(Operation {
//!     client: 0, call: 30, end: 40,
//!     request: Request::Range(Range::of(Keys::One("k".into()))),
//!     // Not found, although the put was over.
//!     outcome: Outcome::Ok(Response::Range {
//!         revision: 1,
//!         result: RangeResult { kvs: vec![], count: 0, more: false },
//!     }),
//! });
//! let report = check(&history, &Limits::default());
//! assert!(!report.holds());
//! println!("{report}");
//! ```

mod display;
pub mod guarantees;
mod history;
pub mod leases;
pub mod linearizability;
mod model;
mod operation;
mod report;
mod search;
mod text;
mod watch;

pub use self::history::{History, Initial};
pub use self::leases::{KeepAlive, LeaseTimes};
pub use self::model::{Model, Step};
pub use self::operation::{
    Compare, Delete, KeyValue, Keys, Operation, Outcome, Put, Range, RangeResult, Refusal,
    Relation, Request, Response, Target, Txn, TxnOperation, TxnResult,
};
pub use self::report::{Limits, Report, Verdict, Violation};
pub use self::watch::{Event, EventKind, Watch, WatchBody, WatchRequest, WatchResponse};

/// Checks everything that `history` tells.
pub fn check(history: &History, limits: &Limits) -> Report {
    let mut report = Report::default();
    let (verdict, changes) = linearizability::check(history, limits);
    report.add("linearizability", verdict);
    // Without a linearization, watches can only be compared with each other.
    let changes = changes.unwrap_or_else(|| linearizability::changes_seen(history));
    for (guarantee, verdict) in guarantees::check(history, &changes) {
        report.add(guarantee, verdict);
    }
    for (rule, verdict) in leases::check(&history.leases) {
        report.add(rule, verdict);
    }
    report
}
