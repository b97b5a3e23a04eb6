use std::fmt;

use serde::{Deserialize, Serialize};

use crate::operation::{KeyValue, Keys};
use crate::text::text;

/// One watch of one client, from its creation to its end; one that is resumed is a new one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Who watches.
    pub client: u64,
    /// When it was asked for.
    pub call: u64,
    /// What it was asked to be.
    pub request: WatchRequest,
    /// What it was sent, in the order of arrival.
    pub responses: Vec<WatchResponse>,
    /// It was given the time to send everything up to this revision, and must have. None if it was
    /// cut off before.
    pub complete_through: Option<i64>,
}

/// What a watch is asked to be (`WatchCreateRequest`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchRequest {
    /// Keys that are watched.
    pub keys: Keys,
    /// From this revision on; 0 for from now on.
    pub start_revision: i64,
    /// Whether events hold what was there before.
    pub prev_kv: bool,
    /// Whether puts are left out (the filter `NOPUT`).
    pub no_put: bool,
    /// Whether deletes are left out (the filter `NODELETE`).
    pub no_delete: bool,
}

/// One message of a watch (`WatchResponse`). The fragments of one message are to be joined before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchResponse {
    /// When it arrived.
    pub at: u64,
    /// The header's revision. It counts for creations and for progress notifications only.
    pub revision: i64,
    /// What it is.
    pub body: WatchBody,
}

/// What a message of a watch says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WatchBody {
    /// The watch was created.
    Created,
    /// These happened, of one revision or more.
    Events(Vec<Event>),
    /// Everything up to the header's revision has been sent.
    Progress,
    /// The watch begins before history does, which begins at this revision. It ends with this.
    Compacted(i64),
    /// The store ended it for another reason.
    Canceled,
}

/// One change of a key (`mvccpb.Event`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What was done.
    pub kind: EventKind,
    /// The key as it is now; of a deleted one, only key and mod_revision are set.
    pub kv: KeyValue,
    /// The key as it was before, if asked for and if it existed.
    pub prev_kv: Option<KeyValue>,
}

/// What was done to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Each is what it says.
pub enum EventKind {
    Put,
    Delete,
}

impl WatchRequest {
    /// Watches `keys` from a revision on, with all that there is to be known.
    pub fn of(keys: Keys, start_revision: i64) -> Self {
        Self {
            keys,
            start_revision,
            prev_kv: true,
            no_put: false,
            no_delete: false,
        }
    }

    /// Whether an event is one that the watch asks for.
    pub fn wants(&self, event: &Event) -> bool {
        let filtered = match event.kind {
            EventKind::Put => self.no_put,
            EventKind::Delete => self.no_delete,
        };
        !filtered && self.keys.contains(&event.kv.key)
    }
}

impl Event {
    /// The end of a key at a revision.
    pub fn deleted(revision: i64, previous: KeyValue) -> Self {
        Self {
            kind: EventKind::Delete,
            kv: KeyValue {
                key: previous.key.clone(),
                value: bytes::Bytes::new(),
                create_revision: 0,
                mod_revision: revision,
                version: 0,
                lease: 0,
            },
            prev_kv: Some(previous),
        }
    }

    /// The revision that it happened at.
    pub fn revision(&self) -> i64 {
        self.kv.mod_revision
    }

    /// Whether both tell the same change, one of them perhaps without what was there before.
    pub fn is_same_change(&self, other: &Self) -> bool {
        self.kind == other.kind && self.kv == other.kv
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            EventKind::Put => write!(f, "put {}", self.kv)?,
            EventKind::Delete => {
                write!(f, "delete {} at {}", text(&self.kv.key), self.revision())?;
            }
        }
        match &self.prev_kv {
            Some(previous) => write!(f, ", was {previous}"),
            None => Ok(()),
        }
    }
}
