//! Manifests: files of one or more objects, as YAML or JSON.

use serde_json::Value;

use crate::ApiError;

/// The largest manifest, in bytes; one object must fit into one write of the store.
pub const SIZE_LIMIT: usize = 1 << 20;
/// The most objects in one manifest; they are applied in one transaction.
pub const OBJECT_LIMIT: usize = 60;

/// Splits a manifest into the JSON documents of its objects. YAML's documents are separated by
/// `---`; empty ones are left out. JSON is YAML.
///
/// # Errors
/// [`ApiError::Syntax`] with line and column, [`ApiError::Empty`], or [`ApiError::TooLarge`].
pub fn parse(text: &str) -> Result<Vec<Value>, ApiError> {
    if text.len() > SIZE_LIMIT {
        return Err(ApiError::TooLarge {
            what: "the manifest, in bytes,",
            size: text.len(),
            limit: SIZE_LIMIT,
        });
    }
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| ApiError::Syntax(error.to_string()))?;
    let documents: Vec<_> = documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect();
    if documents.is_empty() {
        return Err(ApiError::Empty);
    }
    if documents.len() > OBJECT_LIMIT {
        return Err(ApiError::TooLarge {
            what: "the number of objects",
            size: documents.len(),
            limit: OBJECT_LIMIT,
        });
    }
    Ok(documents)
}
