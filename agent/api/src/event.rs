//! What happened to an object, kept for some time.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::Kind;

/// Whether an event is of the expected course.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventType {
    /// The expected course.
    Normal,
    /// Something that a person may want to act on.
    Warning,
}

/// The object that an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectReference {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: String,
}

/// What happened to an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// When.
    pub time: Timestamp,
    /// To which object.
    pub object: ObjectReference,
    /// Whether it is of the expected course.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// What, as one CamelCase word for programs.
    pub reason: String,
    /// What, for people.
    pub message: String,
}
