//! What can be wrong with a manifest.

use std::fmt;

use crate::{API_VERSION, Kind};

/// One wrong field: where it is, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The field's path in the object, such as `spec.interfaces[0].address`.
    pub field: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl FieldError {
    /// An error about the field at the path `field`.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            message: message.into(),
        }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.field, self.message)
    }
}

/// Why a manifest could not be read as objects.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The text is neither YAML nor JSON.
    #[error("the manifest is not valid YAML: {0}")]
    Syntax(String),
    /// The manifest holds no object at all.
    #[error("the manifest holds no object")]
    Empty,
    /// The manifest or a part of it is larger than a manifest may be.
    #[error("{what} is {size} large; the limit is {limit}")]
    TooLarge {
        /// What was measured, with its unit.
        what: &'static str,
        /// Its size.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// `apiVersion` names another version.
    #[error("apiVersion: {0:?} is not known here; write {API_VERSION:?}")]
    ApiVersion(String),
    /// `kind` names no kind.
    #[error("kind: {0:?} is not known here; write one of {names}", names = Kind::names())]
    Kind(String),
    /// A field is unknown, missing, or of the wrong type.
    #[error("{object}: {error}")]
    Field {
        /// The object, as `Kind/name`.
        object: String,
        /// The field and what is wrong with it.
        error: FieldError,
    },
}
