//! The engine's errors as the store's.

use crate::StateError;

/// Turns an engine result into the store's, naming what was tried.
pub(super) trait Engine<T> {
    fn engine(self, tried: &str) -> Result<T, StateError>;
}

impl<T, E: Into<redb::Error>> Engine<T> for Result<T, E> {
    fn engine(self, tried: &str) -> Result<T, StateError> {
        self.map_err(|error| from_engine(error.into(), tried))
    }
}

fn from_engine(error: redb::Error, tried: &str) -> StateError {
    match error {
        redb::Error::Corrupted(message) => StateError::Corrupt(format!("{tried}: {message}")),
        redb::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            StateError::Corrupt(format!("{tried}: {error}"))
        }
        redb::Error::TableTypeMismatch { table, .. } => {
            StateError::Corrupt(format!("{tried}: table {table} has another type"))
        }
        redb::Error::TableDoesNotExist(table) => {
            StateError::Corrupt(format!("{tried}: table {table} is missing"))
        }
        redb::Error::DatabaseClosed => StateError::Closed,
        error => StateError::Storage(format!("{tried}: {error}")),
    }
}
