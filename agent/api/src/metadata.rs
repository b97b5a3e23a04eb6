//! What every object carries: its name, its history, and conditions in its status.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::FieldError;

/// The longest name; it becomes part of paths, cgroups and unit names.
const NAME_LIMIT: usize = 63;
const LABEL_LIMIT: usize = 64;

/// An object's identity and history. Only `name`, `labels` and `annotations` are for people to
/// write; the agent fills in the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ObjectMeta {
    /// Unique among the objects of the same kind: an RFC 1123 label.
    pub name: String,
    /// For people and selectors.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// For tools; never read by the agent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Tells this object from an earlier one of the same name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// Counts changes of the spec, from 1.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub generation: i64,
    /// The store's revision of the last change, as a decimal number.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub resource_version: String,
    /// When the object was first applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<Timestamp>,
    /// When deletion was asked for; the object goes once its teardown is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_timestamp: Option<Timestamp>,
}

// Serde hands `skip_serializing_if` a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

impl ObjectMeta {
    /// Metadata with this name and nothing else.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        if let Err(message) = validate_name(&self.name) {
            errors.push(FieldError::new("metadata.name", message));
        }
        for (field, map) in [("labels", &self.labels), ("annotations", &self.annotations)] {
            if map.len() > LABEL_LIMIT {
                errors.push(FieldError::new(
                    format!("metadata.{field}"),
                    format!("has {} entries; at most {LABEL_LIMIT} are kept", map.len()),
                ));
            }
        }
    }
}

/// Checks that `name` is an RFC 1123 label: lower-case letters, digits and inner hyphens.
pub fn validate_name(name: &str) -> Result<(), String> {
    let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() {
        return Err("is empty; give the object a name".into());
    }
    if name.len() > NAME_LIMIT {
        return Err(format!(
            "is {} characters long; at most {NAME_LIMIT} fit",
            name.len()
        ));
    }
    if !name.chars().all(is_inner) || name.starts_with('-') || name.ends_with('-') {
        return Err(format!(
            "{name:?} must consist of lower-case letters, digits and hyphens, and start and end \
             with a letter or digit"
        ));
    }
    Ok(())
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// The agent could not tell.
    Unknown,
}

/// One aspect of an object's observed state, shaped as Kubernetes' `metav1.Condition`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// The aspect, in CamelCase, such as `Ready`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Why, as one CamelCase word for programs.
    pub reason: String,
    /// Why, for people.
    pub message: String,
    /// When `status` last changed.
    pub last_transition_time: Timestamp,
}

/// Sets the condition of type `kind`, keeping its transition time while the status stays the same.
/// Returns whether anything changed.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    kind: &str,
    status: ConditionStatus,
    reason: &str,
    message: &str,
) -> bool {
    let now = Timestamp::now();
    let Some(condition) = conditions
        .iter_mut()
        .find(|condition| condition.kind == kind)
    else {
        conditions.push(Condition {
            kind: kind.into(),
            status,
            reason: reason.into(),
            message: message.into(),
            last_transition_time: now,
        });
        return true;
    };
    let changed =
        condition.status != status || condition.reason != reason || condition.message != message;
    if condition.status != status {
        condition.last_transition_time = now;
    }
    condition.status = status;
    condition.reason = reason.into();
    condition.message = message.into();
    changed
}
