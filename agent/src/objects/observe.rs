//! What an agent observes of an object.

use keelson_api::Resource;

use super::ObjectStore;
use crate::{AgentError, error::Result};

impl ObjectStore {
    /// Writes what is observed into an object's status; asks the store for nothing where that is there, and
    /// for an object that is gone says nothing. Whether there was something new to say.
    ///
    /// # Errors
    /// [`AgentError::Conflict`] and those of the store.
    pub async fn observe<T: Resource>(
        &self,
        known: &T,
        observe: impl Fn(&mut T) + Send + Sync,
    ) -> Result<bool> {
        let mut after = known.clone();
        observe(&mut after);
        if after == *known {
            return Ok(false);
        }
        match self.update(&known.metadata().name, observe).await {
            Ok(_) => Ok(true),
            Err(AgentError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
