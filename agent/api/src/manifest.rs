//! Manifests: files of one or more objects, as YAML or JSON.

use serde_json::Value;

use crate::ApiError;

/// The largest manifest, in bytes.
pub const SIZE_LIMIT: usize = 16 << 20;
/// The most objects in one manifest.
pub const OBJECT_LIMIT: usize = 1000;
/// The most objects that are applied in one transaction; stores have room for 128 operations.
pub const STEP_LIMIT: usize = 100;
/// How large the objects of one transaction are together, in bytes, unless it is a single one.
const STEP_SIZE: usize = 1 << 20;
/// Kinds in the order in which they are applied: objects that others refer to come first.
const ORDER: [&str; 6] = [
    "Host",
    "Network",
    "SecurityGroup",
    "Disk",
    "VirtualMachine",
    "Service",
];

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

/// Divides a manifest into what is applied at once: all of it where that fits into one transaction of a
/// store, else steps, those objects first that others refer to.
///
/// # Errors
/// [`serde_json::Error`] where a document can't be written.
pub fn steps(mut documents: Vec<Value>) -> Result<Vec<Vec<Vec<u8>>>, serde_json::Error> {
    if documents.len() > STEP_LIMIT {
        documents.sort_by_key(|document| {
            let kind = document.get("kind").and_then(Value::as_str);
            ORDER.iter().position(|one| Some(*one) == kind)
        });
    }
    let mut steps: Vec<Vec<Vec<u8>>> = Vec::new();
    let mut size = 0;
    for document in &documents {
        let document = serde_json::to_vec(document)?;
        let fits =
            |step: &Vec<Vec<u8>>| step.len() < STEP_LIMIT && size + document.len() <= STEP_SIZE;
        if let Some(step) = steps.last_mut().filter(|step| fits(step)) {
            size += document.len();
            step.push(document);
        } else {
            size = document.len();
            steps.push(vec![document]);
        }
    }
    Ok(steps)
}
