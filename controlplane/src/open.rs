use std::sync::Arc;

use crate::embedded::EmbeddedStore;
use crate::etcd::EtcdStore;
use crate::{StateError, StateStore, StoreUrl};

/// Opens the store that `url` names: see [`StoreUrl`].
///
/// # Errors
/// [`StateError::InvalidUrl`] says what is wrong with the URL; else those of the backend.
pub async fn open(url: &str) -> Result<Arc<dyn StateStore>, StateError> {
    match url.parse()? {
        StoreUrl::Embedded(options) => Ok(Arc::new(EmbeddedStore::open(options).await?)),
        StoreUrl::Etcd(options) => Ok(Arc::new(EtcdStore::open(options).await?)),
    }
}
